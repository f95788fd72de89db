"""The shipped classifier: complete, small, and as accurate as its card says."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from brainray.evaluation.scoring import MODEL_CARD_FILE
from brainray.inference.engine import EngineOptions, open_engine
from brainray.labels import BRAIN_TUMOUR_CLASSES
from brainray.model.classifier import (
    METADATA_FILE,
    OOD_FILE,
    SHIPPED_FOLDER,
    WEIGHTS_FILE,
    load_classifier,
    read_classifier_metadata,
)
from tests.conftest import REPOSITORY
from tests.open_scans import load_image

MAX_BYTES = 50e6


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    return read_classifier_metadata(str(SHIPPED_FOLDER))


def test_it_is_complete_and_small() -> None:
    files = sorted(path.name for path in SHIPPED_FOLDER.iterdir())
    assert files == sorted([METADATA_FILE, OOD_FILE, WEIGHTS_FILE, MODEL_CARD_FILE])
    assert sum(path.stat().st_size for path in SHIPPED_FOLDER.iterdir()) < MAX_BYTES
    assert load_classifier(str(SHIPPED_FOLDER)).classes == BRAIN_TUMOUR_CLASSES
    header = safetensors.safe_open(SHIPPED_FOLDER / WEIGHTS_FILE, "pt")
    dtypes = {header.get_slice(name).get_dtype() for name in header.keys()}  # noqa: SIM118
    assert dtypes == {"BF16", "F32", "I64"}


def test_it_contains_no_path_of_the_training_machine() -> None:
    for name in (METADATA_FILE, MODEL_CARD_FILE):
        text = (SHIPPED_FOLDER / name).read_text()
        assert not re.findall(r"(?<![\w.])/(?:home|root|tmp|work|mnt|Users)/\S*", text), name


def test_readme_and_results_match_its_card(card: dict[str, Any]) -> None:
    test, val = card["metrics"]["test"], card["metrics"]["val"]
    thumbnails = test["baseline_1nn"]
    for document in ("README.md", "docs/results.md"):
        text = (REPOSITORY / document).read_text().replace("**", "")
        for found in (
            test,
            test["without_near_duplicates"],
            thumbnails,
            thumbnails["without_near_duplicates"],
        ):
            low, high = found["accuracy_ci95"]
            assert f"{found['accuracy']:.3f} [{low:.3f}, {high:.3f}]" in text, document
    low, high = val["accuracy_ci95"]
    assert f"{val['accuracy']:.3f} [{low:.3f}, {high:.3f}]" in text
    assert card["classifier_id"] in text


def test_its_test_accuracy_matches_its_card(card: dict[str, Any], real_data: Path) -> None:
    classifier = load_classifier(str(SHIPPED_FOLDER))
    paths = sorted((real_data / "Testing").glob("*/*.jpg"))
    images = np.stack([load_image(path.read_bytes(), classifier.preprocessing) for path in paths])
    probs = open_engine(classifier, EngineOptions()).predict(images).probs
    y_true = [classifier.classes.index(path.parent.name) for path in paths]
    reported = card["metrics"]["test"]
    assert len(paths) == reported["n"]
    accuracy = float((probs.argmax(1) == y_true).mean())
    assert accuracy == pytest.approx(reported["accuracy"], abs=0.005), "apart from rounding"
