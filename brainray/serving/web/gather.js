// Files from wherever a person has them: a dropped folder, the clipboard.

/** Collect the files of a drop, also those in folders; hidden ones are left out. */
export async function gatherDropped(transfer) {
  // Entries must be taken before the first await: the browser empties the transfer after it.
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  return (await Promise.all(entries.map(gatherEntry))).flat();
}

async function gatherEntry(entry) {
  if (entry.name.startsWith(".")) return [];
  if (entry.isFile) {
    try {
      return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
    } catch { // nobody may read it; the answer says so
      return [new File([], entry.name)];
    }
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) { // a reader gives a hundred at a time
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) break;
    found.push(...some);
  }
  found.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  return (await Promise.all(found.map(gatherEntry))).flat();
}

/** Whether a drag brings files. */
export function hasFiles(event) {
  return event.dataTransfer?.types.includes("Files") ?? false;
}
