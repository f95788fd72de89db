"""A search draws configurations, tries the best on every fold, and resumes where it stopped."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray import tune as ray_tune

from brainray import cli
from brainray.errors import ConfigError
from brainray.images.preprocess import Preprocessing
from brainray.reports.tune import render_tuning_report
from brainray.training.augment import Augmentation
from brainray.training.config import ScalingOptions, SearchSpace, TrainConfig, TuneOptions
from brainray.training.run import TrainJob
from brainray.training.tune import (
    apply_parameters,
    describe_recipe,
    draw_configurations,
    search,
    summarise_configurations,
)
from tests.conftest import REPOSITORY
from tests.processes import TIMEOUT_S
from tests.test_report import Page

CONFIG = TrainConfig(weights="none", preprocessing=Preprocessing(size_px=32), num_epochs=4)
OPTIONS = TuneOptions(num_configurations=3, num_folds=2, max_concurrent=2)
NUMBERS = {
    "learning_rate": 2e-3,
    "weight_decay": 0.1,
    "grey_strength": 2.0,
    "geometric_strength": 0.5,
    "num_epochs": 12,
}


def build_job(output: Path) -> TrainJob:
    return TrainJob(
        data_uri="unread", output_uri=str(output), config=CONFIG, scaling=ScalingOptions()
    )


def test_a_configuration_changes_only_the_drawn_parameters() -> None:
    found = apply_parameters(CONFIG, NUMBERS)
    plain, scaled = CONFIG.augmentation, found.augmentation
    assert (found.num_epochs, found.optimisation.learning_rate) == (12, 2e-3)
    assert found.optimisation.weight_decay == 0.1
    assert scaled.gamma == pytest.approx(2 * plain.gamma)
    assert scaled.rotation_deg == pytest.approx(plain.rotation_deg / 2)
    assert scaled.flip_horizontal == plain.flip_horizontal
    assert replace(found, num_epochs=4, optimisation=CONFIG.optimisation, augmentation=plain) == (
        CONFIG
    )


def test_a_factor_scales_no_field_beyond_its_limit() -> None:
    strong = replace(CONFIG, augmentation=Augmentation(clahe=0.8, bias_field=0.4))
    found = apply_parameters(strong, NUMBERS).augmentation
    assert (found.clahe, found.bias_field) == (1.0, 0.5)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_an_invalid_range_is_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        SearchSpace(learning_rate=ends)


def test_the_recipe_is_clipped_to_the_ranges() -> None:
    space = SearchSpace(learning_rate=(1e-4, 5e-4), num_epochs=(3, 9))
    found = describe_recipe(CONFIG, space)
    assert found["learning_rate"] == 5e-4
    assert found["weight_decay"] == CONFIG.optimisation.weight_decay
    assert found["num_epochs"] == 3


def build_row(fold: int, score: float, percent_done: int, **numbers: float) -> dict[str, Any]:
    parameters = {**NUMBERS, **numbers, "fold": fold}
    return {"parameters": parameters, "score": score, "percent_done": percent_done, "time_s": 1.0}


def test_configurations_are_ranked_by_the_mean_of_their_folds() -> None:
    rows = [
        build_row(0, 0.90, 100),
        build_row(0, 0.95, 100, weight_decay=0.02),
        build_row(1, 0.92, 100),
        build_row(1, 0.93, 100, weight_decay=0.02),
        build_row(0, 0.99, 50, weight_decay=0.03),
        build_row(0, 0.99, 100, weight_decay=0.04),
        build_row(1, 0.99, 50, weight_decay=0.04),
    ]
    found = summarise_configurations(rows, 2)
    assert [one["parameters"]["weight_decay"] for one in found] == [0.02, 0.1, 0.04, 0.03]
    assert found[0]["score"] == pytest.approx(0.94)
    assert found[0]["scores"] == [0.95, 0.93]
    assert [one["percent_done"] for one in found] == [100, 100, 75, 25]
    assert found[3]["scores"] == [0.99, None]


def report_scores(trial: dict[str, Any]) -> None:
    """Replace a training: the score grows with the weight decay and with the epochs."""
    parameters = trial["parameters"]
    for percent_done in (25, 50, 75, 100):
        # Scores of the second fold are so low that ASHA would stop its trials if it compared folds.
        score = parameters["weight_decay"] * percent_done - 10 * parameters["fold"]
        ray_tune.report({"val_macro_f1": score, "percent_done": percent_done, "time_s": 1.0})


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_worse_configurations_are_stopped_and_the_others_tried_on_every_fold(
    tmp_path: Path,
) -> None:
    job = build_job(tmp_path)
    rows = search(job, OPTIONS, report_scores)
    found = summarise_configurations(rows, 2)
    assert {str(one["parameters"]) for one in found} == {
        str(one) for one in draw_configurations(CONFIG, OPTIONS)
    }
    best = max(found, key=lambda one: float(one["parameters"]["weight_decay"]))
    assert found[0]["parameters"] == best["parameters"]
    assert (best["percent_done"], None in best["scores"]) == (100, False)
    assert found[-1]["percent_done"] < 50
    assert found[-1]["scores"][1] is None

    def fail(trial: dict[str, Any]) -> None:
        raise AssertionError(f"{trial} was trained again")

    fail.__name__ = report_scores.__name__  # Ray Tune identifies a search by this name
    assert sorted(map(str, search(job, OPTIONS, fail))) == sorted(map(str, rows))


def test_drawn_configurations_depend_on_the_seed_and_stay_in_range() -> None:
    options = TuneOptions(
        num_configurations=50, space=SearchSpace(grey_strength=(1.0, 1.0), num_epochs=(3, 9))
    )
    drawn = draw_configurations(CONFIG, options)
    assert drawn == draw_configurations(CONFIG, options)
    assert drawn != draw_configurations(replace(CONFIG, seed=1), options)
    assert len(drawn) == 50
    rates = [one["learning_rate"] for one in drawn]
    assert 3e-4 <= min(rates) < 6e-4 < 1.5e-3 < max(rates) <= 3e-3
    assert {one["grey_strength"] for one in drawn} == {1.0}
    assert {one["num_epochs"] for one in drawn} == {3, 9}


def test_the_report_names_every_configuration() -> None:
    rows = [build_row(f, 0.9 + w, 100, weight_decay=w) for f in (0, 1) for w in (0.01, 0.02)]
    result = {
        "monitor": "val_macro_f1",
        "recipe": "smoke",
        "options": {"num_folds": 2},
        "configurations": summarise_configurations(rows, 2),
    }
    page = Page(render_tuning_report(result))
    assert page.headings[0] == "h1 brainray tuning report"
    assert {"0.9100", "0.9200"} <= set(page.text.split())
    plots = [tag for tag, attrs in page.tags if tag == "svg" and attrs.get("class") == "plot"]
    assert len(plots) == 1, "only the weight decay varies"


@pytest.mark.usefixtures("local_ray")
def test_a_ray_without_dashboard_is_refused(
    phantom_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--weights", "none", "--data-uri", str(phantom_folder)]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tune", *words, "--output-uri", str(tmp_path / "out")])
    assert "needs Ray's dashboard" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_searches_and_resumes(phantom_folder: Path, tmp_path: Path) -> None:
    """In a process of its own, which starts Ray with the dashboard."""
    words = {
        "data-uri": phantom_folder,
        "output-uri": tmp_path / "out",
        "recipe": "smoke",
        "num-epochs": 4,
        "preprocessing.size-px": 32,
        "num-configurations": 2,
        "num-folds": 2,
    }

    def tune(*more: str) -> int:
        options = [word for name, value in words.items() for word in (f"--{name}", str(value))]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        command = [sys.executable, "-m", "brainray", "tune", *options, *more]
        return subprocess.run(
            command, cwd=REPOSITORY, env=environment, timeout=TIMEOUT_S, check=False
        ).returncode

    assert tune() == 0
    first = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert len(first["configurations"]) == 2
    assert first["configurations"][0]["percent_done"] == 100
    assert 0 < first["configurations"][0]["score"] <= 1
    assert "brainray tuning report" in (tmp_path / "out" / "tune.html").read_text()
    assert tune() == 0
    assert json.loads((tmp_path / "out" / "tune.json").read_text()) == first
    assert tune("--num-epochs", "6") == 2
