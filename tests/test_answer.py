"""One scan's answer, from its bytes."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from brainray.model.answer import answer_scan, build_answer
from brainray.model.classifier import load_classifier
from brainray.inference.engine import EngineOptions, open_engine
from brainray.pixels.decode import REJECTION_REASONS, DecodeLimits

pytestmark = pytest.mark.usefixtures("one_thread")


def test_any_bytes_have_an_answer(tiny_classifier: Path, phantom_folder: Path) -> None:
    classifier = load_classifier(str(tiny_classifier))
    runtime = open_engine(
        classifier, EngineOptions(backend="torch", precision="fp32", num_threads=1)
    )
    scan = next(phantom_folder.glob("Testing/glioma/*")).read_bytes()
    opened = {"classifier": classifier, "runtime": runtime, "limits": DecodeLimits()}
    answer = answer_scan("a.jpg", scan, **opened)  # type: ignore[arg-type]
    assert (answer.name, answer.status, answer.reason) == ("a.jpg", "classified", None)
    assert answer.content_sha256 == sha256(scan).hexdigest()
    assert answer.probs is not None
    assert tuple(answer.probs) == classifier.classes
    assert answer.predicted_class == max(answer.probs, key=answer.probs.__getitem__)
    assert answer.confidence == max(answer.probs.values())
    assert sum(answer.probs.values()) == pytest.approx(1, abs=1e-5)
    for content, reason in ((b"", "empty"), (b"no", "not_an_image"), (scan[:500], "truncated")):
        answer = answer_scan(None, content, **opened)  # type: ignore[arg-type]
        assert (answer.status, answer.reason) == ("rejected", reason)
        assert answer.reason in REJECTION_REASONS
        assert answer.detail
        assert (answer.predicted_class, answer.probs, answer.width_px) == (None, None, None)
        assert answer.content_sha256 == sha256(content).hexdigest()


def test_height_and_width_are_told_apart() -> None:
    probs = np.array([0.25, 0.75], np.float32)
    answer = build_answer("a", "0", (2, 3), ("x", "y"), probs)
    assert (answer.height_px, answer.width_px) == (2, 3)
    assert (answer.predicted_class, answer.confidence) == ("y", np.float32(0.75))
