"""What each part of a recipe is worth: runs that differ in one thing, scored on grouped validation.

    python benchmarks/ablations.py --data-uri FOLDER/Training --output-uri OUT

FOLDER/Training alone is given: the testing images are never opened. Each seed gives a split by
groups, weights and an order of its own; the variations of one seed share all of them, so that
differences are taken within a seed. A run that is finished is not run again, and one that was
stopped goes on: give the same command. The result, ``ablations.json``, is printed as a table.

On a few cores the runs are fastest side by side, each on one core: start the command several times
at once with ``taskset -c CORE`` before it, ``--num-workers 1`` and some of the ``--variations``
each, then once more with all of them.
"""

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

import tyro

from brainray.images.preprocess import Preprocessing
from brainray.io import storage
from brainray.recipes import RECIPES, build_recipe
from brainray.training.augment import NO_AUGMENTATION
from brainray.training.config import ScalingOptions, TrainConfig
from brainray.training.run import TrainJob
from brainray.training.train import train

SCORES = ("accuracy", "macro_f1", "macro_auroc", "log_loss")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which runs."""

    data_uri: str
    """Class folders to train and validate on, with no split of their own."""
    output_uri: str
    """A run's folder is OUTPUT/VARIATION-SEED."""
    recipe: str = "cpu"
    """The recipe whose parts are taken away."""
    size_px: int = 64
    """Side of the images in every run but those that vary it."""
    num_epochs: int = 12
    """Epochs of every run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One split by groups each."""
    variations: tuple[str, ...] = ()
    """Those to run; none names all of them."""
    num_workers: int = 2
    """Training workers."""


def list_variations(options: Options) -> dict[str, TrainConfig]:
    """Return the whole recipe, and what it is without one of its parts or with one more."""
    whole = dataclasses.replace(
        build_recipe(options.recipe),
        weights="none",
        test_fraction=0.0,
        preprocessing=Preprocessing(size_px=options.size_px),
        num_epochs=options.num_epochs,
    )

    def augment(**fields: float) -> TrainConfig:
        augmentation = dataclasses.replace(whole.augmentation, **fields)
        return dataclasses.replace(whole, augmentation=augmentation)

    def optimise(**fields: Any) -> TrainConfig:  # noqa: ANN401 - any field of it
        optimisation = dataclasses.replace(whole.optimisation, **fields)
        return dataclasses.replace(whole, optimisation=optimisation)

    return {
        "whole": whole,
        "no-augmentation": dataclasses.replace(whole, augmentation=NO_AUGMENTATION),
        "no-rotation": augment(rotation_deg=0.0),
        "no-flip": augment(flip_horizontal=0.0),
        "no-zoom": augment(zoom=0.0),
        "no-shift": augment(shift=0.0),
        "no-rotation-zoom-shift": augment(rotation_deg=0.0, zoom=0.0, shift=0.0),
        "no-stretch": augment(stretch=0.0),
        "no-grey-changes": augment(grey_probability=0.0),
        "no-clahe": augment(clahe=0.0),
        "no-gamma": augment(gamma=0.0),
        "no-bias-and-gain": augment(bias_field=0.0, gain=0.0),
        "no-blur-and-noise": augment(blur=0.0, noise=0.0),
        "strong-on-half": augment(
            grey_probability=0.5,
            clahe=0.5,
            gamma=0.6,
            bias_field=0.3,
            gain=0.3,
            blur_probability=0.25,
            noise=0.05,
            noise_probability=0.5,
        ),
        "no-label-smoothing": optimise(label_smoothing=0.0),
        "no-ema": optimise(ema_decay=0.0),
        "sgd": optimise(optimizer="sgd", learning_rate=0.05, weight_decay=1e-4),
        "larger": dataclasses.replace(
            whole, preprocessing=Preprocessing(size_px=options.size_px * 3 // 2)
        ),
    }


def run(options: Options) -> dict[str, dict[int, dict[str, float]]]:
    """Run what is not finished; return the validation scores of every variation and seed."""
    known = list_variations(options)
    unknown = set(options.variations) - set(known)
    if unknown or options.recipe not in RECIPES:
        raise SystemExit(f"Unknown: {sorted(unknown)}. Expected some of {', '.join(known)}.")
    chosen = {name: known[name] for name in options.variations or known}
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in chosen}
    for seed in options.seeds:
        for name, config in chosen.items():
            print(f"== {name}, seed {seed}", flush=True)
            job = TrainJob(
                data_uri=storage.make_absolute(options.data_uri),
                output_uri=storage.join(options.output_uri, f"{name}-{seed}"),
                config=dataclasses.replace(config, seed=seed),
                scaling=ScalingOptions(num_workers=options.num_workers),
                recipe=options.recipe,
            )
            metrics = train(job, log=lambda line: print(line, flush=True))
            scores = {score: metrics["val"][score] for score in SCORES}
            found[name][seed] = scores | {"time_s": metrics["training"]["time_s"]}
            place = storage.join(options.output_uri, "ablations.json")
            storage.write_json(place, {"options": dataclasses.asdict(options), "runs": found})
    return found


def describe(found: dict[str, dict[int, dict[str, float]]]) -> str:
    """Say each variation's mean accuracy, and its difference from the first, seed by seed."""
    first = next(iter(found))
    lines = [
        f"{'':<22} {'accuracy':>8} {'loss':>7} {'minutes':>8}  difference from {first}, by seed"
    ]
    for name, runs in found.items():
        mean = {key: statistics.mean(run[key] for run in runs.values()) for key in runs[min(runs)]}
        apart = [
            100 * (run["accuracy"] - found[first][seed]["accuracy"]) for seed, run in runs.items()
        ]
        shown = ", ".join(f"{value:+.1f}" for value in apart)
        lines.append(
            f"{name:<22} {mean['accuracy']:>8.3f} {mean['log_loss']:>7.3f} "
            f"{mean['time_s'] / 60:>8.1f}  {statistics.mean(apart):+.2f} points ({shown})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe(run(tyro.cli(Options))))
