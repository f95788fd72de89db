"""NIfTI volumes to slices in radiological display orientation.

nibabel reads the header and tells the orientation; the voxels are taken from the file as a view,
turned without resampling, and scaled one slice at a time. Of a file only what is needed is
unpacked, and nothing before the header has said how much that is. The header's free text fields and
its extensions, which may hold DICOM headers, are not read.
"""

import gzip
import io
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from brainray.errors import RejectedImage
from brainray.images.decode import DecodeLimits

Plane = Literal["axial", "coronal", "sagittal"]

_DEFAULT_LIMITS = DecodeLimits()
_GZIP_START = b"\x1f\x8b"
_MAX_EXTENSION_BYTES = 16 * 2**20
"""Most bytes between header and voxels that are skipped."""

TISSUE_LEVEL = 0.1
"""A voxel is tissue above this share of the way from the volume's 1st to its 99th percentile."""
MIN_TISSUE_FRACTION = 0.05
"""A slice with a smaller share of tissue is skipped."""
MAX_SLICES = 4096
"""Most slices of a volume. A gzipped file of a few kilobytes can claim millions of one voxel."""
_MM_PER_UNIT = {1: 1000.0, 3: 0.001}  # metres and micrometres; all else is taken for millimetres
_MAX_SPACING_MM = 1000.0
_NUM_SAMPLED = 1_000_000
"""About how many voxels the percentiles are taken from."""

# Of a volume whose axes point to the patient's right, front and top: the axis that the slices are
# counted along, and the axes of a slice's columns and rows. Both are reversed for display: the
# patient's right (front, in sagittal slices) is at the left of the image, the top at its top.
_SLICE_AXES: dict[Plane, tuple[int, int, int]] = {
    "axial": (2, 0, 1),
    "coronal": (1, 0, 2),
    "sagittal": (0, 1, 2),
}


@dataclass(frozen=True, eq=False, slots=True)
class Volume:
    """A three-dimensional image whose slices are made on demand."""

    plane: Plane
    num_slices: int
    """Of the whole volume along the normal of `plane`."""
    kept: tuple[int, ...]
    """Indices of the slices with enough tissue, from the patient's left, back or bottom."""
    spacing_mm: tuple[float, float] | None
    """Between rows, then between columns, of a slice, in mm; None where the header gives no
    positive numbers."""
    thickness_mm: float | None
    """Between slices, in mm; None likewise."""
    flags: tuple[str, ...]
    """``orientation_unknown``: the header gives none, nibabel's default is assumed;
    ``multi_volume``: only the first of several volumes is read."""
    _stored: NDArray[Any] = field(repr=False)
    """A view with axes (slice, row, column), as displayed."""
    _scale: tuple[float, float] = field(repr=False)
    """Slope and intercept."""

    @property
    def num_skipped(self) -> int:
        """How many slices have too little tissue."""
        return self.num_slices - len(self.kept)

    def get_slice(self, index: int) -> NDArray[np.float32]:
        """Return a slice as displayed, scaled; voxels that are not numbers have its lowest value.

        Returns
        -------
        ndarray of float32, shape (rows, columns)
        """
        return _scale_voxels(self._stored[index], self._scale)


def read_nifti(
    source: bytes | Path,
    *,
    plane: Plane = "axial",
    limits: DecodeLimits = _DEFAULT_LIMITS,
) -> Volume:
    """Read a NIfTI-1 or NIfTI-2 file, plain or gzipped.

    Slices are kept if voxels above :data:`TISSUE_LEVEL` fill :data:`MIN_TISSUE_FRACTION` of them.

    Parameters
    ----------
    source : bytes or Path
        A whole ``.nii`` or ``.nii.gz`` file, or a local path to one.
    plane : {"axial", "coronal", "sagittal"}
        The plane of the slices, by the axis of the volume that is nearest.
    limits : DecodeLimits
        The largest file in bytes, and the largest volume in voxels (`max_pixels`).

    Raises
    ------
    RejectedImage
        ``reason`` is a key of :data:`brainray.images.decode.REJECTION_REASONS`.
    """
    size_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size_bytes == 0:
        raise RejectedImage("empty", "Expected a NIfTI file, got no bytes. Send the file again.")
    if size_bytes > limits.max_bytes:
        raise RejectedImage(
            "too_large",
            f"The file has {size_bytes:,} bytes, more than the {limits.max_bytes:,} allowed.",
        )
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        return _read_safely(file, plane, limits)


def _read_safely(file: BinaryIO, plane: Plane, limits: DecodeLimits) -> Volume:
    """Turn what gzip, nibabel and numpy raise into rejections, without their texts."""
    try:
        is_gzipped = file.read(2) == _GZIP_START
        file.seek(0)
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if is_gzipped else file
        return _read_volume(stream, plane, limits)
    except RejectedImage:
        raise
    except MemoryError:
        reason, message = "too_large", "There is not enough memory to unpack this NIfTI file."
    except EOFError:
        reason, message = "truncated", "The gzip stream ends too early. Resend the file."
    except (OSError, zlib.error):
        reason, message = "corrupt", "The gzip stream is damaged. Resend the file."
    except Exception as error:  # nibabel raises half a dozen types for bad headers
        name = type(error).__name__
        reason, message = "corrupt", f"The NIfTI file cannot be read ({name}). Export it again."
    raise RejectedImage(reason, message)


def _read_volume(file: BinaryIO, plane: Plane, limits: DecodeLimits) -> Volume:
    header = _read_header(file)
    shape, dtype = _check_voxels(header, limits)
    flags: set[str] = set()
    if math.prod(header.get_data_shape()[3:]) > 1:
        flags.add("multi_volume")
    turns = _find_orientation(header)
    if turns is None:
        flags.add("orientation_unknown")
        turns = nib.io_orientation(header.get_base_affine())
    axes = np.argsort(turns[:, 0])  # the file's axis for each of the patient's
    slices, columns, rows = _SLICE_AXES[plane]
    if (num_slices := shape[axes[slices]]) > MAX_SLICES:
        raise RejectedImage(
            "too_large",
            f"The volume has {num_slices:,} {plane} slices, {MAX_SLICES:,} are allowed.",
        )
    spacing = _find_spacing(header)
    stored = _read_voxels(file, header, shape, dtype)
    turned = np.asarray(nib.apply_orientation(stored, turns))
    shown = turned.transpose(slices, rows, columns)[:, ::-1, ::-1]
    scale = _find_scale(header)
    return Volume(
        plane=plane,
        num_slices=len(shown),
        kept=_find_tissue(shown, scale),
        spacing_mm=(spacing[axes[rows]], spacing[axes[columns]]) if spacing else None,
        thickness_mm=spacing[axes[slices]] if spacing else None,
        flags=tuple(sorted(flags)),
        _stored=shown,
        _scale=scale,
    )


# ---- header --------------------------------------------------------------------------------------


def _read_header(file: BinaryIO) -> nib.Nifti1Header:
    """Read a header of either version and byte order (nifti.nimh.nih.gov)."""
    start = file.read(348)
    if len(start) < 348:
        raise RejectedImage("truncated", "The file ends inside its NIfTI header. Resend it.")
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    if 348 in sizes and start[344:347] == b"n+1":
        return nib.Nifti1Header(start, check=False)
    if 540 in sizes and start[4:7] == b"n+2":
        return nib.Nifti2Header(start + file.read(540 - 348), check=False)
    if 348 in sizes and start[344:347] == b"ni1":
        raise RejectedImage(
            "unsupported", "A NIfTI header without voxels (.hdr) is not supported. Send a .nii."
        )
    raise RejectedImage("not_an_image", "Expected a NIfTI file, got bytes of another format.")


def _check_voxels(
    header: nib.Nifti1Header, limits: DecodeLimits
) -> tuple[tuple[int, int, int], np.dtype[Any]]:
    """Return the shape and type of the first volume, if it may be read."""
    dimensions = [int(size) for size in header.get_data_shape()]
    if not 2 <= len(dimensions) <= 7 or min(dimensions) < 1:
        raise RejectedImage(
            "corrupt", f"The NIfTI header has impossible dimensions, {dimensions}. Export it again."
        )
    shape = (dimensions[0], dimensions[1], (*dimensions, 1)[2])
    if math.prod(shape) > limits.max_pixels:
        raise RejectedImage(
            "too_large",
            f"A volume of {' x '.join(map(str, shape))} is larger than the {limits.max_pixels:,} "
            "voxels allowed.",
        )
    dtype = header.get_data_dtype()
    if dtype.names is not None:  # red, green, blue
        raise RejectedImage("colour", "The volume has colours. Send the grey MR volume.")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise RejectedImage(
            "unsupported", f"NIfTI voxels of type {dtype} are not supported. Save as float32."
        )
    return shape, dtype


def _read_voxels(
    file: BinaryIO, header: nib.Nifti1Header, shape: tuple[int, int, int], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Read the first volume. A gzip stream is unpacked up to its end only, and checked there."""
    at, offset = int(header["sizeof_hdr"]), float(header["vox_offset"])
    if not at <= offset <= at + _MAX_EXTENSION_BYTES:
        raise RejectedImage("corrupt", "The NIfTI header's vox_offset is impossible.")
    file.read(int(offset) - at)
    num_bytes = math.prod(shape) * dtype.itemsize
    voxels = file.read(num_bytes)
    if len(voxels) < num_bytes:
        raise RejectedImage(
            "truncated",
            f"The NIfTI file has {len(voxels):,} of its {num_bytes:,} bytes of voxels. Resend it.",
        )
    file.read(1)  # at its end, gzip compares the checksum
    return np.frombuffer(voxels, dtype).reshape(shape, order="F")


def _find_orientation(header: nib.Nifti1Header) -> NDArray[Any] | None:
    """Return the turns to axes that point right, front and up; None where the header tells none."""
    try:
        sform, sform_code = header.get_sform(coded=True)
        qform, qform_code = header.get_qform(coded=True)
    except (HeaderDataError, ValueError):  # no rotation has this quaternion
        return None
    affine = sform if sform_code else qform if qform_code else None
    if affine is None or not np.isfinite(affine).all():
        return None
    turns = nib.io_orientation(affine)
    return None if np.isnan(turns).any() else turns


def _find_spacing(header: nib.Nifti1Header) -> tuple[float, ...] | None:
    """Return the spacing of the file's axes in mm; None unless all numbers are positive."""
    units = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    zooms = (*header.get_zooms()[:3], 1.0)[:3]  # a file of one slice may have no third
    spacing = tuple(abs(float(zoom)) * units for zoom in zooms)
    return spacing if all(0 < one < _MAX_SPACING_MM for one in spacing) else None


def _find_scale(header: nib.Nifti1Header) -> tuple[float, float]:
    slope, intercept = header.get_slope_inter()
    if slope is None:  # 0 or not a number means unscaled
        return 1.0, 0.0
    return float(slope), float(intercept or 0.0)


# ---- voxels --------------------------------------------------------------------------------------


def _scale_voxels(stored: NDArray[Any], scale: tuple[float, float]) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):  # handled by the mask
        values = stored.astype(np.float64) * scale[0] + scale[1]
        grey = values.astype(np.float32)
    is_finite = np.isfinite(grey)
    if not is_finite.all():
        grey[~is_finite] = grey[is_finite].min() if is_finite.any() else 0.0
    return np.ascontiguousarray(grey)


def _find_tissue(shown: NDArray[Any], scale: tuple[float, float]) -> tuple[int, ...]:
    """Return the indices of the slices with enough voxels above the tissue level."""
    step = max(1, round((shown.size / _NUM_SAMPLED) ** (1 / 3)))
    sampled = _scale_voxels(shown[::step, ::step, ::step], scale)
    low, high = np.percentile(sampled, (1, 99))
    level = low + TISSUE_LEVEL * (high - low)
    return tuple(
        index
        for index, stored in enumerate(shown)
        if np.mean(_scale_voxels(stored, scale) > level) >= MIN_TISSUE_FRACTION
    )
