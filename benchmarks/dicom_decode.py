"""What decoding a DICOM slice costs beside the network, for each transfer syntax.

::

    python benchmarks/dicom_decode.py

Encodes one MR slice of pydicom's, enlarged to 256 x 256 with noise, in every transfer syntax that
is read, and times ``open_dicom`` and ``decode_frame``; the median of 200 calls each. HTJ2K is left
out: nothing here encodes it. The last column is the share of the shipped classifier's time for one
image of 224 px, in batches of 16 on one thread, with OpenVINO in bf16 (fp32 where the processor
has no bf16).
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gdcm
import numpy as np
import pydicom
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from brainray.images.dicom import open_dicom
from brainray.images.dicom_pixels import decode_frame
from brainray.inference.engine import EngineOptions, open_engine
from brainray.model.classifier import SHIPPED_FOLDER, load_classifier

SAMPLE = Path(pydicom.__file__).parent / "data" / "test_files" / "MR_small.dcm"
UNCOMPRESSED = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)
BY_PYDICOM = {
    RLELossless: {},
    JPEGLSLossless: {},
    JPEGLSNearLossless: {"jls_error": 2},
    JPEG2000Lossless: {},
    JPEG2000: {"j2k_cr": [5]},
}
BY_GDCM = {
    UID("1.2.840.10008.1.2.4.57"): gdcm.TransferSyntax.JPEGLosslessProcess14,
    UID("1.2.840.10008.1.2.4.70"): gdcm.TransferSyntax.JPEGLosslessProcess14_1,
}
SIZE_PX = 224
BATCH_SIZE = 16


def measure(function: Callable[[], object], repeats: int = 200) -> float:
    """Return the median time of a call, in ms."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def make_dataset() -> pydicom.Dataset:
    """Return the sample, 256 x 256."""
    dataset = pydicom.dcmread(SAMPLE)
    pixels = np.kron(dataset.pixel_array, np.ones((4, 4), dataset.pixel_array.dtype))
    noise = np.random.default_rng(0).integers(0, 8, pixels.shape, dtype=pixels.dtype)
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.PixelData = (pixels + noise).tobytes()
    return dataset


def make_file(syntax: UID) -> bytes:
    """Encode the sample in a transfer syntax."""
    dataset = make_dataset()
    if syntax in BY_GDCM:
        return compress_by_gdcm(write(dataset), BY_GDCM[syntax])
    if syntax == JPEGBaseline8Bit:
        grey = np.frombuffer(dataset.PixelData, np.int16).reshape(dataset.Rows, dataset.Columns)
        buffer = io.BytesIO()
        Image.fromarray((grey // 16).astype(np.uint8)).save(buffer, "JPEG", quality=95)
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.PixelRepresentation = 0
        dataset.PixelData = encapsulate([buffer.getvalue()])
        dataset["PixelData"].is_undefined_length = True
    elif syntax in BY_PYDICOM:
        dataset.compress(syntax, **BY_PYDICOM[syntax])
    elif syntax == ExplicitVRBigEndian:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    return write(dataset)


def write(dataset: pydicom.Dataset) -> bytes:
    """Write a file as its meta information says."""
    buffer = io.BytesIO()
    copy = pydicom.Dataset(dataset)  # which forgets how the sample was encoded
    copy.file_meta = dataset.file_meta
    if "PixelData" in dataset:
        copy["PixelData"].is_undefined_length = dataset.file_meta.TransferSyntaxUID.is_compressed
    pydicom.dcmwrite(buffer, copy, enforce_file_format=True)
    return buffer.getvalue()


def compress_by_gdcm(content: bytes, syntax: int) -> bytes:
    """Compress the frame of a file by GDCM, which pydicom cannot encode with."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain.dcm"
        path.write_bytes(content)
        reader = gdcm.ImageReader()
        reader.SetFileName(str(path))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return path.read_bytes()


def measure_network() -> tuple[str, float]:
    """Return what the network computes with, and its time for an image of 224 px, in ms."""
    classifier = load_classifier(str(SHIPPED_FOLDER))
    classifier = replace(
        classifier, preprocessing=replace(classifier.preprocessing, size_px=SIZE_PX)
    )
    engine = open_engine(classifier, EngineOptions(backend="openvino", num_threads=1))
    images = engine.make_batch(BATCH_SIZE)
    return engine.description, measure(lambda: engine.predict(images), 10) / BATCH_SIZE


def main() -> None:
    """Print a line for each transfer syntax."""
    description, network_ms = measure_network()
    print(f"network at {SIZE_PX} px, {description}: {network_ms:.1f} ms an image")
    for syntax in (*UNCOMPRESSED, *BY_PYDICOM, JPEGBaseline8Bit, *BY_GDCM):
        content = make_file(syntax)
        image = open_dicom(content)
        assert image.transfer_syntax == syntax
        opening = measure(lambda content=content: open_dicom(content))
        decoding = measure(lambda image=image: decode_frame(image))
        share = 100 * (opening + decoding) / network_ms
        print(
            f"{syntax.name[:44]:44} open {opening:6.2f} ms   decode {decoding:6.2f} ms   "
            f"{share:5.1f} %"
        )


if __name__ == "__main__":
    main()
