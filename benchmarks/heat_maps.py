"""Whether heat maps are where the lesion is, on phantoms, whose lesions are known.

    brainray demo                                   # trains a classifier on phantoms
    python benchmarks/heat_maps.py --classifier-uri runs/demo/run/classifier

Draws phantoms with a mass that no demonstration draws, predicts them, and compares the map of the
true class, as it is shown to people, with the pixels of the mass. Printed for the dense map and for
the network's own coarse cells:

* energy inside the lesion: the share of the map's evidence that lies on it [1]_; beside it the
  lesion's share of the pixels that the network sees, which a map without knowledge has;
* pointing game: the share of phantoms where the strongest evidence is within 15 pixels of the
  lesion [2]_;
* evidence on black background beside the head.

References
----------
.. [1] Wang et al., Score-CAM, CVPR Workshops 2020, section 4.3.
.. [2] Zhang et al., Top-down neural attention by excitation backprop, ECCV 2016, section 4.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from brainray.images.heatmap import render_map, render_overlay
from brainray.images.preprocess import OpenedScan, open_samples
from brainray.inference.engine import Engine, EngineOptions, open_engine
from brainray.labels import BRAIN_TUMOUR_CLASSES
from brainray.model.classifier import Classifier, load_classifier
from brainray.model.explain import STRIDE_PX
from brainray.model.resnet50 import DENSITY
from brainray.phantoms import draw_subject, mark_lesion, render_slice

TOLERANCE_PX = 15
"""Of the pointing game, as in the paper."""
BACKGROUND = 12
"""Grey values below are air."""
SHEET_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    classifier_uri: str
    """A classifier bundle that was trained on phantoms."""
    num_phantoms: int = 300
    """Phantoms, as many of each class with a mass."""
    seed: int = 10_000
    """Draws them; the demonstration's own seeds are small."""
    sheet_path: Path | None = None
    """Write a PNG with some phantoms, their lesions and both maps."""
    engine: EngineOptions = EngineOptions()


@dataclass(frozen=True, slots=True)
class Drawn:
    """A phantom, what the network sees of it, and where its lesion is."""

    label: str
    opened: OpenedScan
    lesion: NDArray[np.bool_]


def draw(options: Options, classifier: Classifier) -> list[Drawn]:
    """Draw phantoms with a mass."""
    labels = [name for name in BRAIN_TUMOUR_CLASSES if name != "notumor"]
    drawn = []
    for number in range(options.num_phantoms):
        rng = np.random.default_rng([options.seed, number])
        subject = draw_subject(labels[number % len(labels)], rng)
        opened = open_samples(render_slice(subject, 0.0, rng), classifier.preprocessing)
        drawn.append(Drawn(subject.label, opened, mark_lesion(subject, 0.0)))
    return drawn


def read_levels(class_map: NDArray[np.float32], one: Drawn, stride_px: int) -> NDArray[np.float64]:
    """Return the evidence that is shown at each pixel of the phantom, 0 to 255."""
    picture = Image.open(io.BytesIO(render_map(class_map, one.opened.frame, stride_px)))
    return np.asarray(picture)[..., 3].astype(np.float64)


def score(levels: NDArray[np.float64], one: Drawn) -> dict[str, float]:
    """Compare one map with the lesion."""
    total = max(levels.sum(), 1.0)
    near = ndimage.distance_transform_edt(~one.lesion) <= TOLERANCE_PX
    strongest = np.unravel_index(levels.argmax(), levels.shape)
    grey = ndimage.uniform_filter(one.opened.samples.astype(np.float64), 9)
    source = one.opened.frame.source
    return {
        "energy inside the lesion": float(levels[one.lesion].sum() / total),
        "lesion's share of the pixels": float(one.lesion.sum() / (source.height * source.width)),
        "pointing game": float(near[strongest]),
        "evidence on the background": float(levels[grey < BACKGROUND].sum() / total),
    }


def measure(options: Options) -> dict[str, dict[str, float]]:
    """Score both kinds of map; return the mean of each score."""
    classifier = load_classifier(options.classifier_uri)
    engine = open_engine(classifier, options.engine)
    drawn = draw(options, classifier)
    maps, accuracy = predict_maps(engine, classifier, drawn)
    print(f"{len(drawn)} phantoms, accuracy {accuracy:.3f}, {engine.description}")
    kinds = {
        f"dense, a cell for {STRIDE_PX} px": (1, STRIDE_PX),
        f"own, a cell for {STRIDE_PX * DENSITY} px": (DENSITY, STRIDE_PX * DENSITY),
    }
    levels = {
        name: [
            read_levels(np.ascontiguousarray(one[::step, ::step]), phantom, stride)
            for one, phantom in zip(maps, drawn, strict=True)
        ]
        for name, (step, stride) in kinds.items()
    }
    if options.sheet_path is not None:
        draw_sheet(drawn, [maps[:, ::step, ::step] for step, _ in kinds.values()], options)
    found: dict[str, dict[str, float]] = {}
    for name, every in levels.items():
        rows = [score(one, phantom) for one, phantom in zip(every, drawn, strict=True)]
        found[name] = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    return found


def predict_maps(
    engine: Engine, classifier: Classifier, drawn: list[Drawn]
) -> tuple[NDArray[np.float32], float]:
    """Return the maps of the true classes, shape (N, h, w), and the accuracy."""
    found = engine.predict(np.stack([one.opened.image for one in drawn]), ["class_maps"])
    assert found.class_maps is not None
    labels = np.array([classifier.classes.index(one.label) for one in drawn])
    accuracy = float((found.probs.argmax(1) == labels).mean())
    return found.class_maps[np.arange(len(drawn)), labels], accuracy


def draw_sheet(drawn: list[Drawn], maps: list[NDArray[np.float32]], options: Options) -> None:
    """Draw phantoms with their lesion outlined, and beside each its maps."""
    assert options.sheet_path is not None
    rows = []
    for number, one in enumerate(drawn[:SHEET_ROWS]):
        edge = ndimage.binary_dilation(one.lesion) & ~one.lesion
        plain = np.repeat(one.opened.samples[..., None], 3, axis=2).copy()
        plain[edge] = (90, 220, 120)
        cells = [plain]
        for step, every in enumerate(maps):
            stride = STRIDE_PX * (1 if step == 0 else DENSITY)
            picture = render_overlay(
                np.ascontiguousarray(every[number]), one.opened.samples, one.opened.frame, stride
            )
            cells.append(np.asarray(Image.open(io.BytesIO(picture))))
        pictures = [np.asarray(Image.fromarray(cell).resize((200, 200))) for cell in cells]
        rows.append(np.concatenate(pictures, axis=1))
    Image.fromarray(np.concatenate(rows)).save(options.sheet_path)


def main(options: Options) -> None:
    """Measure and print a Markdown table."""
    found = measure(options)
    names = list(next(iter(found.values())))
    print("| map | " + " | ".join(names) + " |")
    print("| --- |" + " --- |" * len(names))
    for kind, scores in found.items():
        print(f"| {kind} | " + " | ".join(f"{scores[name]:.3f}" for name in names) + " |")


if __name__ == "__main__":
    main(tyro.cli(Options))
