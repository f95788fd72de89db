"""The same slice gives the same prediction as DICOM, NIfTI or picture."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from brainray.images.decode import decode_image
from brainray.images.preprocess import Preprocessing, open_samples
from brainray.images.slices import open_file, open_slice
from brainray.inference.engine import Engine, EngineOptions, open_engine
from brainray.model.classifier import SHIPPED_FOLDER, load_classifier, save_classifier
from brainray.model.network import build_network
from brainray.recipes import preprocess
from tests.conftest import CLASSES
from tests.dicom_files import compress, make_compressed, make_mr
from tests.same_slice import Slice, make_copies, make_nifti, reduce_to_8_bits

PERCENTILE = preprocess(224)
NON_INTEGER = ("DICOM with slope", "DICOM enhanced", "NIfTI with slope")
"""Copies whose rescaled samples are not integers, and are rounded to 16 bits."""


def load_brain() -> list[Slice]:
    """Return three axial slices of MNI152, an average of 152 brains, as 12-bit samples."""
    spec = find_spec("nilearn")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    name = "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    if not folders or not (Path(folders[0]) / name).is_file():
        pytest.skip("nilearn's MNI152 volume is not installed")
    file = open_file((Path(folders[0]) / name).read_bytes())
    return [np.rint(file.decode(index) * 15).astype(np.uint16) for index in (50, 90, 130)]


def load_scans(folder: Path) -> list[Slice]:
    """Return a 12-bit scan of each class: an 8-bit image, with noise below its resolution."""
    rng = np.random.default_rng(0)
    scans = []
    for label in CLASSES:
        with Image.open(sorted((folder / "Testing" / label).glob("*.jpg"))[3]) as image:
            grey = np.asarray(image.convert("L"), np.float64)
        scans.append(np.clip(np.rint(grey * 12 + rng.normal(0, 3, grey.shape)), 0, 4095))
    return [scan.astype(np.uint16) for scan in scans]


@pytest.fixture(scope="module", params=["MNI152", "brain-tumor-mri"])
def slices(request: pytest.FixtureRequest) -> list[Slice]:
    if request.param == "MNI152":
        return load_brain()
    return load_scans(request.getfixturevalue("real_data"))


def open_all(content: bytes, preprocessing: Preprocessing) -> list[NDArray[np.uint8]]:
    file = open_file(content)
    count = len(file.slices)
    return [open_slice(file, index, preprocessing).scan.image for index in range(count)]


def find_difference(content: bytes, pixels: Slice) -> int:
    """Return the largest difference between the network input of a file and of its samples."""
    expected = open_samples(pixels, PERCENTILE).image.astype(int)
    return max(int(np.abs(one - expected).max()) for one in open_all(content, PERCENTILE))


# ---- grey levels ---------------------------------------------------------------------------------


def test_all_files_of_a_slice_give_the_same_network_input(slices: list[Slice]) -> None:
    for pixels in slices:
        for name, content in make_copies(pixels).items():
            tolerance = 1 if name in NON_INTEGER else 0
            assert find_difference(content, pixels) <= tolerance, name


def test_an_8_bit_export_differs_only_by_rounding(slices: list[Slice]) -> None:
    """Bound: half a level at the pixel and at the ends of the head's range, stretched; plus one.

    The darker the head compared with the slice's brightest pixel, the more its range is stretched.
    """
    for pixels in slices:
        export = reduce_to_8_bits(pixels)
        grey = decode_image(export)
        low, high = np.percentile(grey[grey > 8], (1, 99))
        assert 0 < find_difference(export, pixels) <= 255 / (high - low) + 1


def test_a_hot_pixel_does_not_reduce_the_depth(slices: list[Slice]) -> None:
    """Nine tenths of the 16-bit range are then unused, but percentiles are still exact."""
    for pixels in slices:
        hot = pixels.copy()
        hot[3, 3] = 65_000
        scaled = make_mr(hot, RescaleSlope="2.108", RescaleIntercept="-17")
        assert find_difference(make_mr(hot), hot) == 0
        assert find_difference(scaled, hot) <= 1


# ---- probabilities -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def percentile_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Make an engine with random weights that takes percentiles of the head."""
    folder = str(tmp_path_factory.mktemp("percentile") / "classifier")
    save_classifier(
        folder,
        build_network(len(CLASSES)).state_dict(),
        classes=CLASSES,
        preprocessing=preprocess(64),
        provenance={},
    )
    return open_engine(load_classifier(folder), EngineOptions(backend="torch", precision="fp32"))


def predict(
    engine: Engine, preprocessing: Preprocessing, contents: list[bytes]
) -> NDArray[np.float32]:
    """Predict the first slice of each file in a batch of one, since batching reorders sums."""
    images = [open_all(content, preprocessing)[0] for content in contents]
    return np.concatenate([engine.predict(image[None]).probs for image in images])


@pytest.mark.heavy
def test_copies_of_a_slice_have_the_same_probabilities(
    slices: list[Slice], percentile_engine: Engine
) -> None:
    for pixels in slices[1:2]:
        copies = make_copies(pixels)
        probs = predict(percentile_engine, preprocess(64), list(copies.values()))
        for name, row in zip(copies, probs, strict=True):
            tolerance = 2e-3 if name in NON_INTEGER else 1e-6
            assert np.abs(row - probs[0]).max() <= tolerance, name


@pytest.mark.heavy
def test_the_shipped_classifier_ignores_window_and_slope(slices: list[Slice]) -> None:
    """It takes percentiles of a slice's own samples, so a window for display changes nothing."""
    classifier = load_classifier(str(SHIPPED_FOLDER))
    assert classifier.preprocessing.intensity == "percentile"
    engine = open_engine(classifier, EngineOptions())
    for pixels in slices[1:2]:
        centre, width = int(pixels.max()) // 2, int(pixels.max())
        window = {"WindowCenter": centre, "WindowWidth": width}
        (packed,) = compress(pixels[None], "1.2.840.10008.1.2.5")
        contents = [
            make_mr(pixels),
            make_mr(pixels, **window),
            make_compressed([packed], "1.2.840.10008.1.2.5", pixels, **window),
            make_mr(pixels, RescaleSlope=2, RescaleIntercept=0, WindowCenter=centre,
                    WindowWidth=width),
        ]  # fmt: skip
        probs = predict(engine, classifier.preprocessing, contents)
        np.testing.assert_array_equal(probs, np.broadcast_to(probs[0], probs.shape))


# ---- orientation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["RAS", "LAS", "LPS", "PSR"])
def test_a_mark_at_the_right_and_front_is_at_the_top_left(axes: str) -> None:
    """As in a DICOM series whose rows go to the patient's left and columns to the back."""
    y, x = np.indices((60, 50))
    pixels = np.where(np.hypot(y - 30, x - 25) < 22, 400 + 3 * x + 5 * y, 0).astype(np.uint16)
    pixels[12:18, 18:24] = 1500
    preprocessing = Preprocessing(size_px=60, intensity="percentile", fit="pad")
    (as_dicom,) = open_all(make_mr(pixels), preprocessing)
    as_nifti = open_all(make_nifti(pixels, axes), preprocessing)[1]
    np.testing.assert_array_equal(as_nifti, as_dicom)
    row, column = np.argwhere(as_nifti == 255).mean(axis=0)
    assert (row, column) == (pytest.approx(14.5, abs=1), pytest.approx(25.5, abs=1))
