"""Synthetic DICOM files for the tests: every value in them is known."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    UID,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    MRImageStorage,
)

PYDICOM_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
SERIES_UID = "1.2.826.0.1.3680043.9.1"
RAMP = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)  # 12 bits


def make_dataset(pixels: NDArray = RAMP, **elements) -> Dataset:
    """Build a classic MR object with these stored samples; an element set to None is deleted."""
    dataset = Dataset()
    dataset.SOPClassUID = MRImageStorage
    dataset.SOPInstanceUID = f"{SERIES_UID}.1"
    dataset.SeriesInstanceUID = SERIES_UID
    dataset.StudyInstanceUID = "1.2.826.0.1.3680043.9"
    dataset.PatientID = "patient-7"
    dataset.Modality = "MR"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    dataset.BodyPartExamined = "BRAIN"
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [-100, -90, 33]
    dataset.PixelSpacing = [1.5, 0.5]
    if pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.add_new("PixelData", "OW", pixels.tobytes())
    for keyword, value in elements.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    if "BitsStored" in elements and "HighBit" not in elements:
        dataset.HighBit = dataset.BitsStored - 1
    return dataset


def write(dataset: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """Return the bytes of a DICOM Part 10 file."""
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID", MRImageStorage)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID", SERIES_UID)
    buffer = io.BytesIO()
    order = {"implicit_vr": False, "little_endian": True} if UID(syntax).is_private else {}
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True, **order)
    return buffer.getvalue()


def make_mr(pixels: NDArray = RAMP, syntax: str = ExplicitVRLittleEndian, **elements) -> bytes:
    """Make an uncompressed classic MR file."""
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    return write(make_dataset(pixels.astype(pixels.dtype.newbyteorder(order)), **elements), syntax)


def make_compressed(
    frames: Sequence[bytes] | Sequence[list[bytes]], syntax: str, pixels: NDArray = RAMP, **elements
) -> bytes:
    """Make a file from compressed frames; a list holds the fragments of one frame."""
    dataset = make_dataset(pixels, **elements)
    if all(isinstance(frame, bytes) for frame in frames):
        data = encapsulate(list(frames))
    else:  # no offset table: the decoder must find the boundaries of the frames
        data = encapsulate([fragment for frame in frames for fragment in frame], has_bot=False)
    dataset.add_new("PixelData", "OB", data)
    dataset["PixelData"].is_undefined_length = True
    return write(dataset, syntax)


def compress(pixels: NDArray, syntax: str) -> list[bytes]:
    """Return each frame compressed."""
    dataset = pydicom.dcmread(io.BytesIO(make_mr(pixels)))
    dataset.compress(syntax, generate_instance_uid=False)
    return list(generate_frames(dataset.PixelData, number_of_frames=len(pixels)))


def make_item(**elements) -> Dataset:
    """Make a sequence item."""
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return item


def make_enhanced(
    frames: NDArray, shared: Dataset, per_frame: Sequence[Dataset], **elements
) -> bytes:
    """Make an enhanced MR file with geometry and scaling in its functional groups only."""
    absent = dict.fromkeys(("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"))
    return make_mr(
        frames,
        SOPClassUID=EnhancedMRImageStorage,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=list(per_frame),
        **(absent | elements),
    )


def as_mr(path: Path) -> bytes:
    """Return a file of any modality, relabelled as an MR of the head; its pixels are unchanged."""
    dataset = pydicom.dcmread(path, force=True)
    dataset.SOPClassUID, dataset.Modality = MRImageStorage, "MR"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    dataset.BodyPartExamined = "BRAIN"
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()
