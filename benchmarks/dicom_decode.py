"""Time from the bytes of a DICOM file to grey values, by transfer syntax.

::

    python benchmarks/dicom_decode.py

Reads pydicom's samples of one MR slice, enlarged to 256 x 256, and times ``open_dicom`` and
``decode_frame``, each the median of 200.
"""

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from brainray.images.dicom import open_dicom
from brainray.images.dicom_pixels import decode_frame

_SAMPLE = Path(pydicom.__file__).parent / "data" / "test_files" / "MR_small.dcm"
_SYNTAXES = (ExplicitVRLittleEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless)


def measure(function: Callable[[], object], repeats: int = 200) -> float:
    """Return the median time of a call, in ms."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def make_file(syntax: str) -> bytes:
    """Encode the sample, 256 x 256, in a transfer syntax."""
    dataset = pydicom.dcmread(_SAMPLE)
    pixels = np.kron(dataset.pixel_array, np.ones((4, 4), dataset.pixel_array.dtype))
    noise = np.random.default_rng(0).integers(0, 8, pixels.shape, dtype=pixels.dtype)
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.PixelData = (pixels + noise).tobytes()
    if syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def main() -> None:
    """Print a line for each transfer syntax."""
    for syntax in _SYNTAXES:
        content = make_file(syntax)
        image = open_dicom(content)
        opening = measure(lambda content=content: open_dicom(content))
        decoding = measure(lambda image=image: decode_frame(image))
        print(f"{syntax.name:28} open {opening:6.2f} ms   decode {decoding:6.2f} ms")


if __name__ == "__main__":
    main()
