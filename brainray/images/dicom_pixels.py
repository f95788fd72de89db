"""Pixels of DICOM objects as grey values: the steps of PS3.3, C.11.

pydicom decodes the stored samples. The other steps are here, because pydicom takes rescaling from
the root of an object only, and enhanced objects have it in their functional groups:

1. stored samples, with unused bits cleared,
2. Modality LUT, or Rescale Slope and Intercept of the frame: :func:`decode_frame` stops here,
3. VOI LUT or window, to 8 bits: :func:`render_frame` only,
4. inversion, where the object shows low values bright,
5. padding, which is not part of the image, to the darkest value.

Classifiers with ``intensity="percentile"`` take the values after step 2, because windows differ
from slice to slice within a series. Classifiers with ``intensity="stored"`` take those of
:func:`render_frame`.
"""

import struct
from contextlib import suppress
from typing import Any, NamedTuple

import gdcm
import numpy as np
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder

from brainray.errors import RejectedImage
from brainray.images.dicom import PLUGINS, DicomImage, PixelFormat, reject
from brainray.images.dicom_file import (
    FunctionalGroups,
    call_safely,
    get_item,
    get_numbers,
    get_words,
)
from brainray.images.headers import (
    JPEG_FRAME_MARKERS,
    MAX_SCANS,
    corrupt,
    iterate_jpeg_segments,
    too_large,
    unsupported,
)
from brainray.images.intensity import render_percentiles, to_bytes
from brainray.images.slices import GreyRange

gdcm.Trace.WarningOff()  # it prints to standard error
gdcm.Trace.ErrorOff()

_RLE_LOSSLESS = "1.2.840.10008.1.2.5"
_JPEG_LS_FRAME = 0xF7
_JPEG_2000_START = b"\xff\x4f\xff\x51"  # start of codestream, then the marker of its size


class RenderedFrame(NamedTuple):
    """A frame for display."""

    pixels: NDArray[np.uint8]
    """Shape (rows, columns), 0 black to 255 white."""
    grey_range: GreyRange
    """Source of the range of grey values: the object's VOI LUT, its window, or, without either, the
    1st to the 99th percentile of the frame's own samples."""


def decode_frame(image: DicomImage, frame: int = 0) -> NDArray[np.float32]:
    """Decode one frame to grey values at full depth, after the modality transform.

    High values are bright: where the object shows low values bright, they are inverted within their
    range. Padding gets the lowest of the other values. The units are those of the modality
    transform; for MR they are not comparable across series.

    Raises
    ------
    RejectedImage
        The frame cannot be decoded, or is rejected in ``image.slices``.
    IndexError
        There is no such frame.
    """
    samples = _load_samples(image, frame)
    values = samples.values
    if not samples.shown.size:
        return np.zeros_like(values)
    low, high = samples.shown.min(), samples.shown.max()
    if samples.is_inverted:
        np.subtract(low + high, values, out=values)
    if samples.padding is not None:
        values[samples.padding] = low
    return values


def render_frame(image: DicomImage, frame: int = 0) -> RenderedFrame:
    """Decode one frame to 8 bits for display, through its VOI LUT or window.

    A VOI LUT has precedence over a window, and the first of several is used. A window of width 0,
    which the standard forbids, is ignored. A linear window narrower than 1 is read as LINEAR_EXACT:
    scanners that rescale to small numbers write such windows. Raises as :func:`decode_frame`.
    """
    samples = _load_samples(image, frame)
    pixels, grey_range = call_safely(_apply_voi, samples)
    if samples.is_inverted:
        np.invert(pixels, out=pixels)
    if samples.padding is not None:
        pixels[samples.padding] = 0
    return RenderedFrame(pixels, grey_range)


def decode_stored(image: DicomImage, frame: int = 0) -> NDArray[Any]:
    """Decode one frame to its stored samples, with unused bits cleared or filled with the sign.

    The type is an integer as wide as Bits Allocated. Frames that are not to be classified are
    decoded too.
    """
    layout = image.layout
    stored = call_safely(_decode_stored, image, frame)
    kind = np.dtype(f"{'i' if layout.is_signed else 'u'}{layout.bits_allocated // 8}")
    num_unused = layout.bits_allocated - layout.bits_stored
    samples: NDArray[Any] = stored.astype(kind)
    return samples << num_unused >> num_unused


class _Samples(NamedTuple):
    """One frame after the modality transform."""

    values: NDArray[np.float32]
    shown: NDArray[np.float32]
    """Those that are not padding."""
    padding: NDArray[np.bool_] | None
    is_inverted: bool
    groups: FunctionalGroups


def _load_samples(image: DicomImage, frame: int) -> _Samples:
    num_frames = len(image.slices)
    if not 0 <= frame < num_frames:
        raise IndexError(f"Expected a frame from 0 to {num_frames - 1}, got {frame}.")
    if rejection := image.slices[frame].rejection:
        raise reject(rejection.reason)  # a new exception: each keeps its traceback
    return call_safely(_decode_samples, image, frame)


def _decode_samples(image: DicomImage, frame: int) -> _Samples:
    stored = _decode_stored(image, frame)
    padding = _find_padding(stored, image.dataset, image.layout)
    groups = FunctionalGroups(image.dataset, frame)
    values = _apply_modality(stored, groups, image.layout)
    if not np.isfinite(values).all():
        raise corrupt("Rescale Slope or Intercept (0028,1052) gives infinite grey values.")
    shown = values if padding is None else values[~padding]
    return _Samples(values, shown, padding, _is_inverted(image.dataset), groups)


def _is_inverted(dataset: Dataset) -> bool:
    """Presentation LUT Shape precedes Photometric Interpretation (PS3.3, C.11.6.1.2)."""
    shape = get_words(dataset, "PresentationLUTShape")[:1]
    if shape in (("INVERSE",), ("IDENTITY",)):
        return shape == ("INVERSE",)
    return get_words(dataset, "PhotometricInterpretation")[:1] == ("MONOCHROME1",)


# ---- stored samples ------------------------------------------------------------------------------


def _decode_stored(image: DicomImage, frame: int) -> NDArray[Any]:
    """Return the stored samples of one frame, shape (rows, columns), an integer type."""
    syntax, layout = image.transfer_syntax, image.layout
    plugin = PLUGINS[syntax]
    source: bytes | memoryview
    if plugin is None:  # without later bytes, padded to an even length
        index, num_frames = frame, len(image.slices)
        num_bytes = num_frames * layout.rows * layout.columns * layout.bits_allocated // 8
        start = image.pixels.offset
        source = memoryview(image.content)[start : start + num_bytes + num_bytes % 2]
    else:
        index, num_frames = 0, 1
        encoded = image.compressed_frames[frame]
        if syntax != _RLE_LOSSLESS:
            encoded = _check_codestream(encoded, plugin, layout)
        source = encapsulate([encoded], has_bot=False)
    options: dict[str, Any] = {
        "number_of_frames": num_frames,
        "rows": layout.rows,
        "columns": layout.columns,
        "samples_per_pixel": 1,
        "bits_allocated": layout.bits_allocated,
        "bits_stored": layout.bits_stored,
        "pixel_representation": int(layout.is_signed),
        "photometric_interpretation": "MONOCHROME2",  # inversion comes last
        "pixel_keyword": "PixelData",
        "pixel_vr": image.pixels.vr,
        "allow_excess_frames": False,
    }
    samples: NDArray[Any] = get_decoder(syntax).as_array(
        source, index=index, raw=True, decoding_plugin=plugin or "", **options
    )[0]
    return samples


def _check_codestream(encoded: bytes, plugin: str, layout: PixelFormat) -> bytes:
    """Check a compressed frame's own header, and return the codestream alone.

    The DICOM header may say 16 x 16 where the frame says 60,000 x 60,000, and decoders allocate
    what the frame says.
    """
    read = _read_jpeg_2000_header if plugin == "pylibjpeg" else _read_jpeg_header
    rows, columns, bits, components, codestream = read(encoded)
    if (rows, columns, components) != (layout.rows, layout.columns, 1):
        raise corrupt(
            f"The header says {layout.columns} x {layout.rows} grey pixels, the compressed frame "
            f"has {columns} x {rows} with {components} components."
        )
    if bits > min(layout.bits_allocated, 8 if plugin == "pillow" else 16):
        raise unsupported(
            f"This compression with {bits}-bit samples is not supported. "
            "Convert the file to Explicit VR Little Endian."
        )
    return codestream


_Codestream = tuple[int, int, int, int, bytes]
"""Rows, columns, bits of a sample, components, and the codestream without a file format."""


def _read_jpeg_header(frame: bytes) -> _Codestream:
    """Read the frame header of JPEG (ITU-T T.81, B.2.2) or JPEG-LS (T.87, C.2.2)."""
    if frame.count(b"\xff\xda") > MAX_SCANS:
        raise too_large(f"A compressed frame has more than the {MAX_SCANS} JPEG scans allowed.")
    with suppress(RejectedImage):  # its reasons are those of a whole file
        for marker, at, _ in iterate_jpeg_segments(frame) if frame[:2] == b"\xff\xd8" else ():
            if marker in JPEG_FRAME_MARKERS or marker == _JPEG_LS_FRAME:
                bits, rows, columns, components = struct.unpack_from(">BHHB", frame, at + 2)
                return rows, columns, bits, components, frame
    raise corrupt("A compressed frame has no JPEG frame header.")


def _read_jpeg_2000_header(frame: bytes) -> _Codestream:
    """Read the size marker of JPEG 2000 or HTJ2K (ITU-T T.800, annex A.5.1)."""
    start = frame.find(_JPEG_2000_START)
    if start < 0:
        raise corrupt("A compressed frame has no JPEG 2000 size marker.")
    right, bottom, left, top = struct.unpack_from(">4L", frame, start + 8)
    components, depth, *steps = struct.unpack_from(">HBBB", frame, start + 40)
    if steps != [1, 1]:
        raise unsupported("JPEG 2000 with subsampled components is not supported.")
    bits = (depth & 0x7F) + 1  # the highest bit means signed samples
    return bottom - top, right - left, bits, components, frame[start:]


def _wrap(value: int, layout: PixelFormat) -> int:
    """Wrap a number to a sample: padding values have either sign, or more bits than a sample."""
    value &= (1 << layout.bits_stored) - 1
    if layout.is_signed and value >> (layout.bits_stored - 1):
        value -= 1 << layout.bits_stored
    return value


def _find_padding(
    stored: NDArray[Any], dataset: Dataset, layout: PixelFormat
) -> NDArray[np.bool_] | None:
    """Return a mask of padding (PS3.3, C.7.5.1.1.2); None where the header defines none."""
    values = get_numbers(dataset, "PixelPaddingValue", 1)
    if values is None:
        return None
    limits = get_numbers(dataset, "PixelPaddingRangeLimit", 1) or values
    ends = sorted(_wrap(int(value), layout) for value in (values[0], limits[0]))
    mask: NDArray[np.bool_] = (stored >= ends[0]) & (stored <= ends[1])
    return mask


# ---- modality and VOI ----------------------------------------------------------------------------


def _apply_modality(
    stored: NDArray[Any], groups: FunctionalGroups, layout: PixelFormat
) -> NDArray[np.float32]:
    lut = get_item(groups.root, "ModalityLUTSequence")
    if lut is not None:
        return _apply_lut(stored, lut, layout.is_signed)[0]
    values = stored.astype(np.float32)
    sequence = "PixelValueTransformationSequence"
    slope = groups.get_numbers(sequence, "RescaleSlope", 1)
    intercept = groups.get_numbers(sequence, "RescaleIntercept", 1)
    with np.errstate(over="ignore", invalid="ignore"):  # infinite values are rejected afterwards
        if slope is not None and slope[0] not in (0.0, 1.0):  # 0 would erase the image
            values *= np.float32(slope[0])
        if intercept is not None and intercept[0] != 0.0:
            values += np.float32(intercept[0])
    return values


def _apply_lut(
    values: NDArray[Any], item: Dataset, is_signed: bool
) -> tuple[NDArray[np.float32], int]:
    """Look values up in a table (PS3.3, C.11.1.1); return them, and the bits of an entry."""
    descriptor = get_numbers(item, "LUTDescriptor", 3)
    if descriptor is None:
        raise corrupt("LUT Descriptor (0028,3002) is missing.")
    num_entries, first, bits = (int(number) for number in descriptor)
    num_entries = num_entries or 2**16
    if is_signed and first >= 2**15:
        first -= 2**16
    raw = item.get_item("LUTData")  # pydicom would convert it to a list of numbers
    data = (raw.value or b"") if isinstance(raw, RawDataElement) else b""
    width = 1 if len(data) < 2 * num_entries else 2
    order = "<" if item.original_encoding[1] else ">"
    table = np.frombuffer(data, f"{order}u{width}", len(data) // width)
    if not 1 <= num_entries <= len(table) or not 1 <= bits <= 16:
        raise corrupt("LUT Data (0028,3006) does not fit its descriptor.")
    index = np.clip(np.rint(values) - first, 0, num_entries - 1).astype(np.intp)
    return table[:num_entries].astype(np.float32)[index], bits


def _apply_voi(samples: _Samples) -> tuple[NDArray[np.uint8], GreyRange]:
    values, groups = samples.values, samples.groups
    lut = get_item(groups.root, "VOILUTSequence")
    if lut is not None:
        # The first mapped value has the sign of the values.
        levels, bits = _apply_lut(values, lut, bool(values.min() < 0))
        return to_bytes(levels / (2.0**bits - 1)), "voi_lut"
    window = groups.find_window()
    if window is not None:
        centre, width, item = window
        function = "".join(get_words(item, "VOILUTFunction")[:1])
        return to_bytes(_apply_window(values, centre, width, function)), "window"
    if not samples.shown.size:
        return np.zeros(values.shape, np.uint8), "samples"
    return render_percentiles(values, samples.shown), "samples"


def _apply_window(
    values: NDArray[np.float32], centre: float, width: float, function: str
) -> NDArray[np.floating[Any]]:
    """Apply a window (PS3.3, C.11.2.1.2 and C.11.2.1.3); the range 0 to 1 is shown."""
    wide = values.astype(np.float64)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (wide - centre) / width, -700, 700)))
    if function == "LINEAR_EXACT" or width < 1:
        return (wide - centre) / width + 0.5
    if width == 1:
        return (wide > centre - 0.5).astype(np.float64)
    return (wide - (centre - 0.5)) / (width - 1) + 0.5
