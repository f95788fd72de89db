"""What int8 costs in accuracy and gains in speed, against bf16 (or fp32 without bf16 instructions).

    python benchmarks/int8.py --classifier-uri RUN/classifier --data-uri FOLDER/Training \
        --manifest-uri RUN/manifest.parquet

Quantises the network with images of the run's training split, predicts its validation split with
both networks, and times them in turns, in batches and one image at a time. Needs NNCF
(``pip install brainray[int8]``) and an otherwise idle machine.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from robustness import Options as Scans
from robustness import choose_samples, read_scans

from brainray.images.preprocess import Preprocessing, preprocess_image
from brainray.inference.engine import Engine, EngineOptions
from brainray.inference.engine_openvino import OpenVinoEngine
from brainray.inference.int8 import NUM_CALIBRATION_IMAGES, measure_disagreement, quantise
from brainray.metrics import compute_evaluation
from brainray.model.classifier import load_classifier
from brainray.model.precision import choose_precision, has_native_bf16

BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    classifier_uri: str
    """A classifier bundle."""
    data_uri: str
    """Labelled scans, as `brainray train` took them."""
    manifest_uri: str
    """`manifest.parquet` of the training run."""
    num_rounds: int = 7
    """Turns of the timing."""
    num_threads: int | None = None
    """CPU threads; none takes all."""
    seed: int = 0
    """Draws the images of the calibration."""


def read_split(
    options: Options, split: str, preprocessing: Preprocessing, num_images: int | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return network inputs, shape (N, size_px, size_px), and labels of a split."""
    scans = Scans(
        classifier_uri=options.classifier_uri,
        data_uri=options.data_uri,
        manifest_uri=options.manifest_uri,
        split=split,  # type: ignore[arg-type]
        num_images=num_images,
        seed=options.seed,
        output="",
    )
    classes = load_classifier(options.classifier_uri).classes
    samples, labels = read_scans(choose_samples(scans, classes))
    return np.stack([preprocess_image(one, preprocessing) for one in samples]), np.array(labels)


def predict(engine: Engine, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the probabilities of all images, shape (N, K)."""
    batches = range(0, len(images), BATCH_SIZE)
    return np.concatenate([engine.predict(images[i : i + BATCH_SIZE]).probs for i in batches])


def measure_rate(engine: Engine, images: NDArray[np.uint8], batch_size: int) -> float:
    """Return images per second in batches of this size."""
    start = time.perf_counter()
    for first in range(0, len(images), batch_size):
        engine.predict(images[first : first + batch_size])
    return len(images) / (time.perf_counter() - start)


def measure_speed(
    engines: dict[str, Engine], images: NDArray[np.uint8], num_rounds: int
) -> dict[int, dict[str, list[float]]]:
    """Time the engines in turns: batch size to engine to rates of the turns, in images/s."""
    found: dict[int, dict[str, list[float]]] = {}
    for batch_size, chosen in ((BATCH_SIZE, images[: 4 * BATCH_SIZE]), (1, images[:64])):
        found[batch_size] = {name: [] for name in engines}
        for number in range(num_rounds + 1):
            for name, engine in engines.items():
                rate = measure_rate(engine, chosen, batch_size)
                if number > 0:  # the first turn warms up
                    found[batch_size][name].append(rate)
    return found


def main(options: Options) -> None:
    """Measure and print."""
    classifier = load_classifier(options.classifier_uri)
    train, _ = read_split(options, "train", classifier.preprocessing, NUM_CALIBRATION_IMAGES)
    images, labels = read_split(options, "val", classifier.preprocessing)
    reference = choose_precision("auto", has_bf16=has_native_bf16(use_gpu=False))
    asked = EngineOptions(num_threads=options.num_threads)
    engines: dict[str, Engine] = {
        reference: OpenVinoEngine(classifier, reference, replace(asked, precision=reference)),
        "int8": OpenVinoEngine(
            classifier, "int8", replace(asked, precision="int8"), quantise(classifier, train)
        ),
    }
    probs = {name: predict(engine, images) for name, engine in engines.items()}
    for name, engine in engines.items():
        scores: dict[str, Any] = compute_evaluation(
            labels, probs[name], classifier.classes, num_resamples=0
        )
        print(
            f"{engine.description}: accuracy {scores['accuracy']:.4f}, "
            f"calibration error {scores['ece']:.4f}, {len(labels)} validation images"
        )
    agreement = measure_disagreement(probs[reference], probs["int8"])
    print(
        f"Same class: {agreement['same_top_class']:.4f}. "
        f"Largest difference of a probability: {agreement['largest_difference']:.3f}."
    )
    for batch_size, rates in measure_speed(engines, images, options.num_rounds).items():
        ratios = np.array(rates["int8"]) / np.array(rates[reference])
        print(
            f"Batches of {batch_size}: {reference} {np.median(rates[reference]):.1f}, "
            f"int8 {np.median(rates['int8']):.1f} images/s; int8 / {reference} "
            f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
