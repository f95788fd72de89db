"""One slice in many formats: the same samples as DICOM, NIfTI and PNG."""

import gzip
import io

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from tests.dicom_files import compress, make_compressed, make_enhanced, make_item, make_mr

Slice = NDArray[np.uint16]


def make_png(pixels: NDArray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_nifti(pixels: NDArray, axes: str, slope: float = 1.0, intercept: float = 0.0) -> bytes:
    """Make a volume of three copies of a slice as displayed, stored along the given axes."""
    right_front_top = np.stack([pixels[::-1, ::-1].T] * 3, axis=-1).astype(np.int16)
    affine = np.eye(4)
    turns = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(axes))
    )
    turned = affine @ nib.orientations.inv_ornt_aff(turns, right_front_top.shape)
    image = nib.Nifti1Image(nib.apply_orientation(right_front_top, turns), turned)
    image.header.set_slope_inter(slope, intercept)
    header = image.header.copy()
    content: bytes = image.to_bytes()
    header["scl_slope"], header["scl_inter"] = slope, intercept
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    return bytes(header.binaryblock) + content[len(header.binaryblock) :]


def make_frames(pixels: Slice) -> bytes:
    """Make an enhanced object with frames of different slopes."""

    def make_group(slope: str) -> Dataset:
        scaling = make_item(RescaleSlope=slope, RescaleIntercept="-5", RescaleType="US")
        window = make_item(WindowCenter=float(slope) * 99, WindowWidth=50)
        return make_item(PixelValueTransformationSequence=[scaling], FrameVOILUTSequence=[window])

    return make_enhanced(
        np.stack([pixels] * 3), Dataset(), [make_group("1"), make_group("3.7"), make_group("0.21")]
    )


def make_copies(pixels: Slice) -> dict[str, bytes]:
    """Make files that hold the same 12-bit samples at full depth."""
    brightest = int(pixels.max())
    inverted = (brightest + int(pixels.min()) - pixels).astype(np.uint16)
    signed = pixels.astype(np.int16) - 2000
    window = {"WindowCenter": brightest // 3, "WindowWidth": brightest // 4}
    return {
        "16-bit PNG": make_png(pixels),
        "DICOM": make_mr(pixels, BitsStored=12),
        "DICOM with a window": make_mr(pixels, **window),
        "DICOM implicit": make_mr(pixels, ImplicitVRLittleEndian),
        "DICOM big endian": make_mr(pixels, ExplicitVRBigEndian),
        "DICOM deflated": make_mr(pixels, DeflatedExplicitVRLittleEndian),
        **{
            f"DICOM {syntax.name}": make_compressed(compress(pixels[None], syntax), syntax, pixels)
            for syntax in (RLELossless, JPEG2000Lossless, JPEGLSLossless)
        },
        "DICOM MONOCHROME1": make_mr(inverted, PhotometricInterpretation="MONOCHROME1"),
        "DICOM with slope": make_mr(pixels, RescaleSlope="2.108", RescaleIntercept="-17"),
        "DICOM signed": make_mr(signed),
        "DICOM signed, 12 bits": make_mr(signed & 0xFFF, BitsStored=12, PixelRepresentation=1),
        "DICOM enhanced": make_frames(pixels),
        "NIfTI RAS": make_nifti(pixels, "RAS"),
        "NIfTI LAS": make_nifti(pixels, "LAS"),
        "NIfTI PSL, gzipped": gzip.compress(make_nifti(pixels, "PSL")),
        "NIfTI with slope": make_nifti(pixels, "LAS", 0.37, 12),
    }


def reduce_to_8_bits(pixels: Slice) -> bytes:
    """Export a slice as most software does: its range is scaled to 8 bits."""
    low, high = int(pixels.min()), int(pixels.max())
    return make_png(np.rint((pixels - float(low)) / (high - low) * 255).astype(np.uint8))
