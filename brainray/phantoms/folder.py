"""Phantoms as files: a reproducible stream of encoded slices, and the Kaggle data set's folders."""

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
    """One synthetic slice as a file would hold it."""

    name: str
    """File name, suffix included; unique within its class."""
    label: str
    """Class name."""
    subject: str
    """Subject identifier; slices of one subject are near duplicates."""
    image_bytes: bytes
    """Encoded JPEG or PNG, grey or RGB."""


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"Expected {name} to be at least {least}, got {value}.")


def _encode(pixels: NDArray[np.uint8], rng: np.random.Generator) -> tuple[str, bytes]:
    """Encode as files in the wild are: mostly grey JPEG, some RGB, some PNG; suffix and bytes."""
    kinds = ((".jpg", "L"), (".jpg", "RGB"), (".png", "L"), (".png", "RGB"))
    suffix, mode = kinds[int(rng.choice(4, p=[0.7, 0.14, 0.1, 0.06]))]
    image, buffer = Image.fromarray(pixels).convert(mode), io.BytesIO()
    if suffix == ".jpg":
        image.save(buffer, "JPEG", quality=int(rng.integers(80, 96)))
    else:
        image.save(buffer, "PNG", compress_level=3)
    return suffix, buffer.getvalue()


def _iterate_stream(
    *, num_per_class: int, seed: int, stream: int, classes: Sequence[str], slices_per_subject: int
) -> Iterator[Phantom]:
    """Yield phantoms; every subject and slice has dice of its own, found by their numbers."""
    num_subjects = -(-num_per_class // slices_per_subject)
    for number in range(num_subjects):
        for label in classes:
            key = [seed, stream, zlib.crc32(label.encode()), number]  # not hash(): that is salted
            subject = draw_subject(label, np.random.default_rng([*key, 0]))
            subject_name = f"{label}-{seed}{'t' if stream else ''}-{number:04d}"
            first = number * slices_per_subject
            for index in range(min(slices_per_subject, num_per_class - first)):
                rng = np.random.default_rng([*key, 1 + index])
                pixels = render_slice(subject, float(index), rng)
                suffix, image_bytes = _encode(pixels, rng)
                yield Phantom(
                    name=f"{subject_name}-{index}{suffix}",
                    label=label,
                    subject=subject_name,
                    image_bytes=image_bytes,
                )


def iterate_phantoms(
    *,
    num_per_class: int,
    seed: int,
    classes: Sequence[str] = BRAIN_TUMOUR_CLASSES,
    slices_per_subject: int = 2,
) -> Iterator[Phantom]:
    """Yield encoded phantoms, class by class within each subject number.

    The same arguments give the same bytes on every run. Image number *i* of a class does not
    depend on ``num_per_class`` or on which other classes are asked for, and no subject is shared
    between two seeds.

    Parameters
    ----------
    num_per_class : int
        Images of each class.
    seed : int
        Non-negative; names the subjects.
    classes : sequence of str
        Class names among ``BRAIN_TUMOUR_CLASSES``.
    slices_per_subject : int
        Near duplicate slices of each subject; the last subject may have fewer.

    Yields
    ------
    Phantom
        One encoded slice.

    Raises
    ------
    ConfigError
        A count below one, a negative seed, or an unknown class; raised at the call.
    """
    _check_at_least("num_per_class", num_per_class, 1)
    _check_at_least("slices_per_subject", slices_per_subject, 1)
    _check_at_least("seed", seed, 0)
    check_labels(classes)
    return _iterate_stream(
        num_per_class=num_per_class,
        seed=seed,
        stream=0,
        classes=classes,
        slices_per_subject=slices_per_subject,
    )


def write_phantom_folder(
    root: Path, *, num_train_per_class: int = 160, num_test_per_class: int = 40, seed: int = 0
) -> None:
    """Write ``Training/<class>/<name>`` and ``Testing/<class>/<name>``, as the Kaggle data set is.

    The training images are those of :func:`iterate_phantoms` with the same seed; the test images
    come from other subjects.

    Parameters
    ----------
    root : Path
        Local folder; made where missing.
    num_train_per_class, num_test_per_class : int
        Images of each class, two slices of each subject.
    seed : int
        Non-negative; names the subjects.

    Raises
    ------
    ConfigError
        A count below one or a negative seed.
    """
    _check_at_least("num_train_per_class", num_train_per_class, 1)
    _check_at_least("num_test_per_class", num_test_per_class, 1)
    _check_at_least("seed", seed, 0)
    splits = (("Training", num_train_per_class), ("Testing", num_test_per_class))
    for stream, (split, num_per_class) in enumerate(splits):
        for label in BRAIN_TUMOUR_CLASSES:
            (root / split / label).mkdir(parents=True, exist_ok=True)
        phantoms = _iterate_stream(
            num_per_class=num_per_class,
            seed=seed,
            stream=stream,
            classes=BRAIN_TUMOUR_CLASSES,
            slices_per_subject=2,
        )
        for phantom in phantoms:
            (root / split / phantom.label / phantom.name).write_bytes(phantom.image_bytes)
