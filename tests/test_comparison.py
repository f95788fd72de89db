"""Two classifiers on the same images: statistics against published and independent values."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from brainray.errors import ConfigError, DataError
from brainray.metrics.comparison import (
    COMPARED,
    adjust_holm,
    compare_predictions,
    compute_delong,
    compute_delong_test,
    compute_mcnemar,
)
from brainray.pipelines.compare import CompareJob, compare
from brainray.storage import read_json
from tests.conftest import CLASSES


def test_mcnemar_gives_the_published_values() -> None:
    """Check the airway study of Fagerland et al. (2013), table 3: 1 and 7 discordant pairs."""
    right_a = np.array([True] * 1 + [False] * 7 + [True] * 13)
    right_b = np.array([False] * 1 + [True] * 7 + [True] * 13)
    found = compute_mcnemar(right_a, right_b)
    assert (found["only_a"], found["only_b"]) == (1, 7)
    assert found["p_exact"] == pytest.approx(0.0703, abs=5e-5)
    assert found["p_mid"] == pytest.approx(0.0391, abs=5e-5)


def test_mcnemar_without_a_difference_says_nothing() -> None:
    right = np.array([True, False, True])
    assert compute_mcnemar(right, right)["p_exact"] == 1.0


def test_holm_adjusts_in_order_and_passes_over_gaps() -> None:
    assert adjust_holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert adjust_holm([0.5, 0.9]) == [1.0, 1.0]


def draw_scores(num_images: int, seed: int) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    dice = np.random.default_rng(seed)
    is_positive = dice.random(num_images) < 0.4
    scores = dice.normal(is_positive * np.array([[0.6], [1.2]]), 1.0)
    return is_positive, scores.round(1)  # rounded, so that there are ties


def test_delong_equals_its_definition() -> None:
    is_positive, scores = draw_scores(60, seed=1)
    areas, covariance = compute_delong(is_positive, scores)
    wins = [  # psi of DeLong et al. (1988), equation 2: one for each positive and negative
        (row[is_positive][:, None] > row[~is_positive])
        + 0.5 * (row[is_positive][:, None] == row[~is_positive])
        for row in scores
    ]
    for at, row in enumerate(scores):
        assert areas[at] == pytest.approx(roc_auc_score(is_positive, row))
    by_positive = np.cov([one.mean(1) for one in wins]) / is_positive.sum()
    by_negative = np.cov([one.mean(0) for one in wins]) / (~is_positive).sum()
    np.testing.assert_allclose(covariance, by_positive + by_negative)


def test_delong_test_needs_two_images_of_each_kind() -> None:
    scores = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    assert compute_delong_test(np.array([True, False, False]), scores) is None


def test_equal_curves_do_not_differ() -> None:
    is_positive, scores = draw_scores(40, seed=2)
    found = compute_delong_test(is_positive, scores[[0, 0]])
    assert found is not None
    assert (found["difference"], found["p_value"], found["z"]) == (0.0, 1.0, None)


def draw_probs(truth: NDArray[np.int64], skill: float, seed: int) -> NDArray[np.float64]:
    logits = np.random.default_rng(seed).normal(size=(len(truth), 4))
    logits[np.arange(len(truth)), truth] += skill
    powers = np.exp(logits)
    return powers / powers.sum(1, keepdims=True)


def test_a_better_classifier_is_called_better_and_the_other_worse() -> None:
    truth = np.random.default_rng(0).integers(0, 4, 400)
    weak, strong = draw_probs(truth, 0.5, 1), draw_probs(truth, 4.0, 2)
    found = compare_predictions(truth, weak, strong, CLASSES, num_resamples=200)
    for name in COMPARED:
        assert found["scores"][name]["verdict"] == "better", name
    accuracy = found["scores"]["accuracy"]
    expected = accuracy_score(truth, strong.argmax(1)) - accuracy_score(truth, weak.argmax(1))
    assert accuracy["difference"] == pytest.approx(expected)
    low, high = accuracy["difference_ci95"]
    assert 0 < low < expected < high
    loss = found["scores"]["log_loss"]
    assert loss["difference"] == pytest.approx(log_loss(truth, strong) - log_loss(truth, weak))
    assert found["auroc"]["glioma"]["verdict"] == "better"
    swapped = compare_predictions(truth, strong, weak, CLASSES, num_resamples=200)
    assert {swapped["scores"][name]["verdict"] for name in COMPARED} == {"worse"}


def test_a_classifier_is_not_told_from_itself() -> None:
    truth = np.random.default_rng(0).integers(0, 4, 80)
    probs = draw_probs(truth, 1.0, 1)
    found = compare_predictions(truth, probs, probs, CLASSES, num_resamples=100)
    for name in COMPARED:
        assert found["scores"][name]["difference"] == 0
        assert found["scores"][name]["verdict"] == "cannot tell"


def test_a_single_primary_score_is_not_corrected() -> None:
    truth = np.random.default_rng(0).integers(0, 4, 120)
    weak, strong = draw_probs(truth, 1.0, 1), draw_probs(truth, 1.6, 2)
    found = compare_predictions(truth, weak, strong, CLASSES, primary="macro_f1", num_resamples=100)
    assert found["scores"]["macro_f1"]["p_adjusted"] == found["scores"]["macro_f1"]["p_value"]
    assert found["scores"]["accuracy"]["verdict"] is None
    with pytest.raises(ConfigError, match="Unknown score 'kappa'"):
        compare_predictions(truth, weak, strong, CLASSES, primary="kappa")


def test_images_of_one_group_are_less_evidence() -> None:
    truth = np.tile(np.arange(4), 10)
    weak, strong = draw_probs(truth, 1.0, 1), draw_probs(truth, 2.0, 2)
    copies = np.repeat(np.arange(40), 6)  # every image six times
    widths = {}
    for name, groups in (("alone", None), ("grouped", copies)):
        found = compare_predictions(
            truth[copies], weak[copies], strong[copies], CLASSES, groups=groups, num_resamples=400
        )
        low, high = found["scores"]["accuracy"]["difference_ci95"]
        widths[name] = high - low
    assert found["num_groups"] == 40
    assert widths["grouped"] / widths["alone"] == pytest.approx(6**0.5, rel=0.25)


# --- the job --------------------------------------------------------------------------------------


def write_predictions(place: Path, skill: float, **changes: Any) -> Path:  # noqa: ANN401
    truth = np.tile(np.arange(4), 12)
    probs = draw_probs(truth, skill, seed=int(skill * 10))
    columns: dict[str, Any] = {
        "path": [f"scan-{number}.jpg" for number in range(48)],
        "content_sha256": [f"{number:064x}" for number in range(48)],
        "true_class": [CLASSES[label] for label in truth],
        **{f"prob_{name}": probs[:, k] for k, name in enumerate(CLASSES)},
    } | changes
    place.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), place)
    return place


def test_tables_are_joined_whatever_their_order(tmp_path: Path) -> None:
    a = write_predictions(tmp_path / "a" / "predictions" / "test.parquet", 1.0)
    b = write_predictions(tmp_path / "b.parquet", 3.0)
    table = pq.read_table(b)
    straight = compare(CompareJob(a_uri=str(a), b_uri=str(b), num_resamples=100))
    pq.write_table(table.take(np.random.default_rng(0).permutation(48)), b)
    job = CompareJob(
        a_uri=str(tmp_path / "a"),
        b_uri=str(b),
        output_uri=str(tmp_path / "out"),
        num_resamples=100,
    )
    found = compare(job)
    assert found["scores"] == straight["scores"]
    assert found["join"]["by"] == "path"
    assert read_json(str(tmp_path / "out" / "compare.json"))["scores"] == found["scores"]


def test_a_data_set_that_moved_is_joined_by_content(tmp_path: Path) -> None:
    a = write_predictions(tmp_path / "a.parquet", 1.0)
    moved = [f"elsewhere/{number}.jpg" for number in range(48)]
    b = write_predictions(tmp_path / "b.parquet", 3.0, path=moved)
    found = compare(CompareJob(a_uri=str(a), b_uri=str(b), num_resamples=100))
    assert (found["join"]["by"], found["n"]) == ("content_sha256", 48)


def test_other_images_are_refused_unless_the_common_ones_are_asked_for(tmp_path: Path) -> None:
    a = write_predictions(tmp_path / "a.parquet", 1.0)
    b = write_predictions(tmp_path / "b.parquet", 3.0)
    pq.write_table(pq.read_table(b).slice(0, 40), b)
    with pytest.raises(DataError, match="8 are only in"):
        compare(CompareJob(a_uri=str(a), b_uri=str(b)))
    found = compare(CompareJob(a_uri=str(a), b_uri=str(b), common=True, num_resamples=100))
    assert (found["n"], found["join"]["num_only_a"]) == (40, 8)


def test_tables_that_disagree_on_the_truth_are_refused(tmp_path: Path) -> None:
    a = write_predictions(tmp_path / "a.parquet", 1.0)
    labels = [CLASSES[(number + (number == 7)) % 4] for number in range(48)]
    b = write_predictions(tmp_path / "b.parquet", 3.0, true_class=labels)
    with pytest.raises(DataError, match="1 of 48 images differ"):
        compare(CompareJob(a_uri=str(a), b_uri=str(b)))


def test_another_content_behind_a_path_is_refused(tmp_path: Path) -> None:
    a = write_predictions(tmp_path / "a.parquet", 1.0)
    b = write_predictions(tmp_path / "b.parquet", 3.0, content_sha256=["f" * 64] * 48)
    with pytest.raises(DataError, match="another content"):
        compare(CompareJob(a_uri=str(a), b_uri=str(b)))
