"""Every engine agrees with eager fp32 torch within the error of its precision."""

import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from brainray.errors import ConfigError
from brainray.images.preprocess import Preprocessing
from brainray.inference import engine_torch, int8
from brainray.inference.engine import (
    Engine,
    EngineOptions,
    open_engine,
    prepare_engine,
)
from brainray.inference.int8 import measure_disagreement
from brainray.model import precision as formats
from brainray.model.classifier import (
    Classifier,
    find_default_classifier,
    load_classifier,
    save_classifier,
)
from brainray.model.network import build_network, compute_features, normalise_images
from brainray.model.precision import has_native_bf16
from tests.conftest import REPOSITORY
from tests.open_scans import load_image
from tests.reference import predict_eager

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ("glioma", "meningioma", "notumor", "pituitary")
PREPROCESSING = Preprocessing(size_px=32, mean=0.2, std=0.3)
Images = NDArray[np.uint8]
GetEngine = Callable[..., Engine]
DESCRIPTION_ENDS = {"openvino": ", {}, 2 threads", "torch": ", {}, 1 thread"}

needs_bf16 = pytest.mark.skipif(
    not has_native_bf16(use_gpu=False), reason="this processor has no bf16 instructions"
)
needs_nncf = pytest.mark.skipif(
    find_spec("nncf") is None, reason="NNCF is not installed (pip install brainray[int8])"
)


def read_images(folder: Path, preprocessing: Preprocessing) -> Images:
    paths = sorted(path for path in folder.glob("*/*") if path.is_file())
    return np.stack([load_image(path.read_bytes(), preprocessing) for path in paths])


@pytest.fixture(scope="module")
def images(phantom_folder: Path) -> Images:
    """Return eight phantoms of each class, in class order."""
    return read_images(phantom_folder / "Testing", PREPROCESSING)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, images: Images) -> Path:
    """Save a classifier in which every layer has an effect and outputs differ between images."""
    torch.manual_seed(0)
    network = build_network(len(CLASSES))
    inputs = normalise_images(torch.from_numpy(images), PREPROCESSING)
    with torch.no_grad():
        for name, norm in network.named_modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                # bn3 starts at zero, which would switch off the residual branch before it.
                norm.weight.uniform_(*((0.1, 0.3) if name.endswith("bn3") else (0.3, 0.7)))
                norm.bias.normal_(0, 0.1)
                norm.momentum = None  # the statistics of these images, not a running mean
        network(inputs)
        features = compute_features(network.eval(), inputs)
        # The head projects on the leading principal components, to amplify rounding the least.
        mean = features.mean(0)
        _, scales, directions = torch.linalg.svd(features - mean, full_matrices=False)
        deviations = scales[: len(CLASSES)] / len(images) ** 0.5
        weight = directions[: len(CLASSES)] / deviations[:, None]
        network.get_parameter("fc.weight").copy_(weight)
        network.get_parameter("fc.bias").copy_(-weight @ mean)
    folder = tmp_path_factory.mktemp("bundle") / "classifier"
    save_classifier(
        str(folder),
        network.state_dict(),
        classes=CLASSES,
        preprocessing=PREPROCESSING,
        provenance={},
    )
    return folder


@pytest.fixture(scope="module")
def classifier(bundle: Path) -> Classifier:
    return load_classifier(str(bundle))


@pytest.fixture(scope="module")
def expected(classifier: Classifier, images: Images) -> NDArray[np.float32]:
    probs = predict_eager(classifier, images)
    assert probs.std(0).min() > 0.05, "the images are too similar for a comparison"
    return probs


@pytest.fixture(scope="module")
def get_engine(classifier: Classifier) -> GetEngine:
    """Return a function that opens an engine, once for each set of options."""
    engines: dict[EngineOptions, Engine] = {}

    def get(**chosen: Any) -> Engine:  # noqa: ANN401 - any option
        # Idle threads of torch spin: with several, tests take minutes on a busy machine.
        chosen.setdefault("num_threads", 1 if chosen.get("backend") == "torch" else 2)
        options = EngineOptions(**chosen)
        if options not in engines:
            engines[options] = open_engine(classifier, options)
        return engines[options]

    return get


# --- predictions --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_fp32_agrees_with_eager_torch(
    backend: str, get_engine: GetEngine, images: Images, expected: NDArray[np.float32]
) -> None:
    engine = get_engine(backend=backend, precision="fp32")
    assert (engine.backend, engine.precision) == (backend, "fp32")
    assert engine.description.lower().startswith(f"{backend} 2")
    assert engine.description.endswith(DESCRIPTION_ENDS[backend].format("fp32"))
    probs = engine.predict(images).probs
    assert probs.dtype == np.float32
    np.testing.assert_allclose(probs, expected, atol=1e-5)
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-6)


@needs_bf16
@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_bf16_is_close_to_fp32(
    backend: str, get_engine: GetEngine, images: Images, expected: NDArray[np.float32]
) -> None:
    engine = get_engine(backend=backend, precision="bf16")
    assert (engine.backend, engine.precision) == (backend, "bf16")
    assert engine.description.endswith(DESCRIPTION_ENDS[backend].format("bf16"))
    difference = np.abs(engine.predict(images).probs - expected).max()
    assert 1e-3 < difference < 5e-2, "not bf16, or not the same network"


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_openvino_predictions_are_bit_identical_in_any_batch_size(
    precision: str, get_engine: GetEngine, images: Images
) -> None:
    serial, parallel = (
        get_engine(backend="openvino", precision=precision, num_threads=n) for n in (1, 2)
    )
    batched = parallel.predict(images).probs
    assert serial.description.endswith(", 1 thread")
    for engine, sizes in ((serial, (32,)), (parallel, (1, 3, 5))):
        for size in sizes:
            parts = [
                engine.predict(images[start : start + size]).probs
                for start in range(0, len(images), size)
            ]
            assert np.array_equal(np.concatenate(parts), batched)


def test_torch_predictions_agree_in_any_batch_size(
    get_engine: GetEngine, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = get_engine(backend="torch", precision="fp32")
    batched = engine.predict(images).probs
    single = np.concatenate([engine.predict(image[None]).probs for image in images])
    np.testing.assert_allclose(single, batched, atol=1e-5)
    monkeypatch.setitem(engine_torch.BATCH_SIZE, "cpu", 5)  # 32 images are 7 batches
    np.testing.assert_allclose(engine.predict(images).probs, batched, atol=1e-5)


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_concurrent_threads_get_their_own_predictions(
    backend: str, get_engine: GetEngine, images: Images, expected: NDArray[np.float32]
) -> None:
    engine = get_engine(backend=backend, precision="fp32")
    parts = [slice(start, start + size) for start, size in ((0, 9), (9, 1), (10, 2), (12, 20))]
    with ThreadPoolExecutor(len(parts)) as pool:
        results = list(pool.map(lambda part: engine.predict(images[part]).probs, parts * 2))
    np.testing.assert_allclose(np.concatenate(results[:4]), expected, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(results[4:]), expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_no_images_give_no_predictions(backend: str, get_engine: GetEngine, images: Images) -> None:
    probs = get_engine(backend=backend, precision="fp32").predict(images[:0]).probs
    assert probs.shape == (0, len(CLASSES))
    assert probs.dtype == np.float32


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_images_may_be_read_only_and_strided(
    backend: str, get_engine: GetEngine, images: Images, expected: NDArray[np.float32]
) -> None:
    engine = get_engine(backend=backend, precision="fp32")
    view = images[::-2]
    view.flags.writeable = False  # as Ray returns arrays
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probs = engine.predict(view).probs
    np.testing.assert_allclose(probs, expected[::-2], atol=1e-5)


def test_opening_engines_does_not_change_the_classifier(
    bundle: Path, images: Images, expected: NDArray[np.float32]
) -> None:
    classifier = load_classifier(str(bundle))
    before = {name: values.copy() for name, values in classifier.weights.items()}
    for backend in ("torch", "openvino"):
        open_engine(classifier, EngineOptions(backend=backend)).predict(images[:1])
    assert list(classifier.weights) == list(before)
    assert all(np.array_equal(classifier.weights[name], before[name]) for name in before)
    np.testing.assert_allclose(predict_eager(classifier, images), expected, atol=1e-6)


# --- int8 ---------------------------------------------------------------------------------


def make_int8_options(folder: Path) -> EngineOptions:
    return EngineOptions(precision="int8", num_threads=2, calibration_uri=str(folder))


@needs_nncf
def test_int8_is_close_to_fp32_and_keeps_the_first_and_the_last_layer(
    classifier: Classifier,
    phantom_folder: Path,
    images: Images,
    expected: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    models: list[Any] = []
    serialise = int8._serialise
    monkeypatch.setattr(int8, "_serialise", lambda model: models.append(model) or serialise(model))
    engine = open_engine(classifier, make_int8_options(phantom_folder / "Testing"))
    assert capfd.readouterr() == ("", "")
    assert (engine.backend, engine.precision) == ("openvino", "int8")
    assert engine.description.endswith(", int8, 2 threads")
    found = measure_disagreement(expected, engine.predict(images).probs)
    cost = f"on 32 of the calibration images: {found['same_top_class']:.1%} have the same class"
    assert cost in engine.describe()["int8_cost"]
    assert 1e-3 < found["largest_difference"] < 0.3
    assert found["same_top_class"] > 0.85

    layers = [
        operation
        for operation in models[0].get_ordered_ops()
        if operation.get_type_name() in ("Convolution", "MatMul")
    ]
    weights = [layer.input_value(1).get_node() for layer in layers]
    are_scaled = [node.get_type_name() == "Multiply" for node in weights]
    assert are_scaled == [False, *[True] * 52, False]
    for layer, node in zip(layers[1:-1], weights[1:-1], strict=True):
        integers = node.input_value(0).get_node().input_value(0)
        assert integers.get_element_type().get_type_name() == "i8"
        channels = layer.output(0).get_shape()[1]
        assert node.input_value(1).get_shape() == [channels, 1, 1, 1], "not scaled per channel"


@needs_nncf
def test_int8_is_calibrated_on_images_of_every_class(
    classifier: Classifier,
    phantom_folder: Path,
    images: Images,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import nncf

    class Stopped(Exception):  # noqa: N818 - ends the calibration, and carries its images
        pass

    def stop(chosen: Images, _: object) -> None:
        raise Stopped(chosen)

    monkeypatch.setattr(nncf, "Dataset", stop)
    monkeypatch.setattr("brainray.inference.int8.NUM_CALIBRATION_IMAGES", 8)
    with pytest.raises(Stopped) as caught:
        open_engine(classifier, make_int8_options(phantom_folder / "Testing"))
    (chosen,) = caught.value.args
    indices = [int(np.flatnonzero((images == image).all((1, 2)))[0]) for image in chosen]
    assert [index // 8 for index in indices] == [0, 0, 1, 1, 2, 2, 3, 3]


def check_config_error(classifier: Classifier, *texts: str, **chosen: Any) -> None:  # noqa: ANN401
    """Check that opening raises a ConfigError of one line that has all texts."""
    with pytest.raises(ConfigError) as caught:
        open_engine(classifier, EngineOptions(**chosen))
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert text in message


def test_int8_without_images_is_rejected(classifier: Classifier, tmp_path: Path) -> None:
    check_config_error(classifier, "int8", "--calibration-uri", precision="int8")
    (tmp_path / "notes.txt").write_text("no scan")
    check_config_error(
        classifier, "None of the 1 files", precision="int8", calibration_uri=str(tmp_path)
    )


def test_int8_without_nncf_is_rejected(
    classifier: Classifier, phantom_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    folder = str(phantom_folder / "Testing")
    check_config_error(classifier, "brainray[int8]", precision="int8", calibration_uri=folder)


# --- choice of backend and precision ------------------------------------------------------


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_selects_bf16_if_the_processor_has_it(
    has_bf16: bool, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"avx512f", "avx512_bf16"} if has_bf16 else {"avx512f"}
    monkeypatch.setattr(formats, "read_cpu_flags", lambda: frozenset(flags))
    engine = open_engine(classifier, EngineOptions())
    assert engine.backend == "openvino"
    assert engine.precision == ("bf16" if has_bf16 else "fp32")
    assert f", {len(os.sched_getaffinity(0))} thread" in engine.description


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_emulated_bf16_is_rejected(
    backend: str, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "read_cpu_flags", lambda: frozenset({"avx512f"}))
    check_config_error(
        classifier, "processor", "--precision fp32", backend=backend, precision="bf16"
    )


def test_bf16_detection_agrees_with_torch() -> None:
    found = torch.cpu.get_capabilities()
    expected = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    assert has_native_bf16(use_gpu=False) is expected


def test_a_missing_gpu_is_rejected(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_config_error(classifier, "--use-gpu", "torch finds no GPU", use_gpu=True)


def test_contradictory_options_are_rejected(classifier: Classifier) -> None:
    check_config_error(classifier, "--backend torch", use_gpu=True, backend="openvino")
    check_config_error(classifier, "--backend openvino", backend="torch", precision="int8")
    with pytest.raises(ConfigError, match="num_threads"):
        EngineOptions(num_threads=0)


# --- disagreement -------------------------------------------------------------------------


def test_disagreement_is_measured() -> None:
    reference = np.array([[0.6, 0.4], [0.2, 0.8], [0.5, 0.5], [1, 0]], np.float32)
    probs = np.array([[0.45, 0.55], [0.25, 0.75], [0.5, 0.5], [0.9, 0.1]], np.float32)
    assert measure_disagreement(reference, probs) == {
        "largest_difference": pytest.approx(0.15),
        "same_top_class": 0.75,
        "n": 4,
    }
    assert measure_disagreement(reference, reference)["largest_difference"] == 0
    empty = measure_disagreement(reference[:0], probs[:0])
    assert empty == {
        "largest_difference": pytest.approx(np.nan, nan_ok=True),
        "same_top_class": pytest.approx(np.nan, nan_ok=True),
        "n": 0,
    }


# --- side effects -------------------------------------------------------------------------

OPEN_IN_A_NEW_PROCESS = """
import sys
from pathlib import Path
import numpy as np
from brainray.inference import engine
from brainray.model.classifier import load_classifier

classifier = load_classifier(sys.argv[1])
assert not {"openvino", "nncf", "ray"} & set(sys.modules), "imported before it is needed"
before = sorted(Path.home().rglob("*"))
opened = engine.open_engine(classifier, engine.EngineOptions())
assert opened.predict(np.zeros((4, 32, 32), np.uint8)).probs.shape == (4, 4)
if "nncf" in sys.argv:
    from brainray.inference.int8 import _import_nncf
    _import_nncf()
assert "openvino" in sys.modules
assert "torch" not in sys.modules, "OpenVINO needs no torch"
assert "openvino_telemetry" not in sys.modules, "telemetry was imported"
assert sorted(Path.home().rglob("*")) == before
"""


def test_opening_prints_nothing_writes_no_files_and_sends_no_telemetry(
    bundle: Path, tmp_path: Path
) -> None:
    extra = ["nncf"] if find_spec("nncf") else []
    homes = {name: str(tmp_path) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", OPEN_IN_A_NEW_PROCESS, str(bundle), *extra],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            **homes,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


EXIT_DURING_A_CALLBACK = """
import sys, time
import numpy as np
from brainray.inference import engine, engine_openvino
from brainray.model.classifier import load_classifier

keep_output = engine_openvino._keep_output

def delay(request, index):
    keep_output(request, index)
    time.sleep(0.1)

engine_openvino._keep_output = delay
options = engine.EngineOptions(backend="openvino", num_threads=2)
opened = engine.open_engine(load_classifier(sys.argv[1]), options)
opened.predict(np.zeros((4, 32, 32), np.uint8)).probs
"""


OPEN_WITHOUT_TORCH = """
import pickle, sys
import numpy as np

engine = pickle.load(open(sys.argv[1], "rb"))()
probs = engine.predict(np.load(sys.argv[2]), ["logits", "features", "class_maps"]).probs
assert not {"torch", "ray", "sklearn"} & set(sys.modules), "an unneeded library was imported"
np.save(sys.argv[3], probs)
"""


def test_a_pickled_engine_opens_in_another_process_without_torch(
    bundle: Path, get_engine: GetEngine, images: Images, tmp_path: Path
) -> None:
    options = EngineOptions(num_threads=2)
    (tmp_path / "engine").write_bytes(pickle.dumps(prepare_engine(str(bundle), options)))
    np.save(tmp_path / "images.npy", images)
    files = [str(tmp_path / name) for name in ("engine", "images.npy", "probs.npy")]
    done = subprocess.run(
        [sys.executable, "-c", OPEN_WITHOUT_TORCH, *files],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = get_engine(backend="openvino").predict(images, ["class_maps"]).probs
    np.testing.assert_allclose(np.load(tmp_path / "probs.npy"), expected, atol=1e-6)


def test_a_process_may_exit_right_after_a_prediction(bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXIT_DURING_A_CALLBACK, str(bundle)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- real images --------------------------------------------------------------------------


@pytest.mark.slow
@needs_bf16
@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_bf16_on_real_images(backend: Any, real_data: Path) -> None:  # noqa: ANN401 - a literal
    classifier = load_classifier(find_default_classifier())
    images = read_images(real_data / "Testing", classifier.preprocessing)
    exact = open_engine(classifier, EngineOptions(precision="fp32")).predict(images).probs
    rounded = open_engine(classifier, EngineOptions(backend=backend, precision="bf16"))
    found = measure_disagreement(exact, rounded.predict(images).probs)
    assert found["n"] > 100
    assert found["largest_difference"] < 5e-2, found
    assert found["same_top_class"] >= 0.995, found
