"""Recipes: validation of their fields, and differences between two of them."""

import inspect
import subprocess
from dataclasses import asdict, replace
from typing import Any

import pytest

from brainray import __version__
from brainray.errors import ConfigError
from brainray.images.preprocess import Preprocessing
from brainray.io.provenance import LIBRARIES, collect_versions, read_code_revision
from brainray.recipes import RECIPES, build_recipe
from brainray.training.config import ScalingOptions, TrainConfig, find_differences
from brainray.training.optim import Optimisation

NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", NAN),
        ("stage_decay", 0.0),
        ("stage_decay", 1.1),
        ("weight_decay", -0.1),
        ("warmup_epochs", -1.0),
        ("final_lr_fraction", -0.1),
        ("final_lr_fraction", 1.1),
        ("clip_norm", -1.0),
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("ema_decay", 1.0),
        ("ema_decay", -0.1),
    ],
)
def test_an_optimisation_error_names_the_field_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"optimisation\.{field} is out of range: {value}"):
        Optimisation(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "printed"),
    [
        ("num_epochs", 0, "num_epochs must be at least 1, got 0"),
        ("global_batch_size", 0, "global_batch_size must be at least 1, got 0"),
        ("head_epochs", -1, "head_epochs must not be negative, got -1"),
        ("patience_epochs", -2, "patience_epochs must not be negative, got -2"),
        ("val_fraction", 0.0, "val_fraction must be in .*, got 0.0"),
        ("val_fraction", 0.6, "val_fraction must be in .*, got 0.6"),
        ("val_fraction", NAN, "val_fraction must be in .*, got nan"),
        ("test_fraction", -0.1, "test_fraction must be in .*, got -0.1"),
        ("test_fraction", 0.6, "test_fraction must be in .*, got 0.6"),
        ("group_correlation", 0.0, "group_correlation must be in .*, got 0.0"),
        ("group_correlation", 1.1, "group_correlation must be in .*, got 1.1"),
        ("classes", ("only",), "at least two classes"),
        ("classes", ("a", "b", "a"), "Repeated: a"),
    ],
)
def test_a_recipe_error_names_the_wrong_field(field: str, value: object, printed: str) -> None:
    with pytest.raises(ConfigError, match=printed):
        TrainConfig(**{field: value})  # type: ignore[arg-type]


def test_limits_of_the_ranges_are_allowed() -> None:
    Optimisation(
        stage_decay=1.0,
        weight_decay=0.0,
        warmup_epochs=0.0,
        final_lr_fraction=0.0,
        clip_norm=0.0,
        label_smoothing=0.0,
        ema_decay=0.0,
    )
    Optimisation(final_lr_fraction=1.0)
    TrainConfig(
        num_epochs=1,
        global_batch_size=1,
        val_fraction=0.5,
        test_fraction=0.0,
        group_correlation=1.0,
    )
    ScalingOptions(num_workers=4, min_workers=4)


@pytest.mark.parametrize(
    ("fields", "printed"),
    [
        ({"num_workers": 0}, "num_workers must be at least 1, got 0"),
        ({"num_workers": 2, "min_workers": 3}, "min_workers must be in .*num_workers=2.*got 3"),
        ({"num_workers": 2, "min_workers": 0}, "min_workers must be in .*got 0"),
    ],
)
def test_a_scaling_error_names_the_wrong_field(fields: dict[str, Any], printed: str) -> None:
    with pytest.raises(ConfigError, match=printed):
        ScalingOptions(**fields)


def test_differences_are_named_by_their_path() -> None:
    saved = asdict(TrainConfig())
    assert find_differences(saved, asdict(TrainConfig())) == []
    changed = TrainConfig(
        seed=3,
        preprocessing=Preprocessing(size_px=64),
        optimisation=replace(Optimisation(), learning_rate=0.5, ema_decay=0.9),
    )
    assert find_differences(saved, asdict(changed)) == [
        "optimisation.ema_decay: 0.0 -> 0.9",
        "optimisation.learning_rate: 0.001 -> 0.5",
        "preprocessing.size_px: 224 -> 64",
        "seed: 0 -> 3",
    ]


def test_absent_fields_are_differences() -> None:
    assert find_differences({"a": 1}, {"b": {"c": 2}}) == ["a: 1 -> None", "b: None -> {'c': 2}"]
    assert find_differences({"a": {"b": {"c": 1}}}, {"a": {"b": {}}}) == ["a.b.c: 1 -> None"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_has_a_docstring(name: str) -> None:
    config = build_recipe(name)
    assert isinstance(config, TrainConfig)
    assert config == build_recipe(name)
    assert RECIPES[name].__name__.replace("_", "-") == name
    doc = inspect.getdoc(RECIPES[name])
    assert doc
    assert f"{config.preprocessing.size_px} px" in doc
    if config.head_epochs:
        assert config.weights != "none", "a head on random features learns nothing"


def test_recipes_differ() -> None:
    assert len({build_recipe(name) for name in RECIPES}) == len(RECIPES)


def test_an_unknown_recipe_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'gpuu'") as caught:
        build_recipe("gpuu")
    assert all(name in str(caught.value) for name in RECIPES)


def test_versions_cover_the_libraries_that_affect_results(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = collect_versions()
    assert set(versions) == {"python", "brainray", *LIBRARIES}
    assert versions["brainray"] == __version__
    assert all(number[0].isdigit() for number in versions.values())
    monkeypatch.setattr("brainray.io.provenance.LIBRARIES", ("no-such-library",))
    assert collect_versions()["no-such-library"] == "not installed"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("git"),
        subprocess.CalledProcessError(128, "git"),
        subprocess.TimeoutExpired("git", 10),
    ],
)
def test_revision_is_unknown_without_git(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert read_code_revision() == "unknown"
