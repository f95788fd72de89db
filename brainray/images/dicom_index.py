"""DICOMDIR: the index of a medium, and the files that it references (PS3.3, annex F)."""

from io import BytesIO

from pydicom.dataset import Dataset
from pydicom.filereader import read_partial
from pydicom.tag import Tag

from brainray.errors import RejectedImage
from brainray.images.dicom_file import (
    MAX_ITEMS,
    UNDEFINED_LENGTH,
    call_safely,
    get_value,
)

_ITEM_TAG = b"\xfe\xff\x00\xe0"


def list_references(content: bytes) -> list[tuple[str, ...]]:
    """Return the files that a DICOMDIR references, in its order, each once.

    Parameters
    ----------
    content : bytes
        The whole file.

    Returns
    -------
    list of tuple of str
        Names of the folders below that of the DICOMDIR, then that of the file.

    Raises
    ------
    RejectedImage
        It is no DICOMDIR, or references what is not below its folder. No message holds a value.
    """
    return call_safely(_list_references, content)


def _list_references(content: bytes) -> list[tuple[str, ...]]:
    if content.count(_ITEM_TAG) > MAX_ITEMS:
        raise RejectedImage("too_large", f"It has more than the {MAX_ITEMS:,} records allowed.")
    file = BytesIO(content)

    def check_length(_tag: int, _vr: str | None, length: int) -> bool:
        if length != UNDEFINED_LENGTH and file.tell() + length > len(content):
            raise RejectedImage("truncated", "It ends inside an element.")
        return False

    dataset = read_partial(
        file, check_length, force=True, specific_tags=[Tag("DirectoryRecordSequence")]
    )
    records = get_value(dataset, "DirectoryRecordSequence")
    if records is None:
        raise RejectedImage("not_an_image", "Expected Directory Records (0004,1220), found none.")
    found = dict.fromkeys(filter(None, map(_read_reference, records)))
    return list(found)


def _read_reference(record: Dataset) -> tuple[str, ...]:
    value = get_value(record, "ReferencedFileID")
    if value is None:
        return ()
    parts = (value,) if isinstance(value, str) else tuple(map(str, value))
    if any(not part or "/" in part or "\0" in part or set(part) <= {"."} for part in parts):
        raise RejectedImage(
            "corrupt", "A Referenced File ID (0004,1500) is not the name of a file below it."
        )
    return parts
