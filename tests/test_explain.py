"""Class activation maps: exactness, dependence on the weights, and location."""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import spearmanr

from brainray.images.heatmap import render_map
from brainray.images.preprocess import Preprocessing, open_samples
from brainray.inference.engine import Engine, EngineOptions, open_engine
from brainray.model.calibration import Calibration
from brainray.model.classifier import Classifier, find_default_classifier, load_classifier
from brainray.model.explain import STRIDE_PX
from brainray.model.network import build_network, compute_features, normalise_images
from brainray.model.precision import has_native_bf16
from brainray.model.resnet50 import DENSITY
from tests.open_scans import load_image

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ("glioma", "meningioma", "notumor", "pituitary")
PREPROCESSING = Preprocessing(size_px=96, mean=0.2, std=0.3)
BACKENDS = ("openvino", "torch")
needs_bf16 = pytest.mark.skipif(
    not has_native_bf16(use_gpu=False), reason="this processor has no bf16 instructions"
)


def make_classifier(
    network: torch.nn.Module, preprocessing: Preprocessing = PREPROCESSING
) -> Classifier:
    network = network.eval().to(memory_format=torch.channels_last)
    calibration = Calibration.identity(len(CLASSES))
    weights = {name: values.numpy() for name, values in network.state_dict().items()}
    return Classifier(weights, CLASSES, preprocessing, calibration, {"classifier_id": "0"})


def open_backend(classifier: Classifier, backend: str, precision: str = "fp32") -> Engine:
    threads = 1 if backend == "torch" else 2
    options = EngineOptions(backend=backend, precision=precision, num_threads=threads)  # type: ignore[arg-type]
    return open_engine(classifier, options)


def explain(
    engine: Engine, images: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    found = engine.predict(images, ["class_maps"])
    assert found.class_maps is not None
    return found.probs, found.class_maps


@pytest.fixture(scope="module")
def images(phantom_folder: Path) -> NDArray[np.uint8]:
    """Return eight phantoms of each class, in class order."""
    paths = sorted(phantom_folder.glob("Testing/*/*"))
    return np.stack([load_image(path.read_bytes(), PREPROCESSING) for path in paths])


@pytest.fixture(scope="module")
def classifier(images: NDArray[np.uint8]) -> Classifier:
    """Return a random trunk in which every layer has an effect, and a head fitted to phantoms."""
    torch.manual_seed(0)
    network = build_network(len(CLASSES))
    inputs = normalise_images(torch.from_numpy(images), PREPROCESSING)
    with torch.no_grad():
        for name, norm in network.named_modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.weight.uniform_(*((0.1, 0.3) if name.endswith("bn3") else (0.3, 0.7)))
                norm.bias.normal_(0, 0.1)
                norm.momentum = None
        network(inputs)
        features = compute_features(network.eval(), inputs)
        mean = features.mean(0)
        centred = features - mean
        y_true = torch.eye(len(CLASSES)).repeat_interleave(8, 0) * 4 - 1
        ridge = centred @ centred.T + 0.1 * torch.eye(len(images))
        weight = (centred.T @ torch.linalg.solve(ridge, y_true)).T
        network.get_parameter("fc.weight").copy_(weight)
        network.get_parameter("fc.bias").copy_(-weight @ mean)
    return make_classifier(network)


@pytest.fixture(scope="module", params=BACKENDS)
def engine(classifier: Classifier, request: pytest.FixtureRequest) -> Engine:
    return open_backend(classifier, request.param)


# --- exactness ----------------------------------------------------------------------------


def test_the_mean_of_the_native_cells_is_the_logit_of_eager_torch(
    engine: Engine, classifier: Classifier, images: NDArray[np.uint8]
) -> None:
    probs, maps = explain(engine, images)
    assert (maps.shape, maps.dtype) == ((len(images), 4, 12, 12), np.float32)
    with torch.no_grad():
        inputs = normalise_images(torch.from_numpy(images), PREPROCESSING)
        logits = classifier.build_network()(inputs)
    assert np.ptp(maps, axis=(2, 3)).min() > 1e-2, "the cells are too similar for a comparison"
    native_cells = maps[..., ::DENSITY, ::DENSITY]
    np.testing.assert_allclose(native_cells.mean((2, 3)), logits.numpy(), atol=1e-4)
    np.testing.assert_array_equal(probs, engine.predict(images).probs)
    assert (probs.argmax(1) == np.repeat(np.arange(4), 8)).mean() > 0.9


@needs_bf16
@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_maps_are_close_to_fp32_and_do_not_change_predictions(
    backend: str, classifier: Classifier, images: NDArray[np.uint8]
) -> None:
    engine = open_backend(classifier, backend, "bf16")
    probs, maps = explain(engine, images)
    np.testing.assert_array_equal(probs, engine.predict(images).probs)
    exact_probs, exact = explain(open_backend(classifier, "torch"), images)
    assert np.abs(maps - exact).max() < 0.1 * np.ptp(exact)
    assert 0 < np.abs(probs - exact_probs).max() < 5e-2


@pytest.mark.skipif(find_spec("nncf") is None, reason="NNCF is not installed (brainray[int8])")
def test_int8_maps_correlate_with_fp32_and_do_not_change_predictions(
    classifier: Classifier, phantom_folder: Path, images: NDArray[np.uint8]
) -> None:
    folder = str(phantom_folder / "Testing")
    options = EngineOptions(precision="int8", num_threads=2, calibration_uri=folder)
    engine = open_engine(classifier, options)
    probs, maps = explain(engine, images)
    np.testing.assert_array_equal(probs, engine.predict(images).probs)
    _, exact = explain(open_backend(classifier, "torch"), images)
    assert spearmanr(maps.ravel(), exact.ravel()).statistic > 0.9


@pytest.mark.parametrize("size_px", [32, 33, 96, 100])
def test_map_size_is_image_size_over_stride_rounded_up(size_px: int) -> None:
    classifier = make_classifier(build_network(4), Preprocessing(size_px=size_px))
    image = np.zeros((1, size_px, size_px), np.uint8)
    for backend in BACKENDS:
        _, maps = explain(open_backend(classifier, backend), image)
        assert maps.shape == (1, 4, -(-size_px // 8), -(-size_px // 8))


def test_no_images_give_no_maps(engine: Engine, images: NDArray[np.uint8]) -> None:
    probs, maps = explain(engine, images[:0])
    assert (probs.shape, maps.shape) == ((0, 4), (0, 4, 12, 12))


def test_concurrent_explain_and_predict_calls_do_not_mix_results(
    classifier: Classifier, images: NDArray[np.uint8]
) -> None:
    expected, expected_maps = explain(open_backend(classifier, "torch"), images)
    engine = open_backend(classifier, "openvino")  # a new engine, because the first call compiles
    parts = [slice(start, start + 8) for start in range(0, 32, 8)]
    with ThreadPoolExecutor(8) as pool:
        explained = [pool.submit(explain, engine, images[part]) for part in parts]
        predicted = [pool.submit(engine.predict, images[part]) for part in parts]
    for part, explanation, prediction in zip(parts, explained, predicted, strict=True):
        np.testing.assert_allclose(explanation.result()[0], expected[part], atol=1e-4)
        np.testing.assert_allclose(explanation.result()[1], expected_maps[part], atol=1e-3)
        np.testing.assert_allclose(prediction.result().probs, expected[part], atol=1e-4)


# --- faithfulness -------------------------------------------------------------------------


def test_other_weights_give_another_map(classifier: Classifier, images: NDArray[np.uint8]) -> None:
    """Sanity check of Adebayo et al., NeurIPS 2018: a map must depend on the weights."""
    shuffled = build_network(4)
    shuffled.load_state_dict(classifier.build_network().state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in shuffled.named_parameters():
            if name.startswith(("layer4", "fc.weight")):
                values = parameter.flatten()
                order = torch.randperm(len(values), generator=generator)
                parameter.copy_(values[order].view_as(parameter))
    _, maps = explain(open_backend(classifier, "torch"), images)
    _, others = explain(open_backend(make_classifier(shuffled), "torch"), images)
    predicted = np.repeat(np.arange(4), 8)
    rows = np.arange(len(images))
    found = [
        spearmanr(maps[row, k].ravel(), others[row, k].ravel()).statistic
        for row, k in zip(rows, predicted, strict=True)
    ]
    assert abs(np.mean(found)) < 0.3


def test_deleting_the_hottest_region_lowers_the_logit_most(
    classifier: Classifier, images: NDArray[np.uint8]
) -> None:
    """Deletion test of Petsiuk et al., BMVC 2018, compared with all other regions of the scan."""
    classes = np.repeat(np.arange(4), 8)
    before, hottest, others = delete_each(open_backend(classifier, "torch"), images, classes)
    at_hottest, elsewhere = compare_drops(before.logits, hottest.logits, others.logits)
    assert at_hottest.mean() > 1.5 * elsewhere.mean(), (at_hottest.mean(), elsewhere.mean())
    assert (at_hottest > elsewhere).mean() > 0.7


@pytest.mark.slow
def test_deleting_the_hottest_region_lowers_a_trained_networks_probability_most(
    real_data: Path,
) -> None:
    """The same on real test slices, for the probability of the predicted class."""
    classifier = load_classifier(find_default_classifier())
    images = np.stack(
        [
            load_image(path.read_bytes(), classifier.preprocessing)
            for name in classifier.classes
            for path in sorted((real_data / "Testing" / name).iterdir())[:40]
        ]
    )
    engine = open_backend(classifier, "openvino")
    predicted = engine.predict(images).probs.argmax(1)
    before, hottest, others = delete_each(engine, images, predicted)
    at_hottest, elsewhere = compare_drops(before.probs, hottest.probs, others.probs)
    print(f"hottest {at_hottest.mean():.3f}, elsewhere {elsewhere.mean():.3f}")  # noqa: T201
    assert at_hottest.mean() > 2 * elsewhere.mean()
    assert (at_hottest > elsewhere).mean() > 0.7


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Probability and logit of one class for each image."""

    probs: NDArray[np.float32]
    logits: NDArray[np.float32]


def delete_each(
    engine: Engine, images: NDArray[np.uint8], classes: NDArray[np.int64]
) -> tuple[ClassScores, ClassScores, ClassScores]:
    """Return the scores of a class: on the image, without its hottest region, without others.

    The other regions are centred on the native cells; their scores have shape (N, regions).
    """
    rows = np.arange(len(images))

    def score(changed: NDArray[np.uint8]) -> ClassScores:
        found = engine.predict(changed, ["logits"])
        assert found.logits is not None
        return ClassScores(found.probs[rows, classes], found.logits[rows, classes])

    maps = explain(engine, images)[1][rows, classes]
    strongest = [np.unravel_index(one.argmax(), one.shape) for one in maps]
    hottest = score(
        np.stack([delete(image, *cell) for image, cell in zip(images, strongest, strict=True)])
    )
    cells = np.ndindex(*maps[0, ::DENSITY, ::DENSITY].shape)
    others = [
        score(np.stack([delete(image, DENSITY * row, DENSITY * column) for image in images]))
        for row, column in cells
    ]
    elsewhere = ClassScores(
        np.stack([one.probs for one in others], axis=1),
        np.stack([one.logits for one in others], axis=1),
    )
    return score(images), hottest, elsewhere


def compare_drops(
    before: NDArray[np.float32], hottest: NDArray[np.float32], elsewhere: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the drop in score without the hottest region, and the mean drop without another."""
    return before - hottest, (before[:, None] - elsewhere).mean(1)


def delete(image: NDArray[np.uint8], row: int, column: int) -> NDArray[np.uint8]:
    """Return the image with the 32 x 32 pixels around a cell's centre set to the image's mean."""
    result = image.copy()
    half = DENSITY * STRIDE_PX // 2
    y, x = row * STRIDE_PX, column * STRIDE_PX
    result[max(0, y - half) : y + half, max(0, x - half) : x + half] = image.mean().astype(np.uint8)
    return result


# --- location -----------------------------------------------------------------------------


def build_brightness_network() -> torch.nn.Module:
    """Build a network whose first class is the brightness around the centre of each cell.

    The residual branches output zero, so a cell sees only the shortcuts' 11 x 11 pixels.
    """
    network = build_network(len(CLASSES))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "downsample.0" in name or name in ("conv1.weight", "fc.weight", "fc.bias"):
                parameter.zero_()
                parameter.view(len(parameter), -1)[0, 0] = 1
        network.get_parameter("conv1.weight")[0] = 1 / 49
        network.get_parameter("fc.bias").zero_()
    return network


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cell_is_centred_on_a_multiple_of_the_stride(backend: str) -> None:
    preprocessing = Preprocessing(size_px=160, mean=0.0, std=1.0)
    engine = open_backend(make_classifier(build_brightness_network(), preprocessing), backend)
    for row, column in product((0, 3, 10, 19), repeat=2):
        image = np.zeros((160, 160), np.uint8)
        y, x = row * STRIDE_PX, column * STRIDE_PX
        image[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = 255
        (maps,) = explain(engine, image[None])[1]
        expected = np.zeros((20, 20), bool)
        expected[row, column] = True
        np.testing.assert_array_equal(maps[0] > 0, expected)


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("shape", [(300, 300), (240, 480), (481, 260), (100, 61)])
def test_the_heatmap_is_centred_on_the_bright_region(shape: tuple[int, int], fit: str) -> None:
    preprocessing = Preprocessing(size_px=224, mean=0.0, std=1.0, fit=fit)  # type: ignore[arg-type]
    engine = open_backend(make_classifier(build_brightness_network(), preprocessing), "torch")
    height, width = shape
    rows, columns = np.mgrid[:height, :width]
    for down, right in ((0.3, 0.35), (0.5, 0.5), (0.62, 0.7)):
        y, x = down * height, right * width
        radius = max(shape) / 6
        bump = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / radius**2)
        scan = (bump * 255).astype(np.uint8)
        opened = open_samples(scan, preprocessing)
        _, maps = explain(engine, opened.image[None])
        picture = Image.open(io.BytesIO(render_map(maps[0, 0], opened.frame, STRIDE_PX)))
        alpha = np.asarray(picture)[..., 3].astype(float) ** 2
        assert alpha.shape == shape
        centre = (alpha * rows).sum() / alpha.sum(), (alpha * columns).sum() / alpha.sum()
        bright = scan.astype(float) ** 2
        expected = (bright * rows).sum() / bright.sum(), (bright * columns).sum() / bright.sum()
        # A third of a cell. Drawing the cells as tiles would shift the map by half a cell.
        tolerance = STRIDE_PX / 3 / 224 * max(shape)
        assert np.hypot(*np.subtract(centre, expected)) < tolerance
