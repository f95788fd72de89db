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

const HEADER_BYTES = 352;
const NIFTI_MAGICS = [["n+1\0", 344], ["ni1\0", 344], ["n+2\0\r\n\x1a\n", 4], ["\x1f\x8b", 0]];
const BARE_DICOM_STARTS = ["\x02\0", "\x08\0", "\0\x08"];

/** Whether a file is DICOM or NIfTI by its first bytes: its slices may belong to a series. */
export async function holdsSlices(file) {
  let start;
  try {
    start = String.fromCharCode(...new Uint8Array(await file.slice(0, HEADER_BYTES).arrayBuffer()));
  } catch { // whoever sends it says that it cannot be read
    return false;
  }
  return start.startsWith("DICM", 128)
    || NIFTI_MAGICS.some(([magic, offset]) => start.startsWith(magic, offset))
    || BARE_DICOM_STARTS.some((bytes) => start.startsWith(bytes));
}

/** Whether a drag brings files. */
export function hasFiles(event) {
  return event.dataTransfer?.types.includes("Files") ?? false;
}
