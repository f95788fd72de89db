"""What becomes of the DICOM and NIfTI files that pydicom, pydicom-data and nibabel bring along.

::

    python benchmarks/dicom_files.py TABLE.md

Opens every file as the commands do, decodes each of its slices, and writes a table: file, transfer
syntax, answer. pydicom-data is found through its entry point; nothing is fetched.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import nibabel
import pydicom
from pydicom.uid import UID

from brainray.errors import RejectedImage
from brainray.images.slices import open_file, open_slice
from brainray.recipes import preprocess

PREPROCESSING = preprocess(224)


def list_files() -> Iterator[tuple[str, Path]]:
    """Yield the package and the path of every test file."""
    folders = {"pydicom": [Path(pydicom.__file__).parent / "data" / "test_files"]}
    sources = entry_points(group="pydicom.data.external_sources")
    folders["pydicom-data"] = [Path(source.load()().data_path) for source in sources]
    nibabel_folder = Path(nibabel.__file__).parent
    folders["nibabel"] = [nibabel_folder / "tests" / "data", nibabel_folder / "nicom/tests/data"]
    for package, paths in folders.items():
        for folder in paths:
            yield from ((package, path) for path in sorted(folder.rglob("*")) if path.is_file())


def find_syntax(content: bytes) -> str:
    """Return the name of a file's transfer syntax; a dash where it has no such element."""
    if content[128:132] != b"DICM":
        return "–"
    at = content.find(b"\x02\x00\x10\x00UI")
    length = int.from_bytes(content[at + 6 : at + 8], "little")
    uid = UID(content[at + 8 : at + 8 + length].decode("ascii", "replace").strip("\0 "))
    return "–" if at < 0 else uid.name


def describe_answers(content: bytes) -> str:
    """Return how many slices are opened and rejected, or why the whole file is rejected."""
    counts: Counter[str] = Counter()
    try:
        file = open_file(content)
    except RejectedImage as rejection:
        return f"`{rejection.reason}`"
    for index in range(len(file.slices)):
        try:
            open_slice(file, index, PREPROCESSING)
            counts["opened"] += 1
        except RejectedImage as rejection:
            counts[rejection.reason] += 1
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))


def main() -> None:
    """Write the table."""
    lines = [
        "| package | file | transfer syntax | answer | ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    totals: Counter[str] = Counter()
    for package, path in list_files():
        content = path.read_bytes()
        start = time.perf_counter()
        answer = describe_answers(content)
        spent_ms = (time.perf_counter() - start) * 1000
        totals["opened" if "opened" in answer else answer] += 1
        syntax = find_syntax(content)
        lines.append(f"| {package} | {path.name} | {syntax} | {answer} | {spent_ms:.0f} |")
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n")
    print(sum(totals.values()), "files:", dict(totals.most_common()))


if __name__ == "__main__":
    main()
