"""Scores against scikit-learn and by hand; intervals by coverage; curves; errors."""

import json
import warnings
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve
from sklearn.exceptions import UndefinedMetricWarning

from brainray.errors import ConfigError, DataError
from brainray.metrics import (
    compute_accuracy,
    compute_curves,
    compute_evaluation,
    compute_risk_coverage,
    scores,
    summarise,
)

Array: TypeAlias = NDArray[Any]

CLASSES = ("a", "b", "c", "d")
PER_CLASS = ("precision", "sensitivity", "specificity", "f1", "auroc", "ap")
HIGHER_IN_0_1 = (
    "accuracy",
    "balanced_accuracy",
    "macro_precision",
    "macro_sensitivity",
    "macro_specificity",
    "macro_f1",
    "macro_auroc",
    "macro_ap",
)
OVERALL = (*HIGHER_IN_0_1, "mcc", "log_loss", "brier", "ece")


def draw(seed: int, n: int = 300, skill: float = 1.0) -> tuple[Array, Array]:
    """Draw labels, and probabilities in steps of 1/20: most are tied, and some are 0."""
    rng = np.random.default_rng(seed)
    y_true = rng.choice(4, size=n, p=[0.4, 0.3, 0.2, 0.1])
    logits = rng.normal(size=(n, 4)) * 1.5
    logits[np.arange(n), y_true] += skill
    exact = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    twentieths = np.floor(exact * 20)
    twentieths[np.arange(n), exact.argmax(axis=1)] += 20 - twentieths.sum(axis=1)
    return y_true, twentieths / 20


def compute_reference(
    y_true: Array, y_prob: Array, weights: Array | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Compute every score but the calibration error as scikit-learn defines it."""
    y_pred = y_prob.argmax(axis=1)
    given = {"sample_weight": weights}
    plain = {"average": None, "zero_division": 0, **given}
    table = sk.multilabel_confusion_matrix(y_true, y_pred, labels=range(4), sample_weight=weights)
    per_class = {
        "precision": sk.precision_score(y_true, y_pred, **plain),
        "sensitivity": sk.recall_score(y_true, y_pred, **plain),
        "specificity": table[:, 0, 0] / table[:, 0].sum(axis=1),
        "f1": sk.f1_score(y_true, y_pred, **plain),
        "auroc": [sk.roc_auc_score(y_true == k, y_prob[:, k], **given) for k in range(4)],
        "ap": [sk.average_precision_score(y_true == k, y_prob[:, k], **given) for k in range(4)],
    }
    overall = {f"macro_{name}": float(np.mean(values)) for name, values in per_class.items()}
    overall |= {
        "accuracy": sk.accuracy_score(y_true, y_pred, **given),
        "balanced_accuracy": sk.balanced_accuracy_score(y_true, y_pred, **given),
        "mcc": sk.matthews_corrcoef(y_true, y_pred, **given),
        "log_loss": sk.log_loss(y_true, y_prob, labels=range(4), **given),
        "brier": sk.brier_score_loss(y_true, y_prob, labels=range(4), scale_by_half=False, **given),
    }
    return overall, per_class


def drop_ece(numbers: dict[str, Any]) -> dict[str, float]:
    return {name: numbers[name] for name in OVERALL if name != "ece"}


# -- values ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_every_value_equals_scikit_learn(seed: int) -> None:
    y_true, y_prob = draw(seed)
    overall, per_class = compute_reference(y_true, y_prob, None)
    got = compute_evaluation(y_true, y_prob, CLASSES, num_resamples=0)

    assert drop_ece(got) == pytest.approx(overall, abs=1e-12)
    for name in PER_CLASS:
        values = [got["per_class"][c][name] for c in CLASSES]
        assert values == pytest.approx(list(per_class[name]), abs=1e-12), name
    assert got["confusion"] == sk.confusion_matrix(y_true, y_prob.argmax(axis=1)).tolist()
    assert [got["per_class"][c]["n"] for c in CLASSES] == np.bincount(y_true).tolist()
    assert (got["n"], got["num_groups"]) == (300, 300)


@pytest.mark.parametrize("integral", [True, False])
def test_weighted_values_equal_scikit_learn(integral: bool) -> None:
    """Compares the rows of bootstrap weights with ``sample_weight``."""
    y_true, y_prob = draw(7)
    rng = np.random.default_rng(0)
    shape = (6, y_true.size)
    weights = rng.poisson(1, shape).astype(float) if integral else rng.uniform(0.1, 3, shape)
    values = scores.add_macro_averages(scores.build_scorer(y_true, y_prob)(weights))

    for row, weight in enumerate(weights):
        overall, per_class = compute_reference(y_true, y_prob, weight)
        assert {name: values[name][row] for name in overall} == pytest.approx(overall, abs=1e-11)
        for name in PER_CLASS:
            assert values[name][row] == pytest.approx(np.array(per_class[name])), name


def test_a_weighted_image_counts_as_a_repeated_one() -> None:
    """Covers the calibration error, for which scikit-learn has no weights."""
    y_true, y_prob = draw(8)
    weights = np.random.default_rng(0).poisson(1, y_true.size)
    weighted = scores.build_scorer(y_true, y_prob)(weights[None].astype(float))
    repeated = compute_evaluation(
        np.repeat(y_true, weights), np.repeat(y_prob, weights, axis=0), CLASSES, num_resamples=0
    )
    for name in ("accuracy", "mcc", "log_loss", "brier", "ece"):
        assert weighted[name][0] == pytest.approx(repeated[name], abs=1e-12), name


def test_calibration_error_and_brier_by_hand() -> None:
    """Bins of 1/15, closed above: 0.9 and 0.92 share (13/15, 14/15]; 0.8 is the end of a bin.

    Bin of 0.9, 0.92: accuracy 1/2, confidence 0.91, gap 0.41, half of the images.
    Bin of 0.8: accuracy 1, gap 0.2. Bin just above 0.8: accuracy 0, gap 0.81. A quarter each.
    """
    y_prob = np.array([[0.9, 0.1], [0.92, 0.08], [0.8, 0.2], [0.81, 0.19]])
    got = compute_evaluation([0, 1, 0, 1], y_prob, ("a", "b"), num_resamples=0)
    assert got["ece"] == pytest.approx(0.5 * 0.41 + 0.25 * 0.2 + 0.25 * 0.81)
    assert got["brier"] == pytest.approx(2 * (0.1**2 + 0.92**2 + 0.2**2 + 0.81**2) / 4)


def test_log_loss_of_a_mistake_with_probability_1_is_finite() -> None:
    y_prob = np.array([[1.0, 0.0], [0.0, 1.0]])
    got = compute_evaluation([1, 1], y_prob, ("a", "b"), num_resamples=0)
    assert got["log_loss"] == pytest.approx(sk.log_loss([1, 1], y_prob, labels=[0, 1]))
    assert got["log_loss"] == pytest.approx(-np.log(np.finfo(float).eps) / 2)


def test_single_precision_rows_are_accepted_and_not_normalised() -> None:
    y_true, y_prob = draw(2)
    rounded = y_prob.astype(np.float32) * np.float32(0.9995)
    got = compute_evaluation(y_true, rounded, CLASSES, num_resamples=0)
    want = compute_evaluation(y_true, y_prob, CLASSES, num_resamples=0)
    assert got["macro_auroc"] == pytest.approx(want["macro_auroc"], abs=1e-12)
    assert got["log_loss"] > want["log_loss"]  # not normalised


def test_summarise_and_accuracy_agree_with_the_evaluation() -> None:
    y_true, y_prob = draw(3)
    groups = np.arange(y_true.size) // 3
    full = compute_evaluation(y_true, y_prob, CLASSES, groups=groups, num_resamples=200)
    hard = compute_accuracy(y_true, y_prob.argmax(axis=1), groups=groups, num_resamples=200)
    names = ("accuracy", "balanced_accuracy", "macro_f1")
    assert list(hard) == ["n", "num_groups", *(n + s for n in names for s in ("", "_ci95"))]
    for key, value in hard.items():
        assert value == pytest.approx(full[key], abs=1e-12), key

    brief = summarise(y_true, y_prob, CLASSES)
    assert brief == pytest.approx(
        {"loss": full["log_loss"]} | {name: full[name] for name in (*names, "macro_auroc")}
    )


def test_result_is_json_with_exactly_the_documented_keys() -> None:
    got = compute_evaluation(*draw(1), CLASSES, num_resamples=20)
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    both = [name + suffix for name in OVERALL for suffix in ("", "_ci95")]
    assert set(got) == {"n", "num_groups", "confusion", "per_class", *both}
    both = [name + suffix for name in PER_CLASS for suffix in ("", "_ci95")]
    assert set(got["per_class"]["a"]) == {"n", *both}

    without = json.dumps(compute_evaluation(*draw(1), CLASSES, num_resamples=0))
    assert "ci95" not in without


# -- undefined values ------------------------------------------------------------------


def test_scores_of_an_absent_class_are_none_and_not_in_macro_averages() -> None:
    y_true, y_prob = draw(4)
    kept = y_true != 3
    y_true, y_prob = y_true[kept], y_prob[kept]
    y_pred = y_prob.argmax(axis=1)
    assert (y_pred == 3).any()
    got = compute_evaluation(y_true, y_prob, CLASSES, num_resamples=50)

    absent = got["per_class"]["d"]
    for name in ("sensitivity", "auroc", "ap"):
        assert absent[name] is None
        assert absent[f"{name}_ci95"] is None
        rest = [got["per_class"][c][name] for c in "abc"]
        assert got[f"macro_{name}"] == pytest.approx(np.mean(rest))
        low, high = got[f"macro_{name}_ci95"]
        assert low < got[f"macro_{name}"] < high
    assert (absent["n"], absent["precision"], absent["f1"]) == (0, 0.0, 0.0)
    assert absent["specificity"] == pytest.approx((y_pred != 3).mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert got["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y_true, y_pred))
    assert got["macro_f1"] == pytest.approx(sk.f1_score(y_true, y_pred, average="macro"))
    assert got["macro_precision"] == pytest.approx(
        sk.precision_score(y_true, y_pred, average="macro", zero_division=0)
    )


def test_class_neither_present_nor_predicted_is_ignored() -> None:
    y_true, y_prob = draw(5)
    four = np.hstack([y_prob, np.zeros((y_true.size, 1))])
    got = compute_evaluation(y_true, four, (*CLASSES, "e"), num_resamples=0)
    want = compute_evaluation(y_true, y_prob, CLASSES, num_resamples=0)
    assert got["per_class"]["e"] == {
        "n": 0,
        "specificity": 1.0,
        **dict.fromkeys(("precision", "sensitivity", "f1", "auroc", "ap")),
    }
    for name in set(OVERALL) - {"macro_specificity"}:
        assert got[name] == pytest.approx(want[name], abs=1e-12), name


def test_class_never_predicted_has_precision_0_not_none() -> None:
    y_prob = np.tile([0.6, 0.4], (4, 1))
    got = compute_evaluation([0, 0, 0, 1], y_prob, ("a", "b"), num_resamples=0)
    assert got["per_class"]["b"]["precision"] == 0.0
    assert got["macro_precision"] == pytest.approx(0.75 / 2)
    assert got["mcc"] == 0.0
    assert got["per_class"]["b"]["auroc"] == 0.5  # all tied


def test_a_single_true_class_raises_no_error_or_warning() -> None:
    y_prob = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = compute_evaluation([0, 0, 0], y_prob, ("a", "b"), num_resamples=50)
        curves = compute_curves([0, 0, 0], y_prob, ("a", "b"))["per_class"]
        brief = summarise([0, 0, 0], y_prob, ("a", "b"))
    assert got["mcc"] is got["mcc_ci95"] is got["macro_auroc"] is got["macro_auroc_ci95"] is None
    assert got["per_class"]["a"]["specificity"] is None
    assert got["balanced_accuracy"] == got["accuracy"] == pytest.approx(2 / 3)
    assert np.isnan(brief["macro_auroc"])
    assert brief["balanced_accuracy"] == pytest.approx(2 / 3)
    assert curves["a"]["roc"]["fpr"] == curves["b"]["pr"]["recall"] == []
    assert curves["a"]["pr"]["precision"][-1] == 1.0


# -- intervals -------------------------------------------------------------------------


def test_accuracy_interval_has_a_coverage_of_about_95_percent() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        y_true = rng.integers(4, size=150)
        y_pred = np.where(rng.random(150) < 0.8, y_true, (y_true + 1) % 4)
        low, high = compute_accuracy(y_true, y_pred, num_resamples=400, seed=trial)["accuracy_ci95"]
        covered += low <= 0.8 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_interval_has_the_width_of_the_normal_approximation() -> None:
    y_true, y_prob = draw(0, n=2000)
    got = compute_evaluation(y_true, y_prob, CLASSES, num_resamples=1500)
    accuracy, (low, high) = got["accuracy"], got["accuracy_ci95"]
    width = 2 * 1.96 * np.sqrt(accuracy * (1 - accuracy) / 2000)
    assert high - low == pytest.approx(width, rel=0.12)
    assert (low + high) / 2 == pytest.approx(accuracy, abs=width / 20)


def test_grouped_duplicates_do_not_narrow_the_interval() -> None:
    y_true, y_prob = draw(9, n=150)
    tenfold = np.repeat(y_true, 10), np.repeat(y_prob, 10, axis=0)
    names = np.repeat(np.random.default_rng(0).permutation(150) * 7 - 400, 10)
    single = compute_evaluation(y_true, y_prob, CLASSES, num_resamples=800)
    grouped = compute_evaluation(*tenfold, CLASSES, groups=names, num_resamples=800)
    ignored = compute_evaluation(*tenfold, CLASSES, num_resamples=800)

    assert (grouped["n"], grouped["num_groups"]) == (1500, 150)
    for name in ("accuracy", "macro_f1", "macro_auroc", "macro_ap", "mcc", "log_loss"):
        widths = [float(np.ptp(one[f"{name}_ci95"])) for one in (single, grouped, ignored)]
        assert grouped[name] == pytest.approx(single[name]), name
        assert widths[1] == pytest.approx(widths[0], rel=0.15), name
        assert widths[2] == pytest.approx(widths[0] / np.sqrt(10), rel=0.15), name


def test_intervals_depend_on_the_seed_and_not_on_the_chunk_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = draw(6)
    first = compute_evaluation(*data, CLASSES, num_resamples=60, seed=3)
    other = compute_evaluation(*data, CLASSES, num_resamples=60, seed=4)
    assert compute_evaluation(*data, CLASSES, num_resamples=60, seed=3) == first
    assert other["accuracy"] == first["accuracy"]
    assert other["accuracy_ci95"] != first["accuracy_ci95"]

    monkeypatch.setattr(scores, "WEIGHTS_PER_CHUNK", 7 * 300)
    chunks = list(scores.draw_weights(np.arange(300), 60, 3))
    assert [chunk.shape for chunk in chunks] == [(7, 300)] * 8 + [(4, 300)]
    chunked = compute_evaluation(*data, CLASSES, num_resamples=60, seed=3)
    for name in OVERALL:
        assert chunked[f"{name}_ci95"] == pytest.approx(first[f"{name}_ci95"], abs=1e-12), name


def test_resamples_without_a_rare_class_are_left_out() -> None:
    """Class b has one image, with AUROC 1. Without it the AUROC is undefined, not 0."""
    y_prob = np.tile([0.8, 0.2], (20, 1))
    y_prob[0] = [0.3, 0.7]
    y_true = np.array([1] + [0] * 19)
    got = compute_evaluation(y_true, y_prob, ("a", "b"), num_resamples=300)
    for name in ("auroc", "sensitivity", "ap"):
        assert got["per_class"]["b"][f"{name}_ci95"] == [1.0, 1.0]
        assert got[f"macro_{name}_ci95"] == [1.0, 1.0]


@pytest.mark.parametrize(("undefined", "want"), [(5, [1.0, 1.0]), (6, None)])
def test_interval_is_none_if_most_resamples_are_undefined(
    undefined: int, want: list[float] | None
) -> None:
    values = np.array([1.0] + [np.nan] * undefined + [1.0] * (10 - undefined))
    assert scores.compute_interval(values) == want


def test_one_group_gives_no_interval() -> None:
    y_true, y_prob = draw(1)
    got = compute_evaluation(y_true, y_prob, CLASSES, groups=np.zeros(300, int), num_resamples=9)
    assert got["num_groups"] == 1
    assert got["accuracy_ci95"] is None
    assert got["per_class"]["a"]["auroc_ci95"] is None


# -- curves ----------------------------------------------------------------------------


def test_sampled_curves_keep_their_area_and_ends() -> None:
    rng = np.random.default_rng(0)
    y_true = rng.integers(2, size=4000)
    score = 1 / (1 + np.exp(-rng.normal(y_true * 1.5, 1)))
    y_prob = np.column_stack([1 - score, score])
    curves = compute_curves(y_true, y_prob, ("a", "b"))["per_class"]["b"]
    fpr, tpr = np.array(curves["roc"]["fpr"]), np.array(curves["roc"]["tpr"])
    recall, precision = np.array(curves["pr"]["recall"]), np.array(curves["pr"]["precision"])

    assert 100 < fpr.size <= 200
    assert 100 < recall.size <= 200
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(recall) >= 0).all()
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (recall[0], precision[0], recall[-1]) == (0, 1, 1)
    assert precision[-1] == pytest.approx(y_true.mean())
    assert sk.auc(fpr, tpr) == pytest.approx(sk.roc_auc_score(y_true, score), abs=2e-3)
    assert sk.auc(recall, precision) == pytest.approx(
        sk.average_precision_score(y_true, score), abs=5e-3
    )


def test_short_curves_equal_scikit_learn() -> None:
    y_true, y_prob = draw(1)
    curves = compute_curves(y_true, y_prob, CLASSES)["per_class"]
    assert json.loads(json.dumps(curves, allow_nan=False)) == curves
    for k, name in enumerate(CLASSES):
        fpr, tpr, _ = sk.roc_curve(y_true == k, y_prob[:, k])
        assert curves[name]["roc"] == {"fpr": fpr.tolist(), "tpr": tpr.tolist()}


def test_reliability_bins_equal_scikit_learn_and_give_the_calibration_error() -> None:
    y_true, y_prob = draw(2)
    bins = compute_curves(y_true, y_prob, CLASSES)["reliability"]
    count = np.array(bins["count"])
    full = [i for i, n in enumerate(count) if n]
    confidence = np.array([bins["confidence"][i] for i in full])
    accuracy = np.array([bins["accuracy"][i] for i in full])

    want = calibration_curve(y_prob.argmax(axis=1) == y_true, y_prob.max(axis=1), n_bins=15)
    assert accuracy == pytest.approx(want[0])
    assert confidence == pytest.approx(want[1])
    assert (len(bins["edges"]), len(count), count.sum()) == (16, 15, 300)
    # The largest of four probabilities is at least 1/4.
    assert bins["accuracy"][0] is bins["confidence"][0] is None
    ece = (count[full] * np.abs(accuracy - confidence)).sum() / 300
    got = compute_evaluation(y_true, y_prob, CLASSES, num_resamples=0)["ece"]
    assert got == pytest.approx(ece, abs=1e-12)


def test_absent_class_has_empty_curves() -> None:
    y_true, y_prob = draw(4)
    kept = y_true != 3
    with warnings.catch_warnings():
        warnings.simplefilter("error", UndefinedMetricWarning)
        curves = compute_curves(y_true[kept], y_prob[kept], CLASSES)["per_class"]
    assert curves["d"] == {"roc": {"fpr": [], "tpr": []}, "pr": {"recall": [], "precision": []}}
    assert curves["c"]["roc"]["tpr"][-1] == 1.0


# -- errors ----------------------------------------------------------------------------

GOOD = [[0.7, 0.3], [0.4, 0.6]]


@pytest.mark.parametrize(
    ("y_true", "y_prob", "printed"),
    [
        ([], np.empty((0, 2)), "y_true is empty"),
        ([0, 1, 1], GOOD, r"shape \(3, 2\).*got \(2, 2\)"),
        ([0, 1], [[0.5, 0.3, 0.2]] * 2, r"shape \(2, 2\).*got \(2, 3\)"),
        ([0, 1], [0.5, 0.5], r"shape \(2, 2\).*got \(2,\)"),
        ([0, 2], GOOD, r"\[0, 2\).*got 2 at row 1"),
        ([0, -1], GOOD, "got -1 at row 1"),
        ([0.0, 1.0], GOOD, "y_true to be integers"),
        ([[0], [1]], GOOD, r"shape \(2, 1\)"),
        ([0, 1], [[0.7, 0.3], [np.nan, 0.6]], "finite y_prob.*row 1"),
        ([0, 1], [[0.7, 0.3], [np.inf, 0.6]], "finite y_prob.*row 1"),
        ([0, 1], [[0.7, 0.3], [-0.2, 1.2]], r"in \[0, 1\].*row 1.*not logits"),
        ([0, 1], [[0.7, 0.3], [0.0, 1.0005]], r"in \[0, 1\].*row 1.*not logits"),
        ([0, 1], [[0.7, 0.3], [0.4, 0.598]], r"sum to 1.*\(sum 0.998\) at row 1"),
        ([0, 1], [["x", "y"], ["z", "w"]], "y_prob to be numbers"),
    ],
)
def test_the_error_for_invalid_predictions_names_them(
    y_true: ArrayLike, y_prob: ArrayLike, printed: str
) -> None:
    for function in (compute_evaluation, compute_curves, summarise):
        with pytest.raises(DataError, match=printed):
            function(y_true, y_prob, ("a", "b"))


@pytest.mark.parametrize("groups", [[0], [0, 1, 2], [0.0, 1.0], ["p", "q"]])
def test_the_error_for_invalid_groups_names_them(groups: ArrayLike) -> None:
    with pytest.raises(DataError, match=r"groups to be integers of shape \(2,\)"):
        compute_evaluation([0, 1], GOOD, ("a", "b"), groups=groups)
    with pytest.raises(DataError, match=r"groups to be integers of shape \(2,\)"):
        compute_accuracy([0, 1], [0, 1], groups=groups)


def test_errors_name_invalid_settings_and_class_predictions() -> None:
    with pytest.raises(ConfigError, match="num_resamples of 0 or more, got -1"):
        compute_evaluation([0, 1], GOOD, ("a", "b"), num_resamples=-1)
    with pytest.raises(ConfigError, match="at least two classes"):
        compute_evaluation([0, 0], [[1.0], [1.0]], ("a",))
    with pytest.raises(DataError, match=r"y_pred to have 2 rows.*got 3"):
        compute_accuracy([0, 1], [0, 1, 1])
    with pytest.raises(DataError, match="y_pred, got -1 at row 0"):
        compute_accuracy([0, 1], [-1, 1])


# -- invariants ------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40), skill=st.floats(-3, 5))
def test_values_are_in_range_and_do_not_depend_on_the_order_of_rows(
    seed: int, n: int, skill: float
) -> None:
    y_true, y_prob = draw(seed, n=n, skill=skill)
    groups = np.random.default_rng(seed).integers(n, size=n)
    order = np.random.default_rng(seed + 1).permutation(n)
    got = compute_evaluation(y_true, y_prob, CLASSES, groups=groups, num_resamples=20)
    permuted = compute_evaluation(
        y_true[order], y_prob[order], CLASSES, groups=groups[order], num_resamples=20
    )
    for name in OVERALL:
        assert permuted[name] == pytest.approx(got[name], abs=1e-12), name
        assert permuted[f"{name}_ci95"] == pytest.approx(got[f"{name}_ci95"], abs=1e-12), name

    highest = {"log_loss": -np.log(np.finfo(float).eps), "brier": 2.0}
    for name in OVERALL:
        values = [got[name], *(got[f"{name}_ci95"] or [])]
        for value in values:
            if value is not None:
                lowest = -1.0 if name == "mcc" else 0.0
                assert lowest <= value <= highest.get(name, 1.0) + 1e-12, name
    for entry in got["per_class"].values():
        for name in PER_CLASS:
            assert entry[name] is None or 0 <= entry[name] <= 1


@given(seed=st.integers(0, 2**32 - 1))
def test_ranking_scores_depend_only_on_the_ranking(seed: int) -> None:
    """Squaring the scores of a class keeps their order and ties, and so the areas."""
    y_true, y_prob = draw(seed, n=40)
    weights = np.random.default_rng(seed).poisson(1, (3, 40)).astype(float)
    is_positive = y_true == 0
    plain, squared, reversed_ = (
        scores.build_area_scorer(is_positive, values)(weights)
        for values in (y_prob[:, 0], y_prob[:, 0] ** 2, -y_prob[:, 0])
    )
    np.testing.assert_array_equal(plain, squared)
    np.testing.assert_allclose(plain[0], 1 - reversed_[0], atol=1e-12)


# --- risk and coverage --------------------------------------------------------------------


def test_risk_coverage_of_four_predictions() -> None:
    """By hand. Sorted by confidence, they are right, wrong, right, wrong."""
    y_prob = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]
    found = compute_risk_coverage([0, 1, 1, 1], y_prob, ["a", "b"], min_confidence=0.65)
    assert found["curve"]["coverage"] == [0.25, 0.5, 0.75, 1.0]
    assert found["curve"]["risk"] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert found["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert found["aurc_oracle"] == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)
    assert (found["coverage"], found["num_answered"]) == (0.75, 3)
    assert found["risk"] == pytest.approx(1 / 3)
    low, high = found["risk_ci95"]
    assert (low, high) == pytest.approx((0.0615, 0.7923), abs=1e-4)  # Wilson's, 1 of 3


def test_predictions_of_equal_confidence_are_one_point_of_risk_coverage() -> None:
    y_prob = [[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]]
    found = compute_risk_coverage([0, 1, 0], y_prob, ["a", "b"])
    assert found["curve"]["coverage"] == pytest.approx([2 / 3, 1])
    assert found["aurc"] == pytest.approx((2 * 1 / 2 + 1 / 3) / 3)


def test_risk_is_none_if_all_predictions_abstain() -> None:
    found = compute_risk_coverage([0], [[0.9, 0.1]], ["a", "b"], min_confidence=0.95)
    assert (found["coverage"], found["risk"], found["risk_ci95"]) == (0, None, None)
