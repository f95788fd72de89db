r"""Images that are not brain MRI slices: how many of them a classifier rejects.

    pip install matplotlib scikit-image pydicom pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg
    python benchmarks/out_of_distribution.py --classifier-uri C --scans-uri ../data/Testing \
        --images-path pillow-13.0.0/Tests/images

The images are the samples of installed libraries (photographs, microscopy, chest X-rays, CT,
ultrasound; no DICOM images of modality MR), drawn charts, pages of text, blank and noise images,
and a further folder. The scans are real slices, which should pass. Other scores that need no
training are compared with the bundle's distance by their AUROC.
"""

import io
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import tyro
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.metrics import roc_auc_score

from brainray.data.read import read_named_scan
from brainray.data.scans import list_scans
from brainray.errors import RejectedImage
from brainray.images.slices import open_file, open_slice
from brainray.inference.engine import EngineOptions, open_engine
from brainray.model.calibration import UNLIKE_TRAINING, Outputs
from brainray.model.classifier import Classifier, load_classifier

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".tif", ".tiff", ".bmp", ".webp"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    classifier_uri: str
    """A classifier bundle."""
    scans_uri: str
    """Local folder of real scans."""
    images_path: Path | None = None
    """Local folder of further images that are not brain MRI, such as the test images of Pillow's
    source package."""


def find_library_images() -> Iterator[tuple[str, bytes]]:
    """Yield kind and bytes of the pictures that libraries bring as samples."""
    import skimage
    import sklearn

    folders = {
        "scikit-image": Path(skimage.__file__).parent / "data",
        "scikit-learn": Path(sklearn.__file__).parent / "datasets" / "images",
        "matplotlib": Path(mpl.get_data_path()) / "sample_data",
    }
    for kind, folder in folders.items():
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                yield kind, path.read_bytes()


def find_dicom_images() -> Iterator[tuple[str, bytes]]:
    """Yield kind and bytes of pydicom's samples of other modalities than MR, as grey PNGs."""
    import pydicom

    warnings.simplefilter("ignore")  # many of the samples are broken on purpose
    for path in sorted((Path(pydicom.__file__).parent / "data" / "test_files").rglob("*.dcm")):
        try:
            found = pydicom.dcmread(path)
            modality, pixels = found.Modality, found.pixel_array
        except Exception:
            continue
        if modality == "MR":
            continue
        if int(found.get("NumberOfFrames", 1)) > 1:
            pixels = pixels[len(pixels) // 2]
        low, high = np.percentile(pixels, [0.5, 99.5])
        scaled = np.clip((pixels - low) / max(high - low, 1e-6), 0, 1) * 255
        yield f"DICOM {modality}", encode(scaled.astype(np.uint8))


def draw_images() -> Iterator[tuple[str, bytes]]:
    """Yield kind and bytes of charts, text, blank and noise images."""
    rng = np.random.default_rng(0)
    for number in range(12):
        figure = Figure(figsize=(4, 3 + number % 3))
        axes = figure.subplots()
        draw = (axes.plot, axes.bar, axes.scatter)[number % 3]
        draw(np.arange(20), rng.normal(size=20).cumsum())
        sink = io.BytesIO()
        figure.savefig(sink, format="png")
        yield "chart", sink.getvalue()
    for number in range(6):
        page = Image.new("L", (300 + 40 * number, 400), 255)
        ImageDraw.Draw(page).multiline_text(
            (20, 20), "\n".join("".join(rng.choice(list("abcdefg "), 40)) for _ in range(22)), 0
        )
        yield "text", encode(np.asarray(page))
    for grey in (0, 1, 32, 64, 128, 192, 254, 255):
        yield "blank", encode(np.full((256, 256), grey, np.uint8))
    for number in range(12):
        side = 64 * 2 ** (number % 4)
        fields = (
            rng.integers(0, 256, (side, side)),
            np.clip(rng.normal(60, 40, (side, side)), 0, 255),
            (rng.random((side, side)) < 0.1) * 255,
        )
        yield "noise", encode(fields[number % 3].astype(np.uint8))
    for number in range(6):
        ramp = np.add.outer(np.arange(200) * (number + 1), np.arange(220) * (5 - number)) % 256
        yield "gradient", encode(ramp.astype(np.uint8))


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """Encode pixels as PNG."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def compute_outputs(classifier: Classifier, contents: list[bytes]) -> tuple[list[int], Outputs]:
    """Return the numbers of the readable images, and the network's outputs for them."""
    images, numbers = [], []
    for number, content in enumerate(contents):
        try:
            file = open_file(content)
            images.append(open_slice(file, 0, classifier.preprocessing).scan.image)
        except RejectedImage:
            continue
        numbers.append(number)
    found = open_engine(classifier, EngineOptions()).predict(
        np.stack(images), ["logits", "features"]
    )
    assert found.logits is not None
    assert found.features is not None
    return numbers, Outputs(found.logits, found.features)


def main(options: Options) -> None:
    """Print the shares of rejected images and of passed scans, and the AUROC of each score."""
    classifier = load_classifier(options.classifier_uri)
    calibration = classifier.calibration
    scans = [
        read_named_scan(uri) for uri in list_scans([options.scans_uri])["scan_uri"].to_pylist()
    ]
    _, inside = compute_outputs(classifier, scans)
    found = [*find_library_images(), *find_dicom_images(), *draw_images()]
    if options.images_path is not None:
        paths = sorted(path for path in options.images_path.rglob("*") if path.is_file())
        found += [(options.images_path.name, path.read_bytes()) for path in paths]
    numbers, outside = compute_outputs(classifier, [content for _, content in found])
    kinds = [found[number][0] for number in numbers]

    def list_reasons(outputs: Outputs) -> list[str | None]:
        distances = calibration.compute_distances(outputs.features)
        return calibration.find_reasons(calibration.calibrate(outputs.logits), distances)

    by_kind: dict[str, list[bool]] = defaultdict(list)
    for kind, reason in zip(kinds, list_reasons(outside), strict=True):
        by_kind[kind].append(reason == UNLIKE_TRAINING)
    print(f"{'images':<16}{'n':>6}{'rejected':>10}")
    for kind, rejected in by_kind.items():
        print(f"{kind:<16}{len(rejected):>6}{np.mean(rejected):>10.1%}")
    everything = np.concatenate(list(by_kind.values()))
    print(f"{'all':<16}{len(everything):>6}{everything.mean():>10.1%}")
    print(f"rejected before the network: {len(found) - len(numbers)} more")
    passed = np.array([reason != UNLIKE_TRAINING for reason in list_reasons(inside)])
    print(f"scans that pass: {passed.mean():.1%} of {len(passed):,}")

    is_outside = np.repeat([0, 1], [len(inside.logits), len(outside.logits)])
    both = Outputs(
        np.concatenate([inside.logits, outside.logits]),
        np.concatenate([inside.features, outside.features]),
    )
    scores = {
        "distance": calibration.compute_distances(both.features),
        "energy": compute_energy(both.logits),
        "1 - confidence": 1 - calibration.calibrate(both.logits).max(axis=1),
    }
    for name, values in scores.items():
        print(f"AUROC of {name:<20}{roc_auc_score(is_outside, values):.3f}")


def compute_energy(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Compute the energy score of images (Liu et al., NeurIPS 2020); higher is more unusual."""
    energy: NDArray[np.float64] = -np.logaddexp.reduce(logits.astype(np.float64), axis=1)
    return energy


if __name__ == "__main__":
    main(tyro.cli(Options))
