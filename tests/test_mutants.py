"""Damaged DICOM and NIfTI files are decoded or rejected in bounded time and memory."""

import gzip
import io
import random
import re
import resource
import time
from collections import Counter
from collections.abc import Sequence

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from brainray.errors import RejectedImage
from brainray.images.decode import REJECTION_REASONS, DecodeLimits
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions, open_file, open_slice
from tests.dicom_files import (
    RAMP,
    compress,
    make_compressed,
    make_dataset,
    make_enhanced,
    make_item,
    make_mr,
    write,
)
from tests.test_decode import mutate

OPTIONS = ReadOptions(limits=DecodeLimits(max_bytes=2**20, max_pixels=200_000))
PERCENTILE = Preprocessing(size_px=32, crop="head", intensity="percentile", fit="pad")
MAX_SLICES = 6
"""At most this number of slices of each file is decoded."""


def make_sources() -> list[bytes]:
    """Make small files of every supported kind."""
    small = RAMP[:40, :36]
    jpeg = io.BytesIO()
    Image.fromarray((small // 16).astype(np.uint8)).save(jpeg, "JPEG")
    frames = np.stack([small, small[::-1], small])
    lut = make_item(LUTDescriptor=[100, 10, 16], ModalityLUTType="US")
    lut.add_new("LUTData", "OW", np.arange(100, dtype=np.uint16).tobytes())
    voi = make_item(LUTDescriptor=[100, 10, 16])
    voi.add_new("LUTData", "OW", np.arange(100, dtype=np.uint16).tobytes())
    group = make_item(
        PixelValueTransformationSequence=[make_item(RescaleSlope="2", RescaleIntercept="1")],
        FrameVOILUTSequence=[make_item(WindowCenter=500, WindowWidth=300)],
        PlanePositionSequence=[make_item(ImagePositionPatient=[0, 0, 1])],
        MRImageFrameTypeSequence=[make_item(FrameType=["ORIGINAL", "PRIMARY", "M", "NONE"])],
    )
    bare = make_mr(small)[132:]
    window = {"WindowCenter": 900, "WindowWidth": 400, "PixelPaddingValue": 3}
    volume = np.arange(9 * 8 * 7, dtype=np.int16).reshape(9, 8, 7)
    nifti = [kind(volume, np.diag([2, -3, 4, 1])) for kind in (nib.Nifti1Image, nib.Nifti2Image)]
    return [
        make_mr(small, **window),
        make_mr(small, ImplicitVRLittleEndian, PhotometricInterpretation="MONOCHROME1", **window),
        make_mr(small, ExplicitVRBigEndian),
        write(make_dataset(small), DeflatedExplicitVRLittleEndian),
        make_mr(small, ModalityLUTSequence=[lut]),
        make_mr(small, VOILUTSequence=[voi]),
        make_enhanced(frames, Dataset(), [group, Dataset(), group]),
        make_mr(small, ImplicitVRLittleEndian, PerFrameFunctionalGroupsSequence=[group]),
        *(
            make_compressed(compress(frames, syntax), syntax, frames)
            for syntax in (RLELossless, JPEG2000Lossless, JPEGLSLossless)
        ),
        make_compressed([jpeg.getvalue()], JPEGBaseline8Bit, (small // 16).astype(np.uint8)),
        bare,
        *(image.to_bytes() for image in nifti),
        nib.Nifti1Image(volume.astype(">f4"), np.eye(4)).to_bytes(),
        nib.Nifti1Image(np.stack([volume] * 2, -1), np.eye(4)).to_bytes(),
    ]


SOURCES = make_sources()
_ELEMENT = re.compile(
    rb"(?:[\x02\x08\x10\x18\x20\x28]\x00|\x00[\x08\x28]|\xe0\x7f|\x00\x52).{6}", re.S
)
_EXTREMES = (
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x00",
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
    b"\x01\x00",
    b"\xff\x7f",
    b"1e99",
    b"\\\\\\\\",
    b"-1\\0",
    b"SQ\x00\x00",
    b"UN\xff\xff",
)


def damage(rng: random.Random, sources: Sequence[bytes] = SOURCES) -> bytes:
    """Damage a file anywhere, or the headers of elements, or a gzip stream or its contents."""
    kind = rng.randrange(3)
    if kind == 0:
        content = mutate(rng, sources)
    else:
        damaged = bytearray(rng.choice(sources))
        starts = [match.start() for match in _ELEMENT.finditer(damaged[:3000])] or [40]
        for _ in range(rng.randint(1, 4)):
            at = rng.choice(starts) + rng.randrange(4, 14)
            extreme = rng.choice(_EXTREMES)
            damaged[at : at + len(extreme)] = extreme
        content = bytes(damaged)
    if kind == 2 and rng.random() < 0.4:
        packed = gzip.compress(content, 1)
        content = mutate(rng, [packed]) if rng.random() < 0.3 else packed
    return content


def answer(content: bytes) -> str:
    """Open, decode and render; return "decoded" or the reason. Other exceptions are raised."""
    rejections = []
    try:
        file = open_file(content, OPTIONS, key=b"0123456789abcdef")
    except RejectedImage as rejection:
        rejections.append(rejection)
    else:
        for index in range(min(len(file.slices), MAX_SLICES)):
            try:
                opened = open_slice(file, index, PERCENTILE)
                shown, _ = file.render(index)
            except RejectedImage as rejection:
                rejections.append(rejection)
            else:
                assert shown.dtype == np.uint8
                assert shown.shape == opened.scan.samples.shape
                assert shown.size <= OPTIONS.limits.max_pixels
    for rejection in rejections:
        assert rejection.reason in REJECTION_REASONS
        assert " object at 0x" not in rejection.message
    return rejections[0].reason if rejections else "decoded"


def test_the_undamaged_sources_are_decoded() -> None:
    assert {answer(content) for content in SOURCES} <= {"decoded", "little_tissue"}


@settings(
    max_examples=80 * settings.default.max_examples,  # 2,000 in the usual profile
    deadline=2000,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(seed=st.integers(0, 2**32))
def test_mutants_get_an_answer(seed: int) -> None:
    answer(damage(random.Random(seed)))


@pytest.mark.slow
def test_twenty_thousand_mutants_are_decoded_or_rejected_in_time() -> None:
    counts: Counter[str] = Counter()
    slowest = 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(20_000):
        content = damage(random.Random(seed))
        start = time.perf_counter()
        counts[answer(content)] += 1
        slowest = max(slowest, time.perf_counter() - start)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"slowest {slowest * 1000:.0f} ms, {grown_mib:.0f} MiB more; {counts}")  # noqa: T201
    assert slowest < 1.0
    assert grown_mib < 200
    assert {"decoded", "truncated", "corrupt", "too_large", "unsupported"} <= set(counts)
