"""The sealed folder: what goes in comes out, and what was touched is refused."""

import hashlib
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
from brainray.model.calibration import fit_likeness
from brainray.model.classifier import (
    CARD_FILE,
    SCHEMA_VERSION,
    TRUST_FILE,
    WEIGHTS_FILE,
    amend_card,
    load_classifier,
    read_card,
    save_classifier,
)
from brainray.model.network import STAGE_WIDTHS, StateDict, build_network
from brainray.model.trust import Trust
from tests.reference import compute_eager, predict_eager

pytestmark = pytest.mark.usefixtures("one_thread")


CLASSES = ("pituitary", "glioma", "no tumour")
"""Not in alphabetical order: the order given is the one that counts."""
PREPROCESSING = Preprocessing(size_px=32, fit="pad", mean=0.3, std=0.5)
PROVENANCE = {"metrics": {"val_accuracy": 0.9}, "versions": {"torch": "2"}}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    network = build_network(len(CLASSES)).eval()
    with torch.no_grad():
        network.get_parameter("fc.weight").mul_(30)  # answers that differ between images
    return network


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory, network: torch.nn.Module) -> Path:
    """Seal a classifier; tests take copies."""
    folder = tmp_path_factory.mktemp("sealed") / "classifier"
    save_classifier(
        str(folder),
        network.state_dict(),
        classes=CLASSES,
        preprocessing=PREPROCESSING,
        provenance=PROVENANCE,
    )
    return folder


@pytest.fixture
def folder(sealed: Path, tmp_path: Path) -> Path:
    """Copy the sealed classifier; the weights are the same file until they are replaced."""
    copy = tmp_path / "classifier"
    copy.mkdir()
    os.link(sealed / WEIGHTS_FILE, copy / WEIGHTS_FILE)
    (copy / CARD_FILE).write_bytes((sealed / CARD_FILE).read_bytes())
    return copy


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    """Images that differ much: the first dark, the last bright."""
    noise = np.random.default_rng(0).integers(0, 60, (5, 32, 32))
    return (noise + 45 * np.arange(5)[:, None, None]).astype(np.uint8)


# --- opening ------------------------------------------------------------------------------


def test_what_was_sealed_is_what_is_opened(
    sealed: Path, network: torch.nn.Module, images: NDArray[np.uint8]
) -> None:
    classifier = load_classifier(str(sealed))
    assert classifier.classes == CLASSES
    assert classifier.preprocessing == PREPROCESSING
    assert not classifier.build_network().training
    assert classifier.card["metrics"] == PROVENANCE["metrics"]
    assert classifier.classifier_id == classifier.card["classifier_id"]

    probs = predict_eager(classifier, images)
    pixels = torch.from_numpy(images).float()[:, None] / 255
    with torch.no_grad():
        expected = network((pixels - 0.3) / 0.5).softmax(1).numpy()
    assert probs.dtype == np.float32
    assert probs.shape == (5, 3)
    np.testing.assert_allclose(probs, expected, atol=1e-5)
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-6)
    assert probs.std(axis=0).max() > 5e-3, "the images are too alike to tell anything"


def test_the_folder_holds_two_files_and_no_pickle(sealed: Path) -> None:
    assert sorted(path.name for path in sealed.iterdir()) == [CARD_FILE, WEIGHTS_FILE]
    content = (sealed / WEIGHTS_FILE).read_bytes()
    (header_bytes,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + header_bytes])  # what a safetensors file starts with
    assert header["conv1.weight"]["shape"] == [64, 1, 7, 7]
    card = json.loads((sealed / CARD_FILE).read_text())
    assert card["weights"]["size_bytes"] == len(content)
    assert card["classes"] == list(CLASSES)


# --- what was touched ---------------------------------------------------------------------


def refuse(folder: Path, *said: str) -> None:
    """Expect one line that says each of these."""
    with pytest.raises(ClassifierError) as caught:
        load_classifier(str(folder))
    message = str(caught.value)
    for part in (*said, str(folder)):
        assert part in message
    assert "\n" not in message


def test_missing_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "absent", "No classifier", CARD_FILE)
    refuse(tmp_path, "No classifier", CARD_FILE)


def test_missing_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    refuse(folder, f"No {WEIGHTS_FILE}")


@pytest.mark.parametrize("place", [8, 1_000_000, -1])
def test_flipped_byte_in_the_weights(folder: Path, place: int) -> None:
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[place] ^= 1
    (folder / WEIGHTS_FILE).unlink()  # a link to everyone's
    (folder / WEIGHTS_FILE).write_bytes(content)
    refuse(folder, "not the sealed ones", "SHA-256")


def test_weights_cut_short(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).write_bytes(b"")
    refuse(folder, "not the sealed ones")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", None], ids=["empty", "binary", "cut"])
def test_card_that_is_no_json(folder: Path, content: bytes | None) -> None:
    card = folder / CARD_FILE
    card.write_bytes(card.read_bytes()[:-40] if content is None else content)
    refuse(folder, "damaged", "JSON", CARD_FILE)


@pytest.mark.parametrize("card", [[], "text", None, {}])
def test_card_of_something_else(folder: Path, card: object) -> None:
    (folder / CARD_FILE).write_text(json.dumps(card))
    refuse(folder, f"schema {SCHEMA_VERSION}", "found None")


def edit(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Return what sets (or with ``...`` removes) a place of the card, as `weights.sha256`."""

    def change(card: dict[str, Any]) -> None:
        *above, last = path.split(".")
        for name in above:
            card = card[name]
        if value is ...:
            del card[last]
        else:
            card[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "said"),
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
        ("classes", ["a", "b", "a"], ["damaged", "more than once: a"]),
        ("classes", [1, 2, 3], ["damaged"]),
        ("weights.sha256", ..., ["not the sealed ones"]),
        ("weights", ..., ["lacks weights"]),
        ("weights", "model.safetensors", ["lacks weights"]),
        ("architecture", "resnet50", ["lacks architecture"]),
        ("classes", None, ["lacks classes"]),
        ("preprocessing", [], ["lacks preprocessing"]),
        ("classifier_id", ..., ["lacks classifier_id"]),
        ("trust", ..., ["lacks trust"]),
        ("trust.min_confidence", 0.2, ["classes, preprocessing, trust", "changed after"]),
        ("trust.scale", [2.0, 1.0, 1.0], ["changed after"]),
    ],
)
def test_card_that_was_changed(folder: Path, path: str, value: object, said: list[str]) -> None:
    card = read_card(str(folder))
    edit(path, value)(card)
    (folder / CARD_FILE).write_text(json.dumps(card))
    refuse(folder, *said)


# --- trust --------------------------------------------------------------------------------


@pytest.fixture
def wary(tmp_path: Path, network: torch.nn.Module) -> Path:
    """Seal a classifier that scales its logits and knows what its images are like."""
    folder = tmp_path / "wary"
    save_classifier(
        str(folder),
        network.state_dict(),
        classes=CLASSES,
        preprocessing=PREPROCESSING,
        provenance=PROVENANCE,
        trust=fit_some_trust(),
    )
    return folder


@cache
def fit_some_trust() -> Trust:
    features = np.random.default_rng(0).random((60, sum(STAGE_WIDTHS)), np.float32)
    return Trust(
        np.array([0.5, 1.0, 2.0], np.float32),
        np.array([0.1, 0.0, -0.1], np.float32),
        0.4,
        fit_likeness(features, np.repeat([0, 1, 2], 20), 3, STAGE_WIDTHS),
        90.0,
        {"method": "vector"},
    )


def test_trust_is_sealed_too(wary: Path, sealed: Path, images: NDArray[np.uint8]) -> None:
    classifier, plain = load_classifier(str(wary)), load_classifier(str(sealed))
    assert classifier.classifier_id != plain.classifier_id
    trust = classifier.trust
    assert (trust.min_confidence, trust.max_distance, trust.facts["method"]) == (0.4, 90, "vector")
    outputs = compute_eager(classifier, images)
    logits = outputs.logits * [0.5, 1.0, 2.0] + [0.1, 0.0, -0.1]
    np.testing.assert_allclose(predict_eager(classifier, images), softmax(logits, 1), atol=1e-6)
    np.testing.assert_allclose(predict_eager(plain, images), softmax(outputs.logits, 1), atol=1e-6)
    expected = fit_some_trust().compute_distances(outputs.features)
    np.testing.assert_allclose(trust.compute_distances(outputs.features), expected, rtol=1e-5)
    assert (plain.trust.compute_distances(outputs.features) == 0).all()


def test_damaged_likeness(wary: Path) -> None:
    content = bytearray((wary / TRUST_FILE).read_bytes())
    content[-1] ^= 1
    (wary / TRUST_FILE).write_bytes(content)
    refuse(wary, TRUST_FILE, "not the sealed ones")
    (wary / TRUST_FILE).unlink()
    refuse(wary, f"No {TRUST_FILE}")


def test_sealing_without_trust_leaves_none(wary: Path, network: torch.nn.Module) -> None:
    save_classifier(
        str(wary),
        network.state_dict(),
        classes=CLASSES,
        preprocessing=PREPROCESSING,
        provenance={},
    )
    assert sorted(path.name for path in wary.iterdir()) == [CARD_FILE, WEIGHTS_FILE]


def test_a_folder_of_the_first_schema_is_opened(folder: Path, images: NDArray[np.uint8]) -> None:
    card = read_card(str(folder))
    del card["trust"]
    meaning = {name: card[name] for name in ("classes", "preprocessing")}
    canonical = json.dumps([card["weights"]["sha256"], meaning], sort_keys=True)
    card |= {
        "schema_version": 1,
        "classifier_id": hashlib.sha256(canonical.encode()).hexdigest()[:12],
    }
    expected = predict_eager(load_classifier(str(folder)), images)
    (folder / CARD_FILE).write_text(json.dumps(card))
    classifier = load_classifier(str(folder))
    np.testing.assert_array_equal(predict_eager(classifier, images), expected)
    assert classifier.trust.find_reasons(expected, np.zeros(len(images), np.float32)) == [None] * 5
    amend_card(str(folder), {"note": 1})
    assert load_classifier(str(folder)).classifier_id == card["classifier_id"]


def test_a_folder_that_knows_neither_crop_nor_intensity_is_opened(folder: Path) -> None:
    card = read_card(str(folder))
    for name in ("crop", "intensity"):
        del card["preprocessing"][name]
    meaning = {name: card[name] for name in ("classes", "preprocessing", "trust")}
    canonical = json.dumps([card["weights"]["sha256"], meaning], sort_keys=True)
    card["classifier_id"] = hashlib.sha256(canonical.encode()).hexdigest()[:12]
    (folder / CARD_FILE).write_text(json.dumps(card))
    classifier = load_classifier(str(folder))
    assert classifier.preprocessing == PREPROCESSING
    assert (PREPROCESSING.crop, PREPROCESSING.intensity) == ("none", "stored")
    assert classifier.classifier_id == card["classifier_id"]


# --- identity -----------------------------------------------------------------------------

SMALL: StateDict = {
    "a": torch.arange(24.0).view(1, 2, 3, 4),
    "b": torch.tensor([1.0, -1.0]),
}


def seal(folder: Path, **changes: Any) -> str:  # noqa: ANN401 - any argument of save_classifier
    given: dict[str, Any] = {
        "state": SMALL,
        "classes": CLASSES,
        "preprocessing": PREPROCESSING,
        "provenance": PROVENANCE,
        **changes,
    }
    return save_classifier(str(folder), given.pop("state"), **given)


def test_identity_is_that_of_weights_classes_and_preprocessing(tmp_path: Path) -> None:
    same = [
        seal(tmp_path / "a"),
        seal(tmp_path / "elsewhere"),
        seal(tmp_path / "a", provenance={}),
        seal(tmp_path / "a", provenance={"seed": 7, "time": "now"}),
        seal(tmp_path / "a", classes=list(CLASSES)),
        seal(tmp_path / "a", state=dict(reversed(SMALL.items()))),
        seal(
            tmp_path / "a",
            state={**SMALL, "a": SMALL["a"].to(memory_format=torch.channels_last)},
        ),
        seal(tmp_path / "a", state={**SMALL, "b": torch.nn.Parameter(SMALL["b"])}),
    ]
    assert len(set(same)) == 1
    assert re.fullmatch("[0-9a-f]{12}", same[0])
    others = [
        seal(tmp_path / "a", state={**SMALL, "b": torch.tensor([1.0, -1.0000001])}),
        seal(tmp_path / "a", state={**SMALL, "c": torch.zeros(1)}),
        seal(tmp_path / "a", state={"a": SMALL["a"], "renamed": SMALL["b"]}),
        seal(tmp_path / "a", classes=CLASSES[::-1]),
        seal(tmp_path / "a", classes=("pituitary", "glioma", "notumor")),
        seal(tmp_path / "a", preprocessing=replace(PREPROCESSING, size_px=33)),
        seal(tmp_path / "a", preprocessing=replace(PREPROCESSING, fit="stretch")),
        seal(tmp_path / "a", preprocessing=replace(PREPROCESSING, crop="head")),
        seal(tmp_path / "a", preprocessing=replace(PREPROCESSING, intensity="percentile")),
        seal(tmp_path / "a", preprocessing=replace(PREPROCESSING, mean=0.31)),
        seal(tmp_path / "a", preprocessing=replace(PREPROCESSING, std=0.51)),
    ]
    assert len({same[0], *others}) == 1 + len(others)


def test_what_save_returns_is_what_the_card_says(tmp_path: Path) -> None:
    first = seal(tmp_path)
    assert read_card(str(tmp_path))["classifier_id"] == first
    second = seal(tmp_path, classes=CLASSES[::-1])  # what the folder held is replaced
    card = read_card(str(tmp_path))
    assert card["classifier_id"] == second != first
    assert card["classes"] == list(CLASSES[::-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD_FILE, WEIGHTS_FILE]


def test_amending_adds_and_keeps_the_rest(tmp_path: Path) -> None:
    seal(tmp_path)
    before, weights = read_card(str(tmp_path)), (tmp_path / WEIGHTS_FILE).read_bytes()
    amend_card(str(tmp_path), {"evaluation": {"accuracy": 0.5}})
    assert read_card(str(tmp_path)) == {**before, "evaluation": {"accuracy": 0.5}}
    amend_card(str(tmp_path), {"evaluation": {"accuracy": 0.75}})
    assert read_card(str(tmp_path)) == {**before, "evaluation": {"accuracy": 0.75}}
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == weights
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD_FILE, WEIGHTS_FILE]


def test_amending_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClassifierError, match="No classifier"):
        amend_card(str(tmp_path), {"evaluation": 1})
    assert list(tmp_path.iterdir()) == []
