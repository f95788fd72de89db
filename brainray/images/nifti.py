"""Cut NIfTI volumes into slices in radiological display orientation.

nibabel reads the header and the orientation. The voxels are a view of the file, reoriented without
resampling, and scaled one slice at a time. A gzipped file is unpacked no further than its header
says. Free text fields and extensions of the header, which may hold DICOM headers, are not read.
"""

import gzip
import io
import math
import zlib
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from brainray.errors import RejectedImage
from brainray.images.decode import DecodeLimits, check_length
from brainray.images.headers import corrupt, too_large, truncated, unsupported
from brainray.images.slices import Plane

_DEFAULT_LIMITS = DecodeLimits()
_GZIP_START = b"\x1f\x8b"
_MAX_EXTENSION_BYTES = 16 * 2**20
"""Most bytes between header and voxels."""

TISSUE_LEVEL = 0.1
"""A voxel is tissue above this share of the way from the volume's 1st to its 99th percentile."""
MIN_TISSUE_FRACTION = 0.05
"""A slice with a smaller share of tissue is skipped."""
MAX_SLICES = 4096
"""Most slices of a volume: a gzipped file of a few kilobytes can have millions of one voxel."""
_MM_PER_UNIT = {1: 1000.0, 3: 0.001}  # metres, micrometres; others count as mm
_MAX_SPACING_MM = 1000.0
_NUM_SAMPLED = 1_000_000
"""Approximate number of voxels for the percentiles."""

# The axes (0 right, 1 front, 2 top of the patient) of slices, columns and rows. Columns and rows
# are reversed for display: the patient's right (front, in sagittal slices) is at the image's left.
_SLICE_AXES: dict[Plane, tuple[int, int, int]] = {
    "axial": (2, 0, 1),
    "coronal": (1, 0, 2),
    "sagittal": (0, 1, 2),
}


@dataclass(frozen=True, eq=False, slots=True)
class Volume:
    """A three-dimensional image; its slices are computed on demand."""

    plane: Plane
    num_slices: int
    """Slices of the whole volume along the normal of `plane`."""
    kept: tuple[int, ...]
    """Indices of slices with enough tissue, from the patient's left, back or bottom."""
    spacing_mm: tuple[float, float] | None
    """Between rows, then between columns, of a slice, in mm; None where the header gives no
    positive numbers."""
    thickness_mm: float | None
    """Between slices, in mm; None likewise."""
    flags: tuple[str, ...]
    """``orientation_unknown``: the header has none, and nibabel's default is assumed;
    ``multi_volume``: only the first of several volumes is read."""
    _stored: NDArray[Any] = field(repr=False)
    """A view with axes (slice, row, column), as displayed."""
    _scale: tuple[float, float] = field(repr=False)
    """Slope and intercept."""

    def get_slice(self, index: int) -> NDArray[np.float32]:
        """Return a scaled slice (rows, columns) as displayed; not finite voxels get the lowest."""
        return _scale_voxels(self._stored[index], self._scale)


def read_nifti(
    content: bytes,
    *,
    plane: Plane = "axial",
    limits: DecodeLimits = _DEFAULT_LIMITS,
) -> Volume:
    """Read a NIfTI-1 or NIfTI-2 file, plain or gzipped, for slices of a plane.

    The volume's nearest axis is the slices' normal. A slice is kept if at least
    :data:`MIN_TISSUE_FRACTION` of its voxels are above :data:`TISSUE_LEVEL`. `limits` hold for the
    file in bytes and for the volume in voxels (`max_pixels`).
    """
    check_length(content, limits)
    file: BinaryIO = io.BytesIO(content)
    if content.startswith(_GZIP_START):
        file = cast(BinaryIO, gzip.GzipFile(fileobj=file))
    # Exceptions of gzip, nibabel and numpy become rejections without their texts.
    try:
        return _read_volume(file, plane, limits)
    except RejectedImage:
        raise
    except MemoryError:
        rejection = too_large("There is not enough memory for this NIfTI file.")
    except EOFError:
        rejection = truncated("The gzip stream ends too early.")
    except (OSError, zlib.error):
        rejection = corrupt("The gzip stream is damaged.")
    except Exception as error:  # nibabel raises half a dozen types for bad headers
        rejection = corrupt(f"The NIfTI file cannot be read ({type(error).__name__}).")
    raise rejection


def _read_volume(file: BinaryIO, plane: Plane, limits: DecodeLimits) -> Volume:
    header = _read_header(file)
    shape, dtype = _check_voxels(header, limits)
    flags = ["multi_volume"] if math.prod(header.get_data_shape()[3:]) > 1 else []
    orientation = _find_orientation(header)
    if orientation is None:
        flags.append("orientation_unknown")
        orientation = nib.io_orientation(header.get_base_affine())
    axes = np.argsort(orientation[:, 0])  # the file's axis for each of the patient's
    slices, columns, rows = _SLICE_AXES[plane]
    if (num_slices := shape[axes[slices]]) > MAX_SLICES:
        raise too_large(
            f"The volume has {num_slices:,} {plane} slices, {MAX_SLICES:,} are allowed."
        )
    spacing = _find_spacing(header)
    stored = _read_voxels(file, header, shape, dtype)
    upright = np.asarray(nib.apply_orientation(stored, orientation))
    shown = upright.transpose(slices, rows, columns)[:, ::-1, ::-1]
    slope, intercept = header.get_slope_inter()  # None where the slope is 0 or not a number
    scale = (1.0, 0.0) if slope is None else (float(slope), float(intercept or 0.0))
    return Volume(
        plane=plane,
        num_slices=len(shown),
        kept=_find_tissue(shown, scale),
        spacing_mm=(spacing[axes[rows]], spacing[axes[columns]]) if spacing else None,
        thickness_mm=spacing[axes[slices]] if spacing else None,
        flags=tuple(flags),
        _stored=shown,
        _scale=scale,
    )


# ---- header --------------------------------------------------------------------------------------


def _read_header(file: BinaryIO) -> nib.Nifti1Header:
    """Read a header of either version and byte order (nifti.nimh.nih.gov)."""
    start = file.read(348)
    if len(start) < 348:
        raise truncated("The file ends inside its NIfTI header.")
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    if 348 in sizes and start[344:347] == b"n+1":
        return nib.Nifti1Header(start, check=False)
    if 540 in sizes and start[4:7] == b"n+2":
        return nib.Nifti2Header(start + file.read(540 - 348), check=False)
    if 348 in sizes and start[344:347] == b"ni1":
        raise unsupported("A NIfTI header without voxels (.hdr) is not supported. Send a .nii.")
    raise RejectedImage("not_an_image", "Expected a NIfTI file, got bytes of another format.")


def _check_voxels(
    header: nib.Nifti1Header, limits: DecodeLimits
) -> tuple[tuple[int, int, int], np.dtype[Any]]:
    """Check and return the shape and type of the first volume."""
    dimensions = [int(size) for size in header.get_data_shape()]
    if not 2 <= len(dimensions) <= 7 or min(dimensions) < 1:
        raise corrupt(f"The NIfTI header has impossible dimensions, {dimensions}.")
    shape = (dimensions[0], dimensions[1], (*dimensions, 1)[2])
    if math.prod(shape) > limits.max_pixels:
        raise too_large(
            f"A volume of {' x '.join(map(str, shape))} is larger than the {limits.max_pixels:,} "
            "voxels allowed."
        )
    dtype = header.get_data_dtype()
    if dtype.names is not None:  # red, green, blue
        raise RejectedImage("colour", "The volume has colours. Send the grey MR volume.")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise unsupported(f"NIfTI voxels of type {dtype} are not supported. Save as float32.")
    return shape, dtype


def _read_voxels(
    file: BinaryIO, header: nib.Nifti1Header, shape: tuple[int, int, int], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Read the first volume. Later bytes of a gzip stream are not unpacked."""
    at, offset = int(header["sizeof_hdr"]), float(header["vox_offset"])
    if not at <= offset <= at + _MAX_EXTENSION_BYTES:
        raise corrupt("The NIfTI header's vox_offset is impossible.")
    file.read(int(offset) - at)
    num_bytes = math.prod(shape) * dtype.itemsize
    voxels = file.read(num_bytes)
    if len(voxels) < num_bytes:
        raise truncated(f"The NIfTI file has {len(voxels):,} of its {num_bytes:,} bytes of voxels.")
    file.read(1)  # at the end of the stream, gzip verifies the checksum
    return np.frombuffer(voxels, dtype).reshape(shape, order="F")


def _find_orientation(header: nib.Nifti1Header) -> NDArray[Any] | None:
    """Return nibabel's orientation of the axes; None where the header has none."""
    try:
        sform, sform_code = header.get_sform(coded=True)
        qform, qform_code = header.get_qform(coded=True)
    except (HeaderDataError, ValueError):  # no rotation has this quaternion
        return None
    affine = sform if sform_code else qform if qform_code else None
    if affine is None or not np.isfinite(affine).all():
        return None
    orientation = nib.io_orientation(affine)
    return None if np.isnan(orientation).any() else orientation


def _find_spacing(header: nib.Nifti1Header) -> tuple[float, ...] | None:
    """Return the spacing of the file's axes in mm; None unless all are positive."""
    units = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    zooms = (*header.get_zooms()[:3], 1.0)[:3]  # a file of one slice may have no third
    spacing = tuple(abs(float(zoom)) * units for zoom in zooms)
    return spacing if all(0 < one < _MAX_SPACING_MM for one in spacing) else None


# ---- voxels --------------------------------------------------------------------------------------


def _scale_voxels(stored: NDArray[Any], scale: tuple[float, float]) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):  # handled by the mask
        grey = (stored.astype(np.float64) * scale[0] + scale[1]).astype(np.float32)
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
