"""Open scan files of every format (pictures, DICOM, NIfTI) and decode their slices.

A picture and a classic DICOM object have one slice, named as the file. An enhanced DICOM object and
a NIfTI volume have many, named ``FILE#frame=N``, counted from 0.

The libraries for DICOM and NIfTI are imported when the first such file is opened. Importing them
takes longer than decoding a hundred pictures.
"""

import re
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from brainray.errors import RejectedImage
from brainray.images.decode import DecodeLimits, decode_image, decode_samples
from brainray.images.headers import is_dicom, is_nifti
from brainray.images.intensity import render_percentiles, to_display
from brainray.images.preprocess import OpenedScan, Preprocessing, open_samples

Format = Literal["picture", "dicom", "nifti"]
Plane = Literal["axial", "coronal", "sagittal"]
GreyRange = Literal["stored", "percentile", "voi_lut", "window", "samples"]
"""Source of the grey range of the network's input. Classifiers with ``intensity="percentile"``:
`percentile`, of the slice's own samples at full depth. Others: the `stored` range of a picture's
sample type, the DICOM object's `voi_lut` or `window`, or without them the slice's `samples`."""

LITTLE_TISSUE = "little_tissue"
"""Reason code of a volume's slices above and below the head."""

_FRAME = re.compile(r"(.*)#frame=(0|[1-9][0-9]*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How scan files are read."""

    limits: DecodeLimits = DecodeLimits()
    """The largest files and images that are opened."""
    plane: Plane = "axial"
    """Plane of the slices that a NIfTI volume is cut into."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceInfo:
    """Metadata of one slice. Without the key nothing here identifies a person."""

    frame: int | None = None
    """Index within the file, from 0; None where the file has one slice."""
    rejection: RejectedImage | None = None
    """Why this slice is not classified; else None."""
    sop_instance: str | None = None
    """Keyed hash of the DICOM identifier, as the three below; None without a key. For a NIfTI
    volume this and `series` are the keyed hash of its content."""
    series: str | None = None
    study: str | None = None
    patient: str | None = None
    plane: Plane | None = None
    position_mm: float | None = None
    """Position along the slice's normal; orders the slices of a series."""
    orientation: tuple[float, ...] | None = None
    """Direction cosines of a row, then of a column, in the patient's coordinates."""
    spacing_mm: tuple[float, float] | None = None
    """Between rows, then between columns."""
    flags: tuple[str, ...] = ()
    """What is unknown or unusual; docs/dicom.md lists the flags."""


class ScanFile(Protocol):
    """An opened file: its header is read, its slices can be decoded."""

    @property
    def format(self) -> Format:
        """The format of the file."""

    @property
    def slices(self) -> tuple[SliceInfo, ...]:
        """All slices in the order of the file, rejected ones included."""

    def decode(self, index: int) -> NDArray[Any]:
        """Decode slice number ``index`` of :attr:`slices` to grey samples at full depth.

        Raises RejectedImage where the slice cannot be decoded, or is not classified.
        """

    def render(self, index: int) -> tuple[NDArray[np.uint8], GreyRange]:
        """As :meth:`decode`, to 8 bits for display; return the source of the grey range too."""


def open_file(
    content: bytes, options: ReadOptions | None = None, *, key: bytes | None = None
) -> ScanFile:
    """Recognise a file by its bytes, not its name, and read its header.

    `key`, of at least 16 bytes, is the key of the identifiers' hashes; without it identifiers are
    None. RejectedImage is raised where the file as a whole cannot be classified; its ``reason`` is
    a key of :data:`brainray.images.decode.REJECTION_REASONS`.
    """
    options = options or ReadOptions()
    kind = recognise_format(content)
    if kind == "dicom":
        return _Dicom(content, options, key)
    if kind == "nifti":
        return _Nifti(content, options, key)
    return _Picture(content, options.limits)


def recognise_format(content: bytes) -> Format:
    """Recognise the format by the first bytes; unknown ones count as pictures."""
    start = content[:352]
    return "dicom" if is_dicom(start) else "nifti" if is_nifti(start) else "picture"


@dataclass(frozen=True, slots=True)
class OpenedSlice:
    """A decoded slice, its network input, and its metadata."""

    scan: OpenedScan
    info: SliceInfo
    grey_range: GreyRange


def open_slice(
    file: ScanFile,
    index: int,
    preprocessing: Preprocessing,
    decoded: NDArray[Any] | None = None,
) -> OpenedSlice:
    """Decode one slice of a file and make the network's input of it.

    With ``intensity="percentile"`` the input is made of the samples after the modality transform.
    So a slice gives the same input as DICOM, NIfTI or 16-bit picture, with any window. With
    ``intensity="stored"`` it is made of the displayed grey levels.

    `decoded` is the result of ``file.decode(index)``, where it is available. RejectedImage is
    raised as by :meth:`ScanFile.decode`.
    """
    grey_range: GreyRange = "percentile" if preprocessing.intensity == "percentile" else "stored"
    if grey_range == "stored" and file.format != "picture":
        samples, grey_range = file.render(index)
    else:
        samples = file.decode(index) if decoded is None else decoded
    return OpenedSlice(open_samples(samples, preprocessing), file.slices[index], grey_range)


def show_slice(file: ScanFile, index: int) -> NDArray[np.uint8]:
    """Decode one slice to grey levels for display, shape (height, width).

    A DICOM object is shown through its window, a 16-bit picture by its own range: many have 12 bits
    and would be nearly black.
    """
    if file.format == "picture":
        return to_display(file.decode(index))
    return file.render(index)[0]


def find_slice(file: ScanFile, frame: int | None) -> int:
    """Return the index in ``file.slices`` of a frame; None is the only slice of a file.

    Rejects None for several slices as ``multi_frame``, and a slice that is not there as
    ``missing``.
    """
    count = len(file.slices)
    if frame is None and count > 1:
        raise RejectedImage(
            "multi_frame", f"The file has {count} slices. Give the number of one: FILE#frame=N."
        )
    if not 0 <= (index := frame or 0) < count:
        raise RejectedImage("missing", f"The file has {count} slices, but no frame {index}.")
    return index


# ---- names ---------------------------------------------------------------------------------------


def name_slice(scan_uri: str, frame: int | None) -> str:
    """Return the name of a slice: its file, and its number where the file has several."""
    return scan_uri if frame is None else f"{scan_uri}#frame={frame}"


def split_name(slice_uri: str) -> tuple[str, int | None]:
    """Split a name of :func:`name_slice` into the file and the number."""
    match = _FRAME.fullmatch(slice_uri)
    return (match[1], int(match[2])) if match else (slice_uri, None)


# ---- formats -------------------------------------------------------------------------------------


class _Picture:
    """A picture. It is decoded on demand, since it has no metadata beside its pixels."""

    format: Literal["picture"] = "picture"
    slices = (SliceInfo(),)

    def __init__(self, content: bytes, limits: DecodeLimits) -> None:
        self._content, self._limits = content, limits

    def decode(self, index: int) -> NDArray[Any]:
        assert index == 0, index
        return decode_samples(self._content, self._limits)

    def render(self, index: int) -> tuple[NDArray[np.uint8], GreyRange]:
        assert index == 0, index
        return decode_image(self._content, self._limits), "stored"


class _Dicom:
    """A DICOM object."""

    format: Literal["dicom"] = "dicom"

    def __init__(self, content: bytes, options: ReadOptions, key: bytes | None) -> None:
        from brainray.images.dicom import open_dicom

        self._image = open_dicom(content, key=key, limits=options.limits)
        self.slices = self._image.slices

    def decode(self, index: int) -> NDArray[np.float32]:
        from brainray.images.dicom_pixels import decode_frame

        return decode_frame(self._image, index)

    def render(self, index: int) -> tuple[NDArray[np.uint8], GreyRange]:
        from brainray.images.dicom_pixels import render_frame

        return render_frame(self._image, index)


class _Nifti:
    """A NIfTI volume as slices of one plane. Slices with little tissue are rejected."""

    format: Literal["nifti"] = "nifti"

    def __init__(self, content: bytes, options: ReadOptions, key: bytes | None) -> None:
        from brainray.images.nifti import read_nifti

        self._volume = volume = read_nifti(content, plane=options.plane, limits=options.limits)
        is_axial = volume.plane == "axial"
        info = SliceInfo(
            plane=None if "orientation_unknown" in volume.flags else volume.plane,
            spacing_mm=volume.spacing_mm,
            flags=volume.flags if is_axial else tuple(sorted((*volume.flags, "non_axial"))),
        )
        if key is not None:
            from brainray.images.dicom import hash_identifier

            identifier = hash_identifier(sha256(content).hexdigest(), key)
            info = replace(info, series=identifier, sop_instance=identifier)
        kept, thickness = set(volume.kept), volume.thickness_mm
        self.slices = tuple(
            replace(
                info,
                frame=index,
                position_mm=None if thickness is None else index * thickness,
                rejection=None if index in kept else _reject_little_tissue(),
            )
            for index in range(volume.num_slices)
        )

    def decode(self, index: int) -> NDArray[np.float32]:
        if self.slices[index].rejection:
            raise _reject_little_tissue()  # a new exception: each keeps its traceback
        return self._volume.get_slice(index)

    def render(self, index: int) -> tuple[NDArray[np.uint8], GreyRange]:
        return render_percentiles(self.decode(index)), "samples"


def _reject_little_tissue() -> RejectedImage:
    return RejectedImage(
        LITTLE_TISSUE, "The slice has little tissue. It lies above or below the head."
    )
