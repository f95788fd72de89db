"""Accuracy of a classifier on scans as another scanner or another export would give them.

    python benchmarks/robustness.py --classifier-uri RUN/classifier --data-uri FOLDER/Training \
        --manifest-uri RUN/manifest.parquet --split val --output robustness

Each of :data:`SHIFTS` changes the decoded scans in one way, in the manner of ImageNet-C [1]_ and
MedMNIST-C [2]_; the engine of every command predicts them. Choose a classifier by the validation
images of its own training run (``--manifest-uri``), never by test images. Writes OUTPUT.json and
OUTPUT.md, and prints the table.

Severity 2 is a change that a radiologist notices and reads past. Severity 1 is milder, and 3 is
the strongest change that occurs in practice. Lengths are shares of the scan's side.

References
----------
.. [1] Hendrycks and Dietterich, Benchmarking neural network robustness to common corruptions and
   perturbations, ICLR 2019.
.. [2] Di Salvo et al., MedMNIST-C: Comprehensive benchmark and improved classifier robustness by
   simulating realistic image corruptions, arXiv 2406.17536, 2024.
"""

import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from brainray.data.fingerprint import expand_files
from brainray.data.labelled import find_samples
from brainray.data.read import SampleReader
from brainray.errors import ConfigError, DataError, RejectedImage
from brainray.images.preprocess import Preprocessing, preprocess_image
from brainray.images.slices import ReadOptions
from brainray.inference.engine import EngineOptions, Prediction, open_engine
from brainray.io import storage
from brainray.metrics import compute_evaluation
from brainray.model.classifier import load_classifier
from brainray.model.reasons import find_status

Scan = NDArray[np.uint8]
SEVERITIES = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Shift:
    """One change of a scan."""

    description: str
    """One line; states what the levels are."""
    levels: tuple[float, float, float]
    """Strength at severity 1, 2 and 3."""
    apply: Callable[[Scan, float, np.random.Generator], NDArray[Any]]
    """Function of a scan, uint8 of shape (H, W), a level, and a source of random numbers."""


def apply_shift(samples: Scan, name: str, severity: int, *, seed: int) -> NDArray[Any]:
    """Shift a decoded scan.

    Parameters
    ----------
    samples : ndarray of uint8, shape (H, W)
        Grey levels, at the scan's own size.
    name : str
        A key of :data:`SHIFTS`.
    severity : {1, 2, 3}
    seed : int
        Not negative. Decides what is random in a shift, such as the direction of a rotation; the
        same at every severity. Give each image its own.

    Returns
    -------
    ndarray of uint8, shape (H', W')
        uint16 for ``export_16_bit``.

    Raises
    ------
    ConfigError
        An unknown name or severity.
    """
    assert samples.dtype == np.uint8, samples.dtype
    assert samples.ndim == 2, samples.shape
    if name not in SHIFTS:
        raise ConfigError(f"Unknown shift '{name}'. Expected one of {', '.join(SHIFTS)}.")
    if severity not in SEVERITIES:
        raise ConfigError(f"Expected a severity of 1, 2 or 3, got {severity}.")
    shift = SHIFTS[name]
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])  # not hash(): that is salted
    return shift.apply(samples, shift.levels[severity - 1], rng)


def _to_scan(values: NDArray[np.floating[Any]]) -> Scan:
    """Round grey levels and clip them to black and white."""
    rounded: Scan = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return rounded


# -------------------------------------------------------------------------------------- grey levels


def _apply_clahe(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    return np.asarray(cv2.createCLAHE(level, (8, 8)).apply(samples), np.uint8)


def _equalise(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    return _to_scan(samples + level * (cv2.equalizeHist(samples) - samples.astype(np.float32)))


def _apply_gamma(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    return _to_scan(255 * (np.arange(256) / 255) ** level)[samples]


def _apply_gain(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    return _to_scan(np.arange(256) * level)[samples]


def _apply_bias_field(samples: Scan, level: float, rng: np.random.Generator) -> Scan:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = (np.linspace(-1, 1, size) for size in samples.shape)
    field = 1 + level * np.add.outer(np.sin(angle) * y, np.cos(angle) * x)
    return _to_scan(samples * field)


def _add_rician_noise(samples: Scan, level: float, rng: np.random.Generator) -> Scan:
    real, imaginary = rng.normal(0, level, (2, *samples.shape))
    return _to_scan(np.hypot(samples + real, imaginary))


def _invert(samples: Scan, _: float, __: np.random.Generator) -> Scan:
    return np.invert(samples)


def _export_16_bit(samples: Scan, level: float, _: np.random.Generator) -> NDArray[np.uint16]:
    scaled: NDArray[np.uint16] = np.rint(samples * (level / 255)).astype(np.uint16)
    return scaled


# ------------------------------------------------------------------------------------------- detail


def _blur(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    return np.asarray(cv2.GaussianBlur(samples, (0, 0), level * max(samples.shape)), np.uint8)


def _compress(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    sink = io.BytesIO()
    Image.fromarray(samples).save(sink, "JPEG", quality=round(level))
    return np.asarray(Image.open(sink))


def _downsample(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    height, width = (max(1, round(size / level)) for size in samples.shape)
    return np.asarray(cv2.resize(samples, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


# ----------------------------------------------------------------------------------------- geometry


def _rotate(samples: Scan, level: float, rng: np.random.Generator) -> Scan:
    height, width = samples.shape
    centre = ((width - 1) / 2, (height - 1) / 2)
    matrix = cv2.getRotationMatrix2D(centre, float(rng.choice([-level, level])), 1.0)
    return np.asarray(cv2.warpAffine(samples, matrix, (width, height)), np.uint8)


def _add_border(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    return np.pad(samples, [(round(level * size),) * 2 for size in samples.shape])


def _crop(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    top, left = (round(level * size) for size in samples.shape)
    height, width = samples.shape
    return samples[top : height - top, left : width - left]


def _stretch(samples: Scan, level: float, rng: np.random.Generator) -> Scan:
    height, width = samples.shape
    size = (round(width * level), height) if rng.random() < 0.5 else (width, round(height * level))
    return np.asarray(cv2.resize(samples, size, interpolation=cv2.INTER_LINEAR), np.uint8)


SHIFTS: dict[str, Shift] = {
    "clahe": Shift("CLAHE in 8 x 8 tiles with this clip limit", (2.0, 3.0, 5.0), _apply_clahe),
    "equalized": Shift(
        "blended with its histogram equalised, by this weight", (0.5, 1.0, 1.0), _equalise
    ),
    "gamma_bright": Shift("grey levels to this power", (0.8, 0.6, 0.45), _apply_gamma),
    "gamma_dark": Shift("grey levels to this power", (1.3, 1.7, 2.3), _apply_gamma),
    "gain_dark": Shift("grey levels times this", (0.7, 0.5, 0.3), _apply_gain),
    "gain_bright": Shift("grey levels times this, clipped to white", (1.25, 1.5, 2.0), _apply_gain),
    "bias_field": Shift(
        "brightness changes linearly, by ± this at the borders, in a random direction",
        (0.2, 0.4, 0.6),
        _apply_bias_field,
    ),
    "noise": Shift(
        "Rician noise with this deviation, in grey levels", (6.0, 12.0, 24.0), _add_rician_noise
    ),
    "blur": Shift(
        "Gaussian blur with this deviation, in shares of the longer side: 1, 2 and 4 of 224 px",
        (1 / 224, 2 / 224, 4 / 224),
        _blur,
    ),
    "jpeg": Shift("JPEG of this quality", (30.0, 15.0, 7.0), _compress),
    "downsampled": Shift("sides divided by this", (1.5, 2.0, 4.0), _downsample),
    "rotation": Shift(
        "rotated by this many degrees, either way, about the middle", (6.0, 12.0, 20.0), _rotate
    ),
    "border": Shift(
        "a black border of this share of the side, on each side", (0.1, 0.2, 0.4), _add_border
    ),
    "tighter_crop": Shift(
        "this share of the side cut off, on each side", (0.04, 0.08, 0.12), _crop
    ),
    "stretched": Shift(
        "width or height times this: 7:6, 4:3 and 3:2", (7 / 6, 4 / 3, 3 / 2), _stretch
    ),
    "inverted": Shift("black and white swapped", (1.0, 1.0, 1.0), _invert),
    "export_16_bit": Shift(
        "16-bit samples of which only 0 to this are used", (4095.0, 4095.0, 4095.0), _export_16_bit
    ),
}

# ---------------------------------------------------------------------------------------- measuring

PLAIN = "plain"
"""Name of the unchanged scans."""
HIGH_CONFIDENCE = 0.9
"""Probability from which a wrong prediction counts as confidently wrong."""
BATCH_SIZE = 64
COLUMNS = {
    "accuracy": "accuracy",
    "relative_accuracy": "relative to plain",
    "ece": "calibration error",
    "confidently_wrong": f"wrong at {HIGH_CONFIDENCE:g} or more",
    "abstained": "abstained",
    "rejected": "rejected",
}
"""Score to its heading in the table."""


class Predictor(Protocol):
    """An :class:`brainray.inference.engine.Engine`, or a stand-in."""

    def predict(self, images: NDArray[np.uint8], /) -> Prediction:
        """Predict images, uint8 of shape (N, size_px, size_px)."""


def measure_robustness(
    engine: Predictor,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    scans: Sequence[NDArray[np.uint8]],
    labels: ArrayLike,
    *,
    severity: int = 2,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Score a classifier on unchanged scans and under each of :data:`SHIFTS`.

    Parameters
    ----------
    engine : Predictor
    preprocessing : Preprocessing
    classes : sequence of str
        The K class names, in class order.
    scans : sequence of ndarray of uint8, each of shape (H, W)
        N decoded scans, each at its own size.
    labels : array-like of int, shape (N,)
        Class of each scan.
    severity : {1, 2, 3}
    seed : int
        Not negative. Scan number i is shifted with seed + i.
    on_progress : callable
        Given the name of each shift before it is measured.

    Returns
    -------
    dict
        Ready for JSON. ``num_images``, ``severity``, ``seed``; ``plain``, the scores of the
        unchanged scans; ``shifts``, those under each shift, by name; ``mean``, their means over the
        shifts; ``worst``, the name of the shift with the lowest accuracy. The scores are those of
        :func:`score_predictions`, and ``relative_accuracy``: accuracy in units of the plain one
        (None where that is 0).

    Raises
    ------
    DataError
        There are no scans, or labels and scans do not match.
    ConfigError
        An unknown severity.
    """

    def score(name: str) -> dict[str, Any]:
        on_progress(name)

        def get_samples(index: int) -> NDArray[Any]:
            if name == PLAIN:
                return scans[index]
            return apply_shift(scans[index], name, severity, seed=seed + index)

        probs, reasons = _predict(engine, preprocessing, get_samples, len(scans))
        return score_predictions(labels, probs, reasons, classes)

    plain = score(PLAIN)
    shifted = {name: score(name) for name in SHIFTS}
    for scores in (plain, *shifted.values()):
        relative = scores["accuracy"] / plain["accuracy"] if plain["accuracy"] else None
        scores["relative_accuracy"] = relative
    return {
        "num_images": len(scans),
        "severity": severity,
        "seed": seed,
        "plain": plain,
        "shifts": shifted,
        "mean": _average(list(shifted.values())),
        "worst": min(shifted, key=lambda name: shifted[name]["accuracy"]),
    }


def _predict(
    engine: Predictor,
    preprocessing: Preprocessing,
    get_samples: Callable[[int], NDArray[Any]],
    count: int,
) -> tuple[NDArray[np.float32], list[str | None]]:
    """Return probabilities, shape (N, K), and reasons of the scans of numbers 0 to N - 1."""
    probs, reasons = [], []
    for start in range(0, count, BATCH_SIZE):
        numbers = range(start, min(start + BATCH_SIZE, count))
        images = np.stack([preprocess_image(get_samples(i), preprocessing) for i in numbers])
        predicted = engine.predict(images)
        probs.append(predicted.probs)
        reasons += predicted.reasons
    return np.concatenate(probs) if probs else np.zeros((0, 0), np.float32), reasons


def score_predictions(
    labels: ArrayLike,
    probs: NDArray[np.float32],
    reasons: Sequence[str | None],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Compute the scores of one row of the table.

    ``accuracy`` and ``ece`` are of the most probable class of every image, also if it is rejected.
    ``confidently_wrong`` is the share of images that get a wrong class with a probability of 0.9 or
    more; ``abstained`` and ``rejected`` are the shares that get none.
    """
    metrics = compute_evaluation(labels, probs, classes, num_resamples=0)
    statuses = np.array([find_status(reason) for reason in reasons])
    is_wrong = (probs.argmax(axis=1) != np.asarray(labels)) & (statuses == "classified")
    return {
        "accuracy": metrics["accuracy"],
        "ece": metrics["ece"],
        "confidently_wrong": float((is_wrong & (probs.max(axis=1) >= HIGH_CONFIDENCE)).mean()),
        "abstained": float((statuses == "abstained").mean()),
        "rejected": float((statuses == "rejected").mean()),
    }


def _average(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean of each score; None where it is not defined."""
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    return {
        name: None if None in values else float(np.mean(values)) for name, values in columns.items()
    }


def render_robustness(found: dict[str, Any]) -> str:
    """Render what :func:`measure_robustness` found as a Markdown table."""
    worst = found["worst"]
    rows = {
        PLAIN: found["plain"],
        **found["shifts"],
        "**mean of the shifts**": found["mean"],
        f"**worst: {worst}**": found["shifts"][worst],
    }
    lines = [
        "| shift | " + " | ".join(COLUMNS.values()) + " |",
        "| --- |" + " --- |" * len(COLUMNS),
    ]
    for name, scores in rows.items():
        cells = ("–" if scores[key] is None else f"{scores[key]:.3f}" for key in COLUMNS)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ command


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    classifier_uri: str
    """A classifier bundle."""
    data_uri: str
    """Labelled scans, as `brainray train` takes them."""
    output: str
    """Start of the names of the files to write."""
    manifest_uri: str | None = None
    """`manifest.parquet` of a training run on the same --data-uri; none takes all scans."""
    split: Literal["train", "val", "test"] = "val"
    """Split of the manifest to take."""
    num_images: int | None = None
    """Images, drawn at random; none takes all."""
    severity: Literal[1, 2, 3] = 2
    """Of each shift."""
    seed: int = 0
    """Draws the images and what is random in a shift."""
    engine: EngineOptions = EngineOptions()


def choose_samples(options: Options, classes: tuple[str, ...]) -> pa.Table:
    """List the scans to take, in an order that depends on the seed alone."""
    samples = expand_files(find_samples(options.data_uri, classes), ReadOptions()).samples
    if options.manifest_uri is not None:
        manifest = storage.read_table(options.manifest_uri)
        paths = manifest.filter(pc.field("split") == options.split)["path"]
        samples = samples.filter(pc.is_in(samples["path"], value_set=paths.combine_chunks()))
        if len(samples) < len(paths):
            raise DataError(
                f"Expected the {len(paths)} {options.split} scans of '{options.manifest_uri}' in "
                f"'{options.data_uri}', found {len(samples)}. Give the --data-uri of the training."
            )
    order = np.random.default_rng(options.seed).permutation(len(samples))[: options.num_images]
    return samples.take(pa.array(order))


def read_scans(samples: pa.Table) -> tuple[list[np.ndarray], list[int]]:
    """Decode scans; return those that can be decoded, and their labels."""
    scans, labels = [], []
    reader = SampleReader(ReadOptions())
    for row in samples.select(["uri", "row_group", "row", "frame", "label"]).to_pylist():
        label = row.pop("label")
        try:
            file, index = reader.open(**row)
            scans.append(file.render(index)[0])
        except RejectedImage as error:
            print(f"Skipped '{row['uri']}': {error}", flush=True)
            continue
        labels.append(label)
    return scans, labels


def main(options: Options) -> None:
    """Measure, print and write."""
    classifier = load_classifier(options.classifier_uri)
    scans, labels = read_scans(choose_samples(options, classifier.classes))
    engine = open_engine(classifier, options.engine)
    found = measure_robustness(
        engine,
        classifier.preprocessing,
        classifier.classes,
        scans,
        labels,
        severity=options.severity,
        seed=options.seed,
        on_progress=lambda name: print(f"Measuring {name} …", flush=True),
    )
    about = {"classifier_id": classifier.classifier_id, "options": asdict(options)}
    table = render_robustness(found)
    storage.write_json(f"{options.output}.json", about | engine.describe() | found)
    storage.write_bytes(f"{options.output}.md", f"{table}\n".encode())
    print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
