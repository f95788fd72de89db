"""One scan file to its slices: the one reader of pictures, DICOM objects and NIfTI volumes.

A picture and a classic DICOM object have one slice, whose name is that of the file. An enhanced
DICOM object and a NIfTI volume have many; each is named ``FILE#frame=N``, counted from 0.

The libraries for DICOM and NIfTI are imported when the first such file is opened: pictures need
none of them, and importing them takes longer than decoding a hundred pictures.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from brainray.errors import RejectedImage
from brainray.images.decode import DecodeLimits, decode_image, decode_samples
from brainray.images.headers.signatures import is_dicom, is_nifti
from brainray.images.intensity import to_display
from brainray.images.preprocess import OpenedScan, Preprocessing, open_samples

if TYPE_CHECKING:
    from brainray.images.dicom import DicomImage
    from brainray.images.nifti import Volume

Format = Literal["picture", "dicom", "nifti"]
Plane = Literal["axial", "coronal", "sagittal"]
GreyRange = Literal["stored", "percentile", "voi_lut", "window", "samples"]
"""Where the grey range of the network's input came from: the `stored` range of the samples' type;
the `percentile` rule of the classifier, on the slice's own samples at full depth; for classifiers
that take grey levels as they are stored, the DICOM object's `voi_lut` or `window`, or where it has
neither, the range of the slice's `samples`."""

LITTLE_TISSUE = "little_tissue"
"""Reason of a volume's slices above and below the head."""

_FRAME = re.compile(r"(.*)#frame=(0|[1-9][0-9]*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How scan files are read."""

    limits: DecodeLimits = DecodeLimits()
    """What is too large to open."""
    plane: Plane = "axial"
    """Plane of the slices that a NIfTI volume is cut into."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceInfo:
    """What a file says of one of its slices; nothing in it identifies a person without the key."""

    frame: int | None = None
    """Index within the file, from 0; None where the file has one slice."""
    rejection: RejectedImage | None = None
    """Why this slice is not to be classified; None if it may be."""
    sop_instance: str | None = None
    """Keyed hash of the DICOM object's UID, as of the three below; None without a key. Of a NIfTI
    volume, the keyed hash of its content, here and as the series."""
    series: str | None = None
    study: str | None = None
    patient: str | None = None
    plane: Plane | None = None
    position_mm: float | None = None
    """Along the slice's normal: slices of a series are ordered by it."""
    orientation: tuple[float, ...] | None = None
    """Direction cosines of a row, then of a column, in the patient's coordinates."""
    spacing_mm: tuple[float, float] | None = None
    """Between rows, then between columns."""
    flags: tuple[str, ...] = ()
    """What is unknown or unusual; docs/dicom.md has the list."""


class ScanFile(Protocol):
    """A file whose header was read, and whose slices can be decoded."""

    @property
    def format(self) -> Format:
        """What the bytes are."""

    @property
    def slices(self) -> tuple[SliceInfo, ...]:
        """In the order of the file, those that are not to be classified included."""

    def decode(self, index: int) -> NDArray[Any]:
        """Decode slice number ``index`` of :attr:`slices` to grey samples at full depth.

        Raises
        ------
        RejectedImage
            It cannot be decoded, or is not to be classified.
        """

    def render(self, index: int) -> tuple[NDArray[np.uint8], GreyRange]:
        """Decode a slice to 8 bits for display, and say where the grey range came from.

        Raises
        ------
        RejectedImage
            As :meth:`decode`.
        """


def open_file(
    content: bytes, options: ReadOptions | None = None, *, key: bytes | None = None
) -> ScanFile:
    """Recognise a file by its bytes, whatever its name, and read its header.

    Parameters
    ----------
    content : bytes
        The whole file.
    options : ReadOptions, optional
    key : bytes, optional
        Key of the identifiers' hashes, at least 16 bytes; without it identifiers are None.

    Raises
    ------
    RejectedImage
        The file as a whole cannot be classified; ``reason`` is a key of
        :data:`brainray.images.decode.REJECTION_REASONS`.
    """
    options = options or ReadOptions()
    kind = recognise_format(content)
    if kind == "dicom":
        return _Dicom(content, options, key)
    if kind == "nifti":
        return _Nifti(content, options, key)
    return _Picture(content, options)


def recognise_format(content: bytes) -> Format:
    """Tell by its first bytes how a file is read; what is unknown is left to the pictures."""
    start = content[:352]
    if is_dicom(start):
        return "dicom"
    if is_nifti(start):
        return "nifti"
    return "picture"


def open_slice(
    file: ScanFile,
    index: int,
    preprocessing: Preprocessing,
    decoded: NDArray[Any] | None = None,
) -> "OpenedSlice":
    """Decode one slice of a file and make the network's input of it.

    Percentiles are taken from the samples after the modality transform, so that a slice gives the
    same input alone, within its series, as DICOM, NIfTI or picture, whatever its window. A picture
    keeps its depth: where grey levels are taken as they are stored, they are those of its file.

    Parameters
    ----------
    file : ScanFile
        From :func:`open_file`.
    index : int
        Of the slice in ``file.slices``.
    preprocessing : Preprocessing
        Of the classifier.
    decoded : ndarray, optional
        What ``file.decode(index)`` gave, where it was called already.

    Raises
    ------
    RejectedImage
        It cannot be decoded, or is not to be classified.
    """
    grey_range: GreyRange = "percentile" if preprocessing.intensity == "percentile" else "stored"
    if grey_range == "stored" and file.format != "picture":
        samples, grey_range = file.render(index)
    else:
        samples = file.decode(index) if decoded is None else decoded
    return OpenedSlice(open_samples(samples, preprocessing), file.slices[index], grey_range)


def show_slice(file: ScanFile, index: int) -> NDArray[np.uint8]:
    """Decode one slice to grey levels for a person to look at, shape (height, width).

    A DICOM object is shown through its own window; a picture of 16 bits by its own range, since
    many hold 12 bits, which would be nearly black.

    Raises
    ------
    RejectedImage
        It cannot be decoded, or is not to be classified.
    """
    if file.format == "picture":
        return to_display(file.decode(index))
    return file.render(index)[0]


def find_slice(file: ScanFile, frame: int | None) -> int:
    """Return the index of a slice in ``file.slices``, by its number within the file.

    Parameters
    ----------
    file : ScanFile
    frame : int or None
        None for the only slice of a file with one.

    Raises
    ------
    RejectedImage
        ``multi_frame``: the file has several, and none is named. ``missing``: it has no such slice.
    """
    count = len(file.slices)
    if frame is None and count > 1:
        raise RejectedImage(
            "multi_frame", f"The file has {count} slices, and none is named. Give its number."
        )
    if not 0 <= (index := frame or 0) < count:
        raise RejectedImage("missing", f"No slice {index} in this file: it has {count}.")
    return index


@dataclass(frozen=True, slots=True)
class OpenedSlice:
    """A slice, what the network sees of it, and what its file says of it."""

    scan: OpenedScan
    info: SliceInfo
    grey_range: GreyRange


def open_slices(
    content: bytes,
    preprocessing: Preprocessing,
    options: ReadOptions | None = None,
    *,
    key: bytes | None = None,
) -> Iterator[OpenedSlice | tuple[SliceInfo, RejectedImage]]:
    """Yield every slice of a file in its order, opened, or with the reason why it is rejected.

    Raises
    ------
    RejectedImage
        The file as a whole cannot be classified.
    """
    file = open_file(content, options, key=key)
    for index, info in enumerate(file.slices):
        try:
            yield open_slice(file, index, preprocessing)
        except RejectedImage as rejection:
            if info.frame is None:
                raise
            yield info, rejection


# ---- names ---------------------------------------------------------------------------------------


def name_slice(scan_uri: str, frame: int | None) -> str:
    """Return the name of a slice: that of its file, and its number where the file has several."""
    return scan_uri if frame is None else f"{scan_uri}#frame={frame}"


def split_name(slice_uri: str) -> tuple[str, int | None]:
    """Return the file and the number that :func:`name_slice` made a name of."""
    match = _FRAME.fullmatch(slice_uri)
    return (match[1], int(match[2])) if match else (slice_uri, None)


# ---- formats -------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Picture:
    """A picture: decoded when it is asked for, since its header says nothing beside its pixels."""

    content: bytes = field(repr=False)
    options: ReadOptions
    format: Literal["picture"] = field(default="picture", init=False)
    slices: tuple[SliceInfo, ...] = field(default=(SliceInfo(),), init=False)

    def decode(self, index: int) -> NDArray[Any]:
        assert index == 0, index
        return decode_samples(self.content, self.options.limits)

    def render(self, index: int) -> tuple[NDArray[np.uint8], GreyRange]:
        assert index == 0, index
        return decode_image(self.content, self.options.limits), "stored"


class _Dicom:
    """A DICOM object."""

    format: Literal["dicom"] = "dicom"

    def __init__(self, content: bytes, options: ReadOptions, key: bytes | None) -> None:
        from brainray.images.dicom import open_dicom

        self._image: DicomImage = open_dicom(content, key=key, limits=options.limits)
        self.slices = tuple(_list_frames(self._image))

    def decode(self, index: int) -> NDArray[np.float32]:
        from brainray.images.dicom_pixels import decode_frame

        return decode_frame(self._image, index)

    def render(self, index: int) -> tuple[NDArray[np.uint8], GreyRange]:
        from brainray.images.dicom_pixels import render_frame

        rendered = render_frame(self._image, index)
        return rendered.pixels, rendered.grey_range


def _list_frames(image: "DicomImage") -> Iterator[SliceInfo]:
    from brainray.images.dicom_rules import reject

    instance = image.instance
    for number, frame in enumerate(instance.frames):
        yield SliceInfo(
            frame=number if len(instance.frames) > 1 else None,
            rejection=reject(frame.rejection) if frame.rejection else None,
            sop_instance=instance.sop_instance,
            series=instance.series,
            study=instance.study,
            patient=instance.patient,
            plane=frame.plane,
            position_mm=frame.position_mm,
            orientation=frame.orientation,
            spacing_mm=frame.spacing_mm,
            flags=instance.flags,
        )


class _Nifti:
    """A NIfTI volume, cut into slices of one plane; those with little tissue are rejected."""

    format: Literal["nifti"] = "nifti"

    def __init__(self, content: bytes, options: ReadOptions, key: bytes | None) -> None:
        from brainray.images.nifti import read_nifti

        self._volume: Volume = read_nifti(content, plane=options.plane, limits=options.limits)
        volume = self._volume
        info = SliceInfo(
            plane=None if "orientation_unknown" in volume.flags else volume.plane,
            spacing_mm=volume.spacing_mm,
            flags=tuple(
                sorted({*volume.flags, *(() if volume.plane == "axial" else ("non_axial",))})
            ),
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
                rejection=None if index in kept else _find_little_tissue(),
            )
            for index in range(volume.num_slices)
        )

    def decode(self, index: int) -> NDArray[np.float32]:
        if self.slices[index].rejection:
            raise _find_little_tissue()  # a new one: an exception keeps the frames that raised it
        return self._volume.get_slice(index)

    def render(self, index: int) -> tuple[NDArray[np.uint8], GreyRange]:
        low, high = np.percentile(samples := self.decode(index), (1, 99))
        shares = (samples - low) / max(float(high - low), float(np.finfo(np.float32).tiny))
        return np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8), "samples"


def _find_little_tissue() -> RejectedImage:
    return RejectedImage(LITTLE_TISSUE, "The slice has little tissue: it is above or below it.")
