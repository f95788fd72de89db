"""A search draws configurations, tries each on every fold, and is resumed where it was stopped."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray import tune as ray_tune

from brainray import cli
from brainray.errors import ConfigError
from brainray.images.preprocess import Preprocessing
from brainray.reports.tune import render_tuning
from brainray.training.augment import Augmentation
from brainray.training.config import ScalingOptions, SearchSpace, TrainConfig, TuneOptions
from brainray.training.run import TrainJob
from brainray.training.tune import (
    apply_parameters,
    build_tuner,
    collect_rows,
    describe_recipe,
    summarise_configurations,
)
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


def test_a_configuration_changes_what_was_drawn_and_nothing_else() -> None:
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


def test_a_factor_takes_no_range_beyond_its_limit() -> None:
    strong = replace(CONFIG, augmentation=Augmentation(clahe=0.8, bias_field=0.4))
    found = apply_parameters(strong, NUMBERS).augmentation
    assert (found.clahe, found.bias_field) == (1.0, 0.5)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_a_range_that_is_none_is_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        SearchSpace(learning_rate=ends)


def test_the_recipe_is_brought_into_the_ranges() -> None:
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
        build_row(1, 0.99, 100, weight_decay=0.03),
        build_row(0, 0.99, 100, weight_decay=0.04),
    ]
    found = summarise_configurations(rows, 2)
    assert [one["parameters"]["weight_decay"] for one in found] == [0.02, 0.1, 0.03, 0.04]
    assert found[0]["score"] == pytest.approx(0.94)
    assert found[0]["scores"] == [0.95, 0.93]
    assert [one["percent_done"] for one in found] == [100, 100, 50, 0]
    assert found[3]["scores"] == [0.99, None]


def report_scores(parameters: dict[str, Any]) -> None:
    """Stand for a training: the score grows with the weight decay, and with the epochs."""
    assert isinstance(parameters["fold"], int)
    for percent_done in (25, 50, 75, 100):
        score = parameters["weight_decay"] * percent_done + parameters["fold"] / 1000
        ray_tune.report({"val_macro_f1": score, "percent_done": percent_done, "time_s": 1.0})


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_each_draw_is_tried_on_every_fold_and_the_worse_are_ended(tmp_path: Path) -> None:
    job = build_job(tmp_path)
    rows = collect_rows(build_tuner(job, OPTIONS, report_scores).fit(), "val_macro_f1")
    found = summarise_configurations(rows, 2)
    assert len(found) == 3
    assert all(None not in one["scores"] for one in found)
    recipe = describe_recipe(CONFIG, OPTIONS.space)
    assert recipe in [one["parameters"] for one in found]
    best = max(found, key=lambda one: float(one["parameters"]["weight_decay"]))
    assert best["percent_done"] == 100
    assert found[0]["parameters"] == best["parameters"]
    assert min(one["percent_done"] for one in found) < 100

    def fail(parameters: dict[str, Any]) -> None:
        raise AssertionError(f"{parameters} was trained again")

    fail.__name__ = report_scores.__name__  # by which Ray Tune knows a search
    again = collect_rows(build_tuner(job, OPTIONS, fail).fit(), "val_macro_f1")
    assert sorted(map(str, again)) == sorted(map(str, rows))


def test_the_report_names_every_configuration() -> None:
    rows = [build_row(f, 0.9 + w, 100, weight_decay=w) for f in (0, 1) for w in (0.01, 0.02)]
    result = {
        "monitor": "val_macro_f1",
        "recipe": "smoke",
        "options": {"num_folds": 2},
        "configurations": summarise_configurations(rows, 2),
    }
    page = Page(render_tuning(result))
    assert page.headings[0] == "h1 brainray tuning report"
    assert "0.9200" in " ".join(page.words)
    plots = [tag for tag, attrs in page.tags if tag == "svg" and attrs.get("class") == "plot"]
    assert len(plots) == 1, "only the weight decay varies"


@pytest.mark.slow
def test_the_command_searches_and_goes_on(phantom_folder: Path, tmp_path: Path) -> None:
    words = {
        "data-uri": phantom_folder,
        "output-uri": tmp_path / "out",
        "recipe": "smoke",
        "num-epochs": 4,
        "preprocessing.size-px": 32,
        "num-configurations": 2,
        "num-folds": 2,
    }
    options = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    command = ["tune", *options]
    cli.main(command)
    first = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert len(first["configurations"]) == 2
    assert first["configurations"][0]["percent_done"] == 100
    assert 0 < first["configurations"][0]["score"] <= 1
    assert "tune" in (tmp_path / "out" / "tune.html").read_text()
    cli.main(command)
    assert json.loads((tmp_path / "out" / "tune.json").read_text()) == first
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command, "--num-epochs", "6"])
