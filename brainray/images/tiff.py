"""TIFF headers: read the tags that describe the picture, and write a directory of these alone.

Pillow would parse every other tag, warn where one is damaged, leave missing strips black, and read
some layouts wrongly without an error.
"""

import struct

from brainray.errors import RejectedImage
from brainray.images.headers import MAX_PARTS, Header, check_size, corrupt, truncated, unsupported

_TYPES = {1: "B", 3: "H", 4: "L", 7: "B", 16: "Q"}  # BYTE, SHORT, LONG, UNDEFINED, LONG8
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIP_OFFSETS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_BYTES = 273, 274, 277, 278, 279
_PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 284, 322, 323, 324, 325
_EXTRA, _SAMPLE_FORMAT, _JPEG_TABLES = 338, 339, 347
# FillOrder, T4Options, T6Options, Predictor.
_SINGLE = frozenset(
    {_WIDTH, _HEIGHT, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _ROWS, _PLANAR}
    | {_TILE_WIDTH, _TILE_HEIGHT, 266, 292, 293, 317}
)
# ColorMap, YCbCrSubSampling.
_ARRAYS = frozenset(
    {_BITS, _STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES, _EXTRA, _SAMPLE_FORMAT}
    | {_JPEG_TABLES, 320, 530}
)
_Tags = dict[int, tuple[int, ...]]


def _read_directory(data: bytes) -> tuple[str, _Tags]:
    """Read the byte order and the known tags of a TIFF or BigTIFF (TIFF 6.0, section 2)."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    word, entry_bytes, inline = ("Q", 20, 8) if big else ("L", 12, 4)
    (at,) = struct.unpack_from(order + word, data, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    if count > 65535:
        raise corrupt(f"The TIFF directory has {count} entries.")
    at += 8 if big else 2
    tags: _Tags = {}
    for entry in range(at, at + entry_bytes * count, entry_bytes):
        tag, kind, number = struct.unpack_from(f"{order}HH{word}", data, entry)
        if tag not in _SINGLE | _ARRAYS or tag in tags:
            continue
        code = _TYPES.get(kind)
        if code is None or not number:
            raise corrupt(f"TIFF tag {tag} is of kind {kind} with {number} values.")
        if tag in _SINGLE:
            number = 1
        elif number > MAX_PARTS:
            raise corrupt(f"TIFF tag {tag} has {number} values.")
        start = entry + entry_bytes - inline
        if struct.calcsize("=" + code) * number > inline:
            (start,) = struct.unpack_from(order + word, data, start)
        tags[tag] = struct.unpack_from(f"{order}{number}{code}", data, start)
    (following,) = struct.unpack_from(order + word, data, at + entry_bytes * count)
    if following >= len(data):
        raise truncated("The TIFF file's next page is beyond its end.")
    if following:
        raise RejectedImage("multi_frame", "The TIFF file has several pages. Send one page alone.")
    return order, tags


def _write(data: bytes, order: str, tags: _Tags) -> bytes:
    """Append a directory of `tags` to a TIFF's bytes and point its header there."""
    pad = b"\0" * (len(data) % 2)
    directory = len(data) + len(pad)
    spill_at = directory + 2 + 12 * len(tags) + 4
    entries, spill = [], b""
    for tag, values in sorted(tags.items()):
        code = "B" if tag == _JPEG_TABLES else "H" if max(values) < 65536 else "L"
        kind = {"B": 7, "H": 3, "L": 4}[code]
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(packed) > 4:
            where = struct.pack(order + "L", spill_at + len(spill))
            spill += packed + b"\0" * (len(packed) % 2)
            packed = where
        entries.append(struct.pack(order + "HHL4s", tag, kind, len(values), packed))
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HL", 42, directory)
    count = struct.pack(order + "H", len(tags))
    return b"".join([header, memoryview(data)[8:], pad, count, *entries, b"\0\0\0\0", spill])


def _check_layout(tags: _Tags) -> None:
    """Reject samples whose range is undefined, and layouts that Pillow reads wrongly."""
    bits, planar = tags.get(_BITS, (1,)), tags.get(_PLANAR, (1,))[0]
    photometric = tags.get(_PHOTOMETRIC, (0,))[0]
    if set(tags.get(_SAMPLE_FORMAT, (1,))) != {1} or len(set(bits)) > 1 or bits[0] > 16:
        raise unsupported(
            "TIFF samples must be unsigned integers of at most 16 bits: the range of "
            f"{bits[0]}-bit, signed and floating samples is not defined. Save as 16-bit PNG."
        )
    if bits[0] not in (1, 2, 4, 8, 16) or photometric not in (0, 1, 2, 3, 5, 6):
        raise unsupported(f"TIFF with {bits[0]}-bit samples, colours {photometric}.")
    if photometric == 6 and tags.get(_COMPRESSION, (1,))[0] != 7:
        raise unsupported("TIFF in YCbCr is supported with JPEG compression only.")
    if bits[0] == 16 and (photometric not in (0, 1, 2) or planar == 2 or 1 in tags.get(_EXTRA, ())):
        raise unsupported("16-bit TIFF must be grey, RGB or RGBA, interleaved. Save as PNG.")


def _check_parts(tags: _Tags, file_bytes: int) -> None:
    """Check that all strips or tiles are in the file; leave in `tags` only those that are used."""
    width, height = tags[_WIDTH][0], tags[_HEIGHT][0]
    num_planes = tags.get(_SAMPLES, (1,))[0] if tags.get(_PLANAR, (1,))[0] == 2 else 1
    if _STRIP_OFFSETS in tags:
        for tag in (_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES):
            tags.pop(tag, None)
        offsets, sizes, across = _STRIP_OFFSETS, _STRIP_BYTES, width
        down = min(tags.get(_ROWS, (height,))[0], height)
        tags[_ROWS] = (down,)
    elif _TILE_OFFSETS in tags and _TILE_WIDTH in tags and _TILE_HEIGHT in tags:
        offsets, sizes = _TILE_OFFSETS, _TILE_BYTES
        across, down = tags[_TILE_WIDTH][0], tags[_TILE_HEIGHT][0]
        # Tiles are padded to multiples of 16, not to more than that (TIFF 6.0, section 15).
        if across > max(2 * width, 1024) or down > max(2 * height, 1024):
            raise corrupt(f"The TIFF file's tiles have {across} x {down} pixels.")
    else:
        raise corrupt("The TIFF directory lists neither strips nor tiles.")
    if not across or not down or not 1 <= num_planes <= 6:
        raise corrupt(
            f"The TIFF file's strips have {across} x {down} pixels in {num_planes} planes."
        )
    expected = -(-width // across) * -(-height // down) * num_planes
    if expected > MAX_PARTS or len(tags[offsets]) < expected:
        raise corrupt(
            f"The TIFF file lists {len(tags[offsets])} strips or tiles, expected {expected}."
        )
    tags[offsets] = tags[offsets][:expected]
    if sizes in tags:
        if len(tags[sizes]) < expected:
            raise corrupt("The TIFF file lacks the sizes of some strips.")
        tags[sizes] = tags[sizes][:expected]
    ends = zip(tags[offsets], tags.get(sizes, (0,) * expected), strict=True)
    if max(start + length for start, length in ends) > file_bytes:
        raise truncated("The TIFF file lacks some of its pixels.")


def read_tiff(data: bytes, max_pixels: int) -> Header:
    """Read the header of a TIFF with one image; see :mod:`brainray.images.headers`."""
    order, tags = _read_directory(data)
    if _WIDTH not in tags or _HEIGHT not in tags:
        raise corrupt("The TIFF directory lacks the size of its image.")
    size = tags[_WIDTH][0], tags[_HEIGHT][0]
    check_size("TIFF", size, max_pixels)
    _check_layout(tags)
    _check_parts(tags, len(data))
    orientation = tags.pop(_ORIENTATION, (1,))[0]
    bits = tags.get(_BITS, (1,))[0]
    return Header(
        format="TIFF",
        size=size,
        payload=_write(data, order, tags),
        orientation=orientation if 1 <= orientation <= 8 else 1,
        bits=bits,
        white_is_zero=bits == 16 and tags.get(_PHOTOMETRIC, (0,))[0] == 0,
    )
