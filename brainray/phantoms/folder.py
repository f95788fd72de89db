"""Phantoms as files: encoded slices, and folders as those of the Kaggle data set."""

import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brainray.errors import ConfigError
from brainray.labels import BRAIN_TUMOUR_CLASSES
from brainray.phantoms.painter import render_slice
from brainray.phantoms.subjects import check_labels, draw_subject


@dataclass(frozen=True, kw_only=True, slots=True)
class Phantom:
    """One synthetic slice, encoded."""

    name: str
    """File name, suffix included; unique within its class."""
    label: str
    """Class name."""
    subject: str
    """Subject identifier; slices of a subject are near duplicates."""
    image_bytes: bytes
    """Encoded JPEG or PNG, grey or RGB."""


def iterate_phantoms(
    *,
    num_per_class: int,
    seed: int,
    classes: Sequence[str] = BRAIN_TUMOUR_CLASSES,
    slices_per_subject: int = 2,
) -> Iterator[Phantom]:
    """Yield encoded phantoms, class by class within each subject number.

    The same arguments give the same bytes. Image number *i* of a class depends neither on
    ``num_per_class`` nor on the other classes, and two seeds share no subject.

    `slices_per_subject` are near duplicates; the last subject may have fewer. A count below one, a
    negative seed and an unknown class raise ConfigError at the call.
    """
    _check_at_least(1, num_per_class=num_per_class, slices_per_subject=slices_per_subject)
    _check_at_least(0, seed=seed)
    check_labels(classes)
    return _iterate_stream(num_per_class, seed, 0, classes, slices_per_subject)


def write_phantom_folder(
    root: Path, *, num_train_per_class: int = 160, num_test_per_class: int = 40, seed: int = 0
) -> None:
    """Write a folder as the Kaggle data set: ``Training/<class>/<name>`` and ``Testing/…``.

    The training images are those of :func:`iterate_phantoms` with the same seed. The test images
    are of other subjects. Each subject has two slices. A count below one and a negative seed raise
    ConfigError.
    """
    _check_at_least(
        1, num_train_per_class=num_train_per_class, num_test_per_class=num_test_per_class
    )
    _check_at_least(0, seed=seed)
    splits = (("Training", num_train_per_class), ("Testing", num_test_per_class))
    for stream, (split, num_per_class) in enumerate(splits):
        for label in BRAIN_TUMOUR_CLASSES:
            (root / split / label).mkdir(parents=True, exist_ok=True)
        for phantom in _iterate_stream(num_per_class, seed, stream, BRAIN_TUMOUR_CLASSES, 2):
            (root / split / phantom.label / phantom.name).write_bytes(phantom.image_bytes)


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"Expected {name} to be at least {least}, got {value}.")


def _iterate_stream(
    num_per_class: int, seed: int, stream: int, classes: Sequence[str], slices_per_subject: int
) -> Iterator[Phantom]:
    """Yield phantoms; every subject and slice has a random generator of its own."""
    num_subjects = -(-num_per_class // slices_per_subject)
    for number in range(num_subjects):
        for label in classes:
            key = [seed, stream, zlib.crc32(label.encode()), number]  # hash() differs per process
            subject = draw_subject(label, np.random.default_rng([*key, 0]))
            subject_name = f"{label}-{seed}{'t' if stream else ''}-{number:04d}"
            first = number * slices_per_subject
            for index in range(min(slices_per_subject, num_per_class - first)):
                rng = np.random.default_rng([*key, 1 + index])
                suffix, image_bytes = _encode(render_slice(subject, float(index), rng), rng)
                yield Phantom(
                    name=f"{subject_name}-{index}{suffix}",
                    label=label,
                    subject=subject_name,
                    image_bytes=image_bytes,
                )


def _encode(pixels: NDArray[np.uint8], rng: np.random.Generator) -> tuple[str, bytes]:
    """Encode as data sets do: mostly grey JPEG, some RGB, some PNG; return suffix and bytes."""
    kinds = ((".jpg", "L"), (".jpg", "RGB"), (".png", "L"), (".png", "RGB"))
    suffix, mode = kinds[int(rng.choice(4, p=[0.7, 0.14, 0.1, 0.06]))]
    image, buffer = Image.fromarray(pixels).convert(mode), io.BytesIO()
    if suffix == ".jpg":
        image.save(buffer, "JPEG", quality=int(rng.integers(80, 96)))
    else:
        image.save(buffer, "PNG", compress_level=3)
    return suffix, buffer.getvalue()
