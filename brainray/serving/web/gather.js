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
  try {
    return entry.isFile ? [await openFile(entry)] : await gatherFolder(entry);
  } catch { // it may not be read; an empty file in its place is answered, not dropped in silence
    return [new File([], entry.name)];
  }
}

function openFile(entry) {
  return new Promise((resolve, reject) => entry.file(resolve, reject));
}

async function gatherFolder(entry) {
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
