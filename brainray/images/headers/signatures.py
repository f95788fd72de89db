"""What kind of file: the first bytes, and a word for the formats that are not read here."""

from brainray.errors import RejectedImage

ACCEPTED = "Expected a DICOM, NIfTI, PNG, JPEG, BMP, GIF, TIFF or WebP file"

_EXPORT = "Export the slice as PNG or JPEG."
_SAVE = "Save it as PNG or JPEG."
# (offset, magic, what it is). Offsets and magics: DICOM PS3.10 section 7.1; NIfTI-1 and NIfTI-2
# headers; ISO/IEC 14496-12 section 4.3; the others as in the file(1) database.
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


def recognise(data: bytes) -> str:
    """Name the format by its first bytes, or raise RejectedImage."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    # DICOM lets any 128 bytes come first, so it is asked before the short magics of TIFF and BMP.
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
    raise RejectedImage("not_an_image", f"{ACCEPTED}, got bytes that begin {data[:8].hex(' ')}.")
