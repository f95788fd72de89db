// Files from a drop or a folder, and their format.

/** Collect the files of a drop, also those in folders, except hidden ones. */
export async function collectDropped(transfer) {
  // Take the entries before the first await: the browser then empties the transfer.
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  return (await Promise.all(entries.map(collectEntry))).flat();
}

async function collectEntry(entry) {
  if (entry.name.startsWith(".")) return [];
  try {
    if (entry.isDirectory) return await collectFolder(entry);
    return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
  } catch { // not readable: an empty file in its place gets an answer, so it is not lost silently
    return [new File([], entry.name)];
  }
}

async function collectFolder(entry) {
  const reader = entry.createReader();
  const found = [];
  for (;;) { // a reader returns at most a hundred entries at a time
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) break;
    found.push(...some);
  }
  found.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  return (await Promise.all(found.map(collectEntry))).flat();
}

const SIGNATURES = [["DICM", 128], ["n+1\0", 344], ["n+2\0", 4], ["\x1f\x8b", 0]];

/** Return whether a file is DICOM or NIfTI by its first bytes: it may have several slices. */
export async function isVolumeFormat(file) {
  const header = await file.slice(0, 352).arrayBuffer();
  const text = String.fromCharCode(...new Uint8Array(header));
  return SIGNATURES.some(([signature, offset]) => text.startsWith(signature, offset));
}
