"""The classifier bundle: it is loaded as it was saved, and a modified bundle is an error."""

import json
import os
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from brainray.errors import ClassifierError
from brainray.images.preprocess import Preprocessing
from brainray.model.calibration import Calibration
from brainray.model.classifier import (
    METADATA_FILE,
    OOD_FILE,
    SCHEMA_VERSION,
    WEIGHTS_FILE,
    amend_classifier_metadata,
    load_classifier,
    read_classifier_metadata,
    save_classifier,
)
from brainray.model.fit_calibration import fit_ood_detector
from brainray.model.network import STAGE_WIDTHS, StateDict, build_network
from tests.reference import compute_eager, predict_eager

pytestmark = pytest.mark.usefixtures("one_thread")


CLASSES = ("pituitary", "glioma", "no tumour")
"""Not in alphabetical order: a bundle keeps the given order."""
PREPROCESSING = Preprocessing(size_px=32, fit="pad", mean=0.3, std=0.5)
PROVENANCE = {"metrics": {"val_accuracy": 0.9}, "versions": {"torch": "2"}}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    network = build_network(len(CLASSES)).eval()
    with torch.no_grad():
        network.get_parameter("fc.weight").mul_(30)  # for probabilities that differ between images
    return network


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, network: torch.nn.Module) -> Path:
    """Save a classifier; tests modify copies of it."""
    folder = tmp_path_factory.mktemp("saved") / "classifier"
    save_classifier(
        str(folder),
        network.state_dict(),
        classes=CLASSES,
        preprocessing=PREPROCESSING,
        provenance=PROVENANCE,
    )
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Copy the classifier; the weights are a hard link to the original file."""
    copy = tmp_path / "classifier"
    copy.mkdir()
    os.link(saved / WEIGHTS_FILE, copy / WEIGHTS_FILE)
    (copy / METADATA_FILE).write_bytes((saved / METADATA_FILE).read_bytes())
    return copy


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    """Return images of very different brightness: the first is dark, the last bright."""
    noise = np.random.default_rng(0).integers(0, 60, (5, 32, 32))
    return (noise + 45 * np.arange(5)[:, None, None]).astype(np.uint8)


# --- loading ------------------------------------------------------------------------------


def test_a_saved_classifier_is_loaded_unchanged(
    saved: Path, network: torch.nn.Module, images: NDArray[np.uint8]
) -> None:
    classifier = load_classifier(str(saved))
    assert classifier.classes == CLASSES
    assert classifier.preprocessing == PREPROCESSING
    assert not classifier.build_network().training
    assert classifier.metadata["metrics"] == PROVENANCE["metrics"]
    assert classifier.classifier_id == classifier.metadata["classifier_id"]

    probs = predict_eager(classifier, images)
    pixels = torch.from_numpy(images).float()[:, None] / 255
    with torch.no_grad():
        expected = network((pixels - 0.3) / 0.5).softmax(1).numpy()
    assert probs.dtype == np.float32
    assert probs.shape == (5, 3)
    np.testing.assert_allclose(probs, expected, atol=1e-5)
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-6)
    assert probs.std(axis=0).max() > 5e-3, "the images are too similar for this test"


def test_the_folder_holds_two_files_and_no_pickle(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [METADATA_FILE, WEIGHTS_FILE]
    content = (saved / WEIGHTS_FILE).read_bytes()
    (header_bytes,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + header_bytes])  # a safetensors file starts with it
    assert header["conv1.weight"]["shape"] == [64, 1, 7, 7]
    metadata = json.loads((saved / METADATA_FILE).read_text())
    assert metadata["weights"]["size_bytes"] == len(content)
    assert metadata["classes"] == list(CLASSES)


# --- modified bundles ---------------------------------------------------------------------


def expect_error(folder: Path, *expected: str) -> None:
    """Expect an error of one line that contains each of these."""
    with pytest.raises(ClassifierError) as caught:
        load_classifier(str(folder))
    message = str(caught.value)
    for part in (*expected, str(folder)):
        assert part in message
    assert "\n" not in message


def test_missing_folder(tmp_path: Path) -> None:
    expect_error(tmp_path / "absent", "No classifier", METADATA_FILE)
    expect_error(tmp_path, "No classifier", METADATA_FILE)


def test_missing_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    expect_error(folder, f"No {WEIGHTS_FILE}")


@pytest.mark.parametrize("position", [8, 1_000_000, -1])
def test_flipped_byte_in_the_weights(folder: Path, position: int) -> None:
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[position] ^= 1
    (folder / WEIGHTS_FILE).unlink()  # a link to the file that all tests share
    (folder / WEIGHTS_FILE).write_bytes(content)
    expect_error(folder, "have changed", "SHA-256")


def test_truncated_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).write_bytes(b"")
    expect_error(folder, "have changed")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", None], ids=["empty", "binary", "cut"])
def test_metadata_that_is_not_json(folder: Path, content: bytes | None) -> None:
    metadata = folder / METADATA_FILE
    metadata.write_bytes(metadata.read_bytes()[:-40] if content is None else content)
    expect_error(folder, "damaged", "JSON", METADATA_FILE)


@pytest.mark.parametrize("metadata", [[], "text", None, {}])
def test_json_that_is_not_metadata(folder: Path, metadata: object) -> None:
    (folder / METADATA_FILE).write_text(json.dumps(metadata))
    expect_error(folder, f"schema {SCHEMA_VERSION}", "found None")


def edit(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Return a function that sets (or with ``...`` deletes) an entry, such as `weights.sha256`."""

    def change(metadata: dict[str, Any]) -> None:
        *above, last = path.split(".")
        for name in above:
            metadata = metadata[name]
        if value is ...:
            del metadata[last]
        else:
            metadata[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("schema_version", SCHEMA_VERSION + 1, [f"schema {SCHEMA_VERSION}", "found"]),
        ("schema_version", ..., [f"schema {SCHEMA_VERSION}", "found None"]),
        ("architecture.name", "resnet18", ["resnet50", "'resnet18'"]),
        ("preprocessing.rotation", 1, ["preprocessing", "rotation", "size_px"]),
        ("preprocessing.std", ..., ["preprocessing", "intensity, mean, size_px, std;", "size_px."]),
        ("preprocessing.crop", "brain", ["damaged", "crop must be none or head, got 'brain'"]),
        ("preprocessing.size_px", 5, ["damaged", "size_px"]),
        ("preprocessing.size_px", "large", ["damaged"]),
        ("classes", ["a", "b"], ["do not fit", "2 classes"]),
        ("classes", ["a", "b", "c", "d"], ["do not fit", "4 classes"]),
        ("classes", ["a", "b", "a"], ["damaged", "Repeated: a"]),
        ("classes", [1, 2, 3], ["damaged"]),
        ("weights.sha256", ..., ["have changed"]),
        ("weights", ..., ["lacks weights"]),
        ("weights", "model.safetensors", ["lacks weights"]),
        ("architecture", "resnet50", ["lacks architecture"]),
        ("classes", None, ["lacks classes"]),
        ("preprocessing", [], ["lacks preprocessing"]),
        ("classifier_id", ..., ["lacks classifier_id"]),
        ("calibration", ..., ["lacks calibration"]),
        (
            "calibration.min_confidence",
            0.2,
            ["classes, preprocessing, calibration", "changed after"],
        ),
        ("calibration.scale", [2.0, 1.0, 1.0], ["changed after"]),
    ],
)
def test_modified_metadata(folder: Path, path: str, value: object, expected: list[str]) -> None:
    metadata = read_classifier_metadata(str(folder))
    edit(path, value)(metadata)
    (folder / METADATA_FILE).write_text(json.dumps(metadata))
    expect_error(folder, *expected)


# --- calibration --------------------------------------------------------------------------------


@pytest.fixture
def calibrated(tmp_path: Path, network: torch.nn.Module) -> Path:
    """Save a classifier with a calibration and an out-of-distribution detector."""
    folder = tmp_path / "calibrated"
    save_classifier(
        str(folder),
        network.state_dict(),
        classes=CLASSES,
        preprocessing=PREPROCESSING,
        provenance=PROVENANCE,
        calibration=build_calibration(),
    )
    return folder


@cache
def build_calibration() -> Calibration:
    features = np.random.default_rng(0).random((60, sum(STAGE_WIDTHS)), np.float32)
    return Calibration(
        np.array([0.5, 1.0, 2.0], np.float32),
        np.array([0.1, 0.0, -0.1], np.float32),
        0.4,
        fit_ood_detector(features, np.repeat([0, 1, 2], 20), 3, STAGE_WIDTHS),
        90.0,
        {"method": "vector"},
    )


def test_calibration_is_saved_too(calibrated: Path, saved: Path, images: NDArray[np.uint8]) -> None:
    classifier, plain = load_classifier(str(calibrated)), load_classifier(str(saved))
    assert classifier.classifier_id != plain.classifier_id
    calibration = classifier.calibration
    assert (calibration.min_confidence, calibration.max_distance, calibration.facts["method"]) == (
        0.4,
        90,
        "vector",
    )
    outputs = compute_eager(classifier, images)
    logits = outputs.logits * [0.5, 1.0, 2.0] + [0.1, 0.0, -0.1]
    np.testing.assert_allclose(predict_eager(classifier, images), softmax(logits, 1), atol=1e-6)
    np.testing.assert_allclose(predict_eager(plain, images), softmax(outputs.logits, 1), atol=1e-6)
    expected = build_calibration().compute_distances(outputs.features)
    np.testing.assert_allclose(calibration.compute_distances(outputs.features), expected, rtol=1e-5)
    assert (plain.calibration.compute_distances(outputs.features) == 0).all()


def test_damaged_ood_detector(calibrated: Path) -> None:
    content = bytearray((calibrated / OOD_FILE).read_bytes())
    content[-1] ^= 1
    (calibrated / OOD_FILE).write_bytes(content)
    expect_error(calibrated, OOD_FILE, "have changed")
    (calibrated / OOD_FILE).unlink()
    expect_error(calibrated, f"No {OOD_FILE}")


def test_saving_without_calibration_deletes_the_old_one(
    calibrated: Path, network: torch.nn.Module
) -> None:
    save_classifier(
        str(calibrated),
        network.state_dict(),
        classes=CLASSES,
        preprocessing=PREPROCESSING,
        provenance={},
    )
    assert sorted(path.name for path in calibrated.iterdir()) == [METADATA_FILE, WEIGHTS_FILE]


# --- classifier id ------------------------------------------------------------------------

SMALL: StateDict = {
    "a": torch.arange(24.0).view(1, 2, 3, 4),
    "b": torch.tensor([1.0, -1.0]),
}


def export_classifier(folder: Path, **changes: Any) -> str:  # noqa: ANN401 - any argument of save_classifier
    given: dict[str, Any] = {
        "state": SMALL,
        "classes": CLASSES,
        "preprocessing": PREPROCESSING,
        "provenance": PROVENANCE,
        **changes,
    }
    return save_classifier(str(folder), given.pop("state"), **given)


def test_the_id_depends_on_weights_classes_and_preprocessing_only(tmp_path: Path) -> None:
    same = [
        export_classifier(tmp_path / "a"),
        export_classifier(tmp_path / "elsewhere"),
        export_classifier(tmp_path / "a", provenance={}),
        export_classifier(tmp_path / "a", provenance={"seed": 7, "time": "now"}),
        export_classifier(tmp_path / "a", classes=list(CLASSES)),
        export_classifier(tmp_path / "a", state=dict(reversed(SMALL.items()))),
        export_classifier(
            tmp_path / "a",
            state={**SMALL, "a": SMALL["a"].to(memory_format=torch.channels_last)},
        ),
        export_classifier(tmp_path / "a", state={**SMALL, "b": torch.nn.Parameter(SMALL["b"])}),
    ]
    assert len(set(same)) == 1
    assert re.fullmatch("[0-9a-f]{12}", same[0])
    others = [
        export_classifier(tmp_path / "a", state={**SMALL, "b": torch.tensor([1.0, -1.0000001])}),
        export_classifier(tmp_path / "a", state={**SMALL, "c": torch.zeros(1)}),
        export_classifier(tmp_path / "a", state={"a": SMALL["a"], "renamed": SMALL["b"]}),
        export_classifier(tmp_path / "a", classes=CLASSES[::-1]),
        export_classifier(tmp_path / "a", classes=("pituitary", "glioma", "notumor")),
        export_classifier(tmp_path / "a", preprocessing=replace(PREPROCESSING, size_px=33)),
        export_classifier(tmp_path / "a", preprocessing=replace(PREPROCESSING, fit="stretch")),
        export_classifier(tmp_path / "a", preprocessing=replace(PREPROCESSING, crop="head")),
        export_classifier(
            tmp_path / "a", preprocessing=replace(PREPROCESSING, intensity="percentile")
        ),
        export_classifier(tmp_path / "a", preprocessing=replace(PREPROCESSING, mean=0.31)),
        export_classifier(tmp_path / "a", preprocessing=replace(PREPROCESSING, std=0.51)),
    ]
    assert len({same[0], *others}) == 1 + len(others)


def test_the_returned_id_is_that_in_the_metadata(tmp_path: Path) -> None:
    first = export_classifier(tmp_path)
    assert read_classifier_metadata(str(tmp_path))["classifier_id"] == first
    second = export_classifier(tmp_path, classes=CLASSES[::-1])  # replaces the first
    metadata = read_classifier_metadata(str(tmp_path))
    assert metadata["classifier_id"] == second != first
    assert metadata["classes"] == list(CLASSES[::-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [METADATA_FILE, WEIGHTS_FILE]


def test_amending_metadata_keeps_the_other_entries(tmp_path: Path) -> None:
    export_classifier(tmp_path)
    before, weights = (
        read_classifier_metadata(str(tmp_path)),
        (tmp_path / WEIGHTS_FILE).read_bytes(),
    )
    amend_classifier_metadata(str(tmp_path), {"evaluation": {"accuracy": 0.5}})
    assert read_classifier_metadata(str(tmp_path)) == {**before, "evaluation": {"accuracy": 0.5}}
    amend_classifier_metadata(str(tmp_path), {"evaluation": {"accuracy": 0.75}})
    assert read_classifier_metadata(str(tmp_path)) == {**before, "evaluation": {"accuracy": 0.75}}
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == weights
    assert sorted(path.name for path in tmp_path.iterdir()) == [METADATA_FILE, WEIGHTS_FILE]


def test_amending_a_missing_classifier_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ClassifierError, match="No classifier"):
        amend_classifier_metadata(str(tmp_path), {"evaluation": 1})
    assert list(tmp_path.iterdir()) == []
