"""Comparisons against published values, other implementations and simulations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu
from sklearn.metrics import f1_score, log_loss, roc_auc_score

from brainray.errors import ConfigError, DataError
from brainray.metrics.comparison import (
    COMPARED,
    adjust_holm,
    compare_predictions,
    compute_delong,
    compute_delong_test,
    compute_mcnemar,
)

CLASSES = ("a", "b", "c")
Probs = NDArray[np.float64]


def draw(count: int, *sharpness: float, seed: int = 0) -> tuple[NDArray[np.int64], list[Probs]]:
    """Draw labels, and probabilities of classifiers with correlated noise."""
    rng = np.random.default_rng(seed)
    y_true = rng.integers(0, 3, count)
    shared = rng.normal(size=(count, 3))
    probs = []
    for sharp in sharpness:
        logits = sharp * np.eye(3)[y_true] + shared + 0.5 * rng.normal(size=(count, 3))
        weights = np.exp(logits)
        probs.append(weights / weights.sum(1, keepdims=True))
    return y_true, probs


# ----------------------------------------------------------------------------------------- McNemar


def mark(only_a: int, only_b: int, both: int = 5, none: int = 3) -> list[NDArray[np.bool_]]:
    a = [True] * only_a + [False] * only_b + [True] * both + [False] * none
    b = [False] * only_a + [True] * only_b + [True] * both + [False] * none
    return [np.array(a), np.array(b)]


def test_mcnemar_equals_the_published_example() -> None:
    # Airway hyper-responsiveness before and after transplantation, Fagerland et al. (2013),
    # table 1 and its discussion: exact 0.070, mid-p 0.039.
    found = compute_mcnemar(*mark(1, 7))
    assert (found["only_a"], found["only_b"]) == (1, 7)
    assert found["p_exact"] == pytest.approx(0.0703125)
    assert found["p_mid"] == pytest.approx(0.0390625)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (4, 4)])
def test_mcnemar_of_equally_good_classifiers_is_1(only_a: int, only_b: int) -> None:
    found = compute_mcnemar(*mark(only_a, only_b))
    assert found["p_exact"] == 1
    assert found["p_mid"] == pytest.approx(1)


# ------------------------------------------------------------------------------------------ DeLong


def compute_delong_by_definition(positive: NDArray[np.bool_], scores: Probs) -> tuple[Probs, Probs]:
    """Compare every positive with every negative, as DeLong et al. (1988) define it."""
    x, y = scores[:, positive], scores[:, ~positive]
    wins = (x[:, :, None] > y[:, None, :]) + 0.5 * (x[:, :, None] == y[:, None, :])
    return wins.mean((1, 2)), (
        np.cov(wins.mean(2)) / x.shape[1] + np.cov(wins.mean(1)) / y.shape[1]
    )


@given(
    seed=st.integers(0, 10_000),
    num_positive=st.integers(2, 25),
    num_negative=st.integers(2, 25),
    levels=st.integers(2, 40),
)
def test_fast_delong_is_the_definition(
    seed: int, num_positive: int, num_negative: int, levels: int
) -> None:
    rng = np.random.default_rng(seed)
    positive = rng.permutation(np.repeat([True, False], [num_positive, num_negative]))
    scores = rng.integers(0, levels, (2, len(positive))) / levels  # with ties
    areas, covariance = compute_delong(positive, scores)
    expected_areas, expected = compute_delong_by_definition(positive, scores)
    np.testing.assert_allclose(areas, expected_areas, atol=1e-12)
    np.testing.assert_allclose(covariance, expected, atol=1e-12)
    for area, row in zip(areas, scores, strict=True):
        assert area == pytest.approx(roc_auc_score(positive, row))
        statistic = mannwhitneyu(row[positive], row[~positive]).statistic
        assert area == pytest.approx(statistic / (num_positive * num_negative))


def test_delong_by_hand() -> None:
    # Positives 3, 1 against negatives 2, 0: A wins 3 of 4, B all. A's shares: 1, 1/2 of the
    # positives and 1/2, 1 of the negatives, variance 1/8 each, so 1/8/2 + 1/8/2 = 1/8.
    positive = np.array([True, True, False, False])
    scores = np.array([[3.0, 1.0, 2.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    found = compute_delong_test(positive, scores)
    assert found is not None
    assert (found["a"], found["b"], found["difference"]) == (0.75, 1.0, 0.25)
    assert found["z"] == pytest.approx(0.25 / 0.125**0.5)
    assert found["p_value"] == pytest.approx(0.4795, abs=1e-4)  # of z = 0.7071


def test_delong_keeps_its_level() -> None:
    rng = np.random.default_rng(3)
    rejected = 0
    for _ in range(400):
        positive = np.arange(120) < 50
        scores = rng.normal(size=(2, 120)) + positive + 0.5 * rng.normal(size=120)
        found = compute_delong_test(positive, scores)
        assert found is not None
        rejected += found["p_value"] < 0.05
    assert 0.02 < rejected / 400 < 0.09


def test_delong_without_variance_or_without_enough_images() -> None:
    positive = np.array([True, True, False, False])
    same = compute_delong_test(positive, np.array([[3.0, 2, 1, 0]] * 2))
    assert same is not None
    assert (same["p_value"], same["z"]) == (1.0, None)
    opposite = compute_delong_test(positive, np.array([[3.0, 2, 1, 0], [0.0, 1, 2, 3]]))
    assert opposite is not None
    assert (opposite["difference"], opposite["p_value"]) == (-1.0, None)
    assert compute_delong_test(np.array([True, False, False]), np.ones((2, 3))) is None


# -------------------------------------------------------------------------------------------- Holm


def test_holm_equals_the_textbook_procedure() -> None:
    # Sorted 0.005, 0.011, 0.02, 0.04, 0.13 times 5, 4, 3, 2, 1, never falling.
    assert adjust_holm([0.04, 0.005, None, 0.13, 0.011, 0.02]) == pytest.approx(
        [0.08, 0.025, None, 0.13, 0.044, 0.06]
    )
    assert adjust_holm([0.5, 0.9]) == [1.0, 1.0]
    assert adjust_holm([]) == []


# ----------------------------------------------------------------------------- compare_predictions


def test_scores_equal_those_of_scikit_learn() -> None:
    y_true, (a, b) = draw(300, 1.0, 2.0)
    found = compare_predictions(y_true, a, b, CLASSES, num_resamples=100)
    for side, prob in (("a", a), ("b", b)):
        scores = {name: found["scores"][name][side] for name in COMPARED}
        assert scores["accuracy"] == pytest.approx((prob.argmax(1) == y_true).mean())
        assert scores["macro_f1"] == pytest.approx(
            f1_score(y_true, prob.argmax(1), average="macro")
        )
        assert scores["macro_auroc"] == pytest.approx(
            roc_auc_score(y_true, prob, multi_class="ovr")
        )
        assert scores["log_loss"] == pytest.approx(log_loss(y_true, prob))
    accuracy = found["scores"]["accuracy"]
    assert accuracy["difference"] == pytest.approx(accuracy["b"] - accuracy["a"])


def test_a_sharper_classifier_is_better_and_the_other_one_worse() -> None:
    y_true, (a, b) = draw(600, 1.0, 2.5)
    forwards = compare_predictions(y_true, a, b, CLASSES, num_resamples=1000)
    backwards = compare_predictions(y_true, b, a, CLASSES, num_resamples=1000)
    assert {row["verdict"] for row in forwards["scores"].values()} == {"better"}
    assert {row["verdict"] for row in backwards["scores"].values()} == {"worse"}
    assert {row["verdict"] for row in forwards["auroc"].values()} == {"better"}
    assert forwards["scores"]["log_loss"]["difference"] < 0
    for name in COMPARED:
        low, high = forwards["scores"][name]["difference_ci95"]
        assert low < forwards["scores"][name]["difference"] < high
        assert forwards["scores"][name]["p_adjusted"] >= forwards["scores"][name]["p_value"]


def test_equal_classifiers_get_no_verdict() -> None:
    y_true, (a, b) = draw(300, 1.5, 1.5)
    found = compare_predictions(y_true, a, b, CLASSES, num_resamples=500)
    assert {row["verdict"] for row in found["scores"].values()} == {"cannot tell"}
    same = compare_predictions(y_true, a, a, CLASSES, num_resamples=100)
    for row in same["scores"].values():
        assert (row["difference"], row["p_value"], row["verdict"]) == (0, 1, "cannot tell")


def test_pairing_and_groups_determine_the_width_of_intervals() -> None:
    y_true, (a, b) = draw(400, 1.5, 1.9)
    groups = np.repeat(np.arange(40), 10)
    copied = [np.repeat(part[:40], 10, axis=0) for part in (y_true, a, b)]
    alone = compare_predictions(*copied, CLASSES, num_resamples=500)
    grouped = compare_predictions(*copied, CLASSES, groups=groups, num_resamples=500)
    few = compare_predictions(y_true[:40], a[:40], b[:40], CLASSES, num_resamples=500)

    def width(found: dict[str, dict[str, dict[str, list[float]]]]) -> float:
        low, high = found["scores"]["log_loss"]["difference_ci95"]
        return high - low

    assert width(grouped) > 2 * width(alone)  # ten duplicates are not ten images
    assert width(grouped) == pytest.approx(width(few), rel=0.15)
    spread = [compare_predictions(y_true, p, q, CLASSES, num_resamples=500) for p, q in
              ((a, b), (a, np.roll(b, 1, axis=0)))]  # fmt: skip
    assert width(spread[0]) < width(spread[1])


def test_the_bootstrap_keeps_its_level() -> None:
    decided = 0
    for seed in range(60):
        y_true, (a, b) = draw(150, 1.5, 1.5, seed=seed)
        found = compare_predictions(y_true, a, b, CLASSES, num_resamples=200, seed=seed)
        decided += any(row["verdict"] != "cannot tell" for row in found["scores"].values())
    assert decided <= 8  # 5 % of 60 is 3; 9 or more would happen once in 250 times


def test_a_primary_score_decides_alone() -> None:
    y_true, (a, b) = draw(600, 1.0, 2.5)
    found = compare_predictions(y_true, a, b, CLASSES, primary="macro_f1", num_resamples=500)
    verdicts = {name: row["verdict"] for name, row in found["scores"].items()}
    assert verdicts.pop("macro_f1") == "better"
    assert set(verdicts.values()) == {None}
    row = found["scores"]["macro_f1"]
    assert row["p_adjusted"] == row["p_value"]


def test_a_class_without_images_has_no_auroc() -> None:
    y_true, (a, b) = draw(200, 1.0, 1.2)
    y_true[y_true == 2] = 0
    found = compare_predictions(y_true, a, b, CLASSES, num_resamples=200)
    assert found["auroc"]["c"] is None
    assert found["scores"]["macro_auroc"]["a"] is not None


def test_one_group_gives_no_verdict() -> None:
    y_true, (a, b) = draw(60, 0.5, 4.0)
    found = compare_predictions(y_true, a, b, CLASSES, groups=np.zeros(60, np.int64))
    for row in found["scores"].values():
        assert (row["difference_ci95"], row["p_value"]) == (None, None)
        assert row["verdict"] == "cannot tell"


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        ({"primary": "auc"}, "Unknown score 'auc'"),
        ({"num_resamples": 10}, "at least 100"),
        ({"alpha": 1.0}, "alpha"),
    ],
)
def test_options_out_of_range_are_an_error(options: dict[str, object], printed: str) -> None:
    y_true, (a, b) = draw(20, 1.0, 1.0)
    with pytest.raises(ConfigError, match=printed):
        compare_predictions(y_true, a, b, CLASSES, **options)  # type: ignore[arg-type]


def test_different_shapes_are_an_error() -> None:
    y_true, (a, b) = draw(20, 1.0, 1.0)
    with pytest.raises(DataError, match="shape"):
        compare_predictions(y_true, a, b[:19], CLASSES)
