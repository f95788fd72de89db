"""Phantoms: a seed always gives the same bytes, and only the mass distinguishes the classes."""

import hashlib
import io
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from brainray import phantoms
from brainray.errors import ConfigError
from brainray.labels import BRAIN_TUMOUR_CLASSES
from brainray.phantoms import Phantom, iterate_phantoms
from brainray.phantoms.__main__ import draw_contact_sheet
from brainray.phantoms.painter import Painter

_DIGEST_SCRIPT = (
    "import hashlib; from brainray.phantoms import iterate_phantoms as draw; "
    "print(hashlib.sha256(b''.join(p.name.encode() + p.image_bytes "
    "for p in draw(num_per_class=3, seed=5))).hexdigest())"
)


def _digest(images: Iterable[Phantom]) -> str:
    return hashlib.sha256(b"".join(p.name.encode() + p.image_bytes for p in images)).hexdigest()


def _decode(phantom: Phantom) -> Image.Image:
    return Image.open(io.BytesIO(phantom.image_bytes))


def _thumbnail(phantom: Phantom) -> NDArray[np.float64]:
    return np.asarray(_decode(phantom).convert("L").resize((24, 24), Image.Resampling.BOX), float)


@pytest.fixture(scope="module")
def many_phantoms() -> list[Phantom]:
    return list(iterate_phantoms(num_per_class=32, seed=3))


def test_same_seed_gives_same_bytes_in_any_process() -> None:
    here = _digest(iterate_phantoms(num_per_class=3, seed=5))
    assert here == _digest(iterate_phantoms(num_per_class=3, seed=5))
    salt = "1" if os.environ.get("PYTHONHASHSEED") == "424242" else "424242"
    child = subprocess.run(
        [sys.executable, "-c", _DIGEST_SCRIPT],
        env={**os.environ, "PYTHONHASHSEED": salt},
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout.strip() == here


def test_an_image_does_not_depend_on_the_number_or_the_classes_of_the_others(
    many_phantoms: list[Phantom],
) -> None:
    few = list(iterate_phantoms(num_per_class=3, seed=3, classes=("pituitary", "glioma")))
    for label in ("pituitary", "glioma"):
        expected = [p for p in many_phantoms if p.label == label][:3]
        assert [p for p in few if p.label == label] == expected
    assert (
        list(itertools.islice(iterate_phantoms(num_per_class=32, seed=3), 5)) == many_phantoms[:5]
    )


def test_counts_names_and_subjects(many_phantoms: list[Phantom]) -> None:
    for label in BRAIN_TUMOUR_CLASSES:
        own = [p for p in many_phantoms if p.label == label]
        assert len(own) == 32
        assert len({p.name for p in own}) == 32
        assert len({p.subject for p in own}) == 16
    odd = list(iterate_phantoms(num_per_class=5, seed=0, slices_per_subject=3))
    assert [p.subject for p in odd if p.label == "notumor"] == ["notumor-0-0000"] * 3 + [
        "notumor-0-0001"
    ] * 2
    others = list(iterate_phantoms(num_per_class=2, seed=4))
    assert not {p.subject for p in many_phantoms} & {p.subject for p in others}
    assert not {p.image_bytes for p in many_phantoms} & {p.image_bytes for p in others}


def test_encodings_and_sizes_vary(many_phantoms: list[Phantom]) -> None:
    seen = {(Path(p.name).suffix, _decode(p).mode) for p in many_phantoms}
    assert seen == {(".jpg", "L"), (".jpg", "RGB"), (".png", "L"), (".png", "RGB")}
    for phantom in many_phantoms:
        expected = {".jpg": "JPEG", ".png": "PNG"}[Path(phantom.name).suffix]
        assert _decode(phantom).format == expected
    sizes = {_decode(p).size for p in many_phantoms}
    assert len(sizes) >= 15
    assert min(min(size) for size in sizes) >= 160
    assert max(max(size) for size in sizes) <= 320
    assert any(width > height for width, height in sizes)
    assert any(width < height for width, height in sizes)


def test_slices_of_a_subject_are_near_duplicates_and_others_are_not(
    many_phantoms: list[Phantom],
) -> None:
    thumbs = np.stack([_thumbnail(p).ravel() for p in many_phantoms])
    correlations = np.corrcoef(thumbs)
    subjects = np.array([p.subject for p in many_phantoms])
    same = subjects[:, None] == subjects[None, :]
    pairs = np.triu(np.ones_like(same), 1)
    assert (same & pairs).sum() == 64
    assert correlations[same & pairs].min() >= 0.96
    assert (correlations[~same & pairs] >= 0.96).mean() < 0.02
    first, second = many_phantoms[0], many_phantoms[1]
    assert first.subject == second.subject
    assert first.image_bytes != second.image_bytes


def test_global_statistics_do_not_predict_the_class(many_phantoms: list[Phantom]) -> None:
    features = []
    for phantom in many_phantoms:
        pixels = np.asarray(_decode(phantom).convert("L"), float)
        features.append([pixels.mean(), pixels.std(), *pixels.shape])
    labels = np.array([p.label for p in many_phantoms])
    groups = np.array([p.subject for p in many_phantoms])
    for model in (
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
        DecisionTreeClassifier(max_depth=4, random_state=0),
    ):
        scores = cross_val_score(
            model, np.array(features), labels, groups=groups, cv=GroupKFold(n_splits=4)
        )
        assert scores.mean() < 0.6


@pytest.mark.parametrize("plane", phantoms.PLANES)
@pytest.mark.parametrize("label", BRAIN_TUMOUR_CLASSES)
def test_every_class_is_drawn_in_every_plane(label: str, plane: phantoms.Plane) -> None:
    pixels = phantoms.draw_phantom(label, np.random.default_rng(1), plane=plane)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 2
    height, width = pixels.shape
    corner = pixels[: height // 16, : width // 16]
    middle = pixels[height // 4 : height // 2, width // 3 : 2 * width // 3]
    assert corner.mean() < 20
    assert middle.mean() > corner.mean() + 25
    assert phantoms.draw_subject(label, np.random.default_rng(1), plane=plane).view.plane == plane


def _paint_with_and_without_mass(
    subject: phantoms.SubjectParameters,
) -> tuple[Painter, NDArray[np.float32], NDArray[np.bool_]]:
    """Paint a subject without noise; return where its mass changes the picture."""
    painter = Painter(subject, 0.0)
    picture = painter.paint()
    bare = Painter(replace(subject, mass=None), 0.0).paint()
    return painter, picture, np.abs(picture - bare) > 0.1


@pytest.mark.parametrize("label", ["glioma", "meningioma", "pituitary"])
def test_masses_are_at_the_anatomical_site_of_their_class(label: str) -> None:
    for number in range(9):
        rng = np.random.default_rng([7, number])
        subject = phantoms.draw_subject(label, rng, plane=phantoms.PLANES[number % 3])
        painter, _, changed = _paint_with_and_without_mass(subject)
        mass, frame = subject.mass, painter.frame
        assert mass is not None
        centre = frame.to_pixels(np.array([mass.centre]))[0]
        rows, columns = np.nonzero(changed)
        distances = np.hypot(columns + 0.5 - centre[0], rows + 0.5 - centre[1]) / frame.scale
        assert np.median(distances) < 2.2 * mass.radius  # the change is at the mass
        assert changed.sum() > 0.3 * np.pi * (mass.radius * frame.scale) ** 2
        on_skull = (painter.cavity[rows, columns] < 0.5).mean()
        reach = distances.max()
        if label == "pituitary":
            sella = subject.view.sella
            assert sella is not None
            assert np.hypot(mass.centre[0] - sella[0], mass.centre[1] - sella[1]) < 0.12
            assert reach < 0.35
        else:
            assert on_skull < 0.05  # neither grows through bone
        depth = painter._compute_depth(painter.cavity)
        at_centre = depth[int(centre[1]), int(centre[0])]
        if label == "meningioma":
            assert at_centre < mass.radius  # cut by the skull: a broad base on the dura
            assert (changed & (depth < 0.03) & (painter.cavity > 0.5)).sum() > 10
        if label == "glioma":
            assert at_centre > 0.1


@pytest.mark.parametrize("label", ["glioma", "meningioma", "pituitary"])
def test_the_lesion_mask_covers_the_pixels_that_the_mass_changes(label: str) -> None:
    for seed in range(4):
        subject = phantoms.draw_subject(label, np.random.default_rng(seed))
        lesion = phantoms.mark_lesion(subject, 0.0)
        _, _, changed = _paint_with_and_without_mass(subject)
        assert 20 < lesion.sum() < 0.3 * lesion.size
        assert changed[lesion].mean() > 0.5 > 5 * changed[~lesion].mean()
    healthy = phantoms.draw_subject("notumor", np.random.default_rng(0))
    assert not phantoms.mark_lesion(healthy, 0.0).any()


def test_glioma_has_a_rim_around_a_core_and_meningioma_is_uniform() -> None:
    for number in range(6):
        pictures = {}
        for label in ("glioma", "meningioma"):
            rng = np.random.default_rng([11, number])
            subject = phantoms.draw_subject(label, rng, plane="coronal")
            painter, picture, _ = _paint_with_and_without_mass(subject)
            mass, frame = subject.mass, painter.frame
            assert mass is not None
            centre = frame.to_pixels(np.array([mass.centre]))[0]
            y, x = np.ogrid[: frame.height, : frame.width]
            distances = np.hypot(x + 0.5 - centre[0], y + 0.5 - centre[1]) / frame.scale
            inside = (distances < 0.8 * mass.radius) & (painter.cavity > 0.99)
            pictures[label] = picture[inside]
        assert pictures["glioma"].std() > 2 * pictures["meningioma"].std()


def test_folder_has_the_kaggle_layout_and_disjoint_subjects(tmp_path: Path) -> None:
    phantoms.write_phantom_folder(tmp_path, num_train_per_class=4, num_test_per_class=3, seed=2)
    assert {p.name for p in tmp_path.iterdir()} == {"Training", "Testing"}
    for split, count in (("Training", 4), ("Testing", 3)):
        assert {p.name for p in (tmp_path / split).iterdir()} == set(BRAIN_TUMOUR_CLASSES)
        for label in BRAIN_TUMOUR_CLASSES:
            assert len(list((tmp_path / split / label).iterdir())) == count
    for phantom in iterate_phantoms(num_per_class=4, seed=2):
        path = tmp_path / "Training" / phantom.label / phantom.name
        assert path.read_bytes() == phantom.image_bytes
    train, test = (
        {p.stem.rsplit("-", 1)[0] for p in (tmp_path / split).rglob("*.*")}
        for split in ("Training", "Testing")
    )
    assert not train & test
    train_thumbs, test_thumbs = (
        [np.asarray(Image.open(p).convert("L").resize((24, 24))).ravel() for p in
         sorted((tmp_path / split).rglob("*.*"))]
        for split in ("Training", "Testing")
    )  # fmt: skip
    count = len(train_thumbs)
    correlations = np.corrcoef(train_thumbs, test_thumbs)[:count, count:]
    assert correlations.max() < 0.985


def test_contact_sheet_has_a_picture_in_every_cell() -> None:
    sheet = draw_contact_sheet(cell_px=144)
    grey = np.asarray(sheet.convert("L"), float)[34:, 118:]
    for row in range(4):
        for column in range(6):
            cell = grey[row * 150 : row * 150 + 144, column * 150 : column * 150 + 144]
            assert cell.std() > 15
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    assert len(buffer.getvalue()) < 250_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_per_class": 0, "seed": 0}, "num_per_class to be at least 1, got 0"),
        ({"num_per_class": 1, "seed": -1}, "seed to be at least 0, got -1"),
        (
            {"num_per_class": 1, "seed": 0, "slices_per_subject": 0},
            "slices_per_subject to be at least 1, got 0",
        ),
        ({"num_per_class": 1, "seed": 0, "classes": ("glioma", "flower")}, "'flower'"),
    ],
)
def test_wrong_arguments_are_rejected_at_the_call(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        iterate_phantoms(**arguments)  # type: ignore[arg-type]


def test_wrong_folder_counts_and_names_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_train_per_class to be at least 1, got 0"):
        phantoms.write_phantom_folder(tmp_path / "a", num_train_per_class=0)
    with pytest.raises(ConfigError, match="num_test_per_class to be at least 1, got -3"):
        phantoms.write_phantom_folder(tmp_path / "a", num_test_per_class=-3)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ConfigError, match="'flower'"):
        phantoms.draw_phantom("flower", np.random.default_rng(0))
    with pytest.raises(ConfigError, match="Unknown plane 'oblique'"):
        phantoms.draw_phantom("glioma", np.random.default_rng(0), plane="oblique")  # type: ignore[arg-type]
