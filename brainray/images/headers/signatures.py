"""What kind of file: the first bytes, and a word for the formats that are not read here."""

from brainray.errors import RejectedImage

ACCEPTED = "Expected a DICOM, NIfTI, PNG, JPEG, BMP, GIF, TIFF or WebP file"

_EXPORT = "Export the slice as PNG or JPEG."
_SAVE = "Save it as PNG or JPEG."
# Of NIfTI-1 in one file and in two, of NIfTI-2, and of gzip (offset, magic).
_NIFTI = ((344, b"n+1\0"), (344, b"ni1\0"), (4, b"n+2\0\r\n\x1a\n"), (0, b"\x1f\x8b"))
# (offset, magic, what it is): ISO/IEC 14496-12 section 4.3; the others as in the file(1) database.
_UNSUPPORTED: tuple[tuple[int, bytes, str], ...] = (
    (0, b"%PDF-", "a PDF document. Extract the image from it."),
    (0, b"PK\x03\x04", "a ZIP archive. Unpack it."),
    (4, b"ftyp", f"an HEIC, AVIF or MP4 file. {_SAVE}"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", f"a JPEG 2000 image. {_SAVE}"),
    (0, b"\xff\x4f\xff\x51", f"a JPEG 2000 codestream. {_SAVE}"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", f"a JPEG XL image. {_SAVE}"),
    (0, b"\xff\x0a", f"a JPEG XL codestream. {_SAVE}"),
    (0, b"8BPS", f"a Photoshop document. {_SAVE}"),
    (0, b"\0\0\x01\0", f"a Windows icon. {_SAVE}"),
)


def is_dicom(start: bytes) -> bool:
    """Tell from a file's first 132 bytes whether it is to be read as DICOM.

    Part 10 files have ``DICM`` after 128 bytes of any content. Files without this preamble are
    recognised by their first element, which is in group 2 or group 8.
    """
    return start[128:132] == b"DICM" or start[:2] in (b"\x02\x00", b"\x08\x00", b"\x00\x08")


def is_nifti(start: bytes) -> bool:
    """Tell from a file's first 348 bytes whether it is to be read as NIfTI, or as gzipped NIfTI."""
    return any(start.startswith(magic, offset) for offset, magic in _NIFTI)


def recognise(data: bytes) -> str:
    """Name the format of a picture by its first bytes, or raise RejectedImage."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    for offset, magic, what in _UNSUPPORTED:
        if data.startswith(magic, offset):
            raise RejectedImage("unsupported", f"{ACCEPTED}, got {what}")
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    # Two letters begin many texts; a BMP's third header word is zero (reserved).
    if data.startswith(b"BM") and data[6:10] == b"\0\0\0\0":
        return "BMP"
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<svg", b"<?xml", b"<!doctype svg")):
        raise RejectedImage("unsupported", f"{ACCEPTED}, got an SVG or XML document. {_EXPORT}")
    # Not which bytes: a text may begin with a name.
    raise RejectedImage("not_an_image", f"{ACCEPTED}, got bytes of another format.")
