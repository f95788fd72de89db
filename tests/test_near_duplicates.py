"""Near duplicates: correlations and groups against brute force, and on real scans."""

import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from brainray.data import near_duplicates
from brainray.data.near_duplicates import (
    EXACT_PAIRS,
    NEAR_DUPLICATE_CORRELATION,
    Block,
    build_sketches,
    compute_thumbnail,
    count_products,
    find_nearest,
    group_near_duplicates,
    list_tiles,
    measure_recall,
    merge_groups,
    run_blocks,
    standardise_thumbnails,
)
from brainray.labels import BRAIN_TUMOUR_CLASSES
from brainray.phantoms import iterate_phantoms

DATA = Path(
    os.environ.get("BRAINRAY_DATA")
    or Path(__file__).resolve().parents[2] / "shared" / "brain-tumor-mri"
)
NUM_TESTING = {"glioma": 150, "meningioma": 152, "notumor": 201, "pituitary": 150}
"""Images of each Testing folder, from the data's README."""


def draw_thumbnails(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 576), dtype=np.uint8)


def on_circle(*degrees: float) -> NDArray[np.float32]:
    """Return unit vectors; the correlation of two is the cosine of the angle between them."""
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)


def group_by_brute_force(links: NDArray[np.bool_]) -> list[int]:
    groups = list(range(len(links)))
    for i, j in np.argwhere(links):
        low, high = sorted((groups[i], groups[j]))
        groups = [low if group == high else group for group in groups]
    return [sorted(set(groups)).index(group) for group in groups]


# -------------------------------------------------------------------------------------- thumbnails


def test_thumbnail_averages_boxes() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (72, 48), dtype=np.uint8)
    boxes = pixels.reshape(24, 3, 24, 2).mean(axis=(1, 3)).reshape(-1)
    thumbnail = compute_thumbnail(pixels)
    assert thumbnail.dtype == np.uint8
    assert thumbnail.shape == (576,)
    assert np.abs(thumbnail - boxes).max() <= 1  # Pillow rounds after each axis


@pytest.mark.parametrize("shape", [(1, 1), (5, 500), (24, 24), (1000, 30)])
def test_thumbnail_of_any_shape(shape: tuple[int, int]) -> None:
    assert compute_thumbnail(np.full(shape, 77, np.uint8)).tolist() == [77] * 576


def test_dot_product_is_the_correlation() -> None:
    thumbnails = draw_thumbnails(30)
    thumbnails[1] = 255 - thumbnails[0]
    standardised = standardise_thumbnails(thumbnails)
    assert standardised.dtype == np.float32
    np.testing.assert_allclose(standardised @ standardised.T, np.corrcoef(thumbnails), atol=2e-6)
    assert standardised[0] @ standardised[1] == pytest.approx(-1)


def test_a_uniform_image_correlates_with_nothing() -> None:
    thumbnails = draw_thumbnails(4)
    thumbnails[:3] = [[0], [37], [37]]
    standardised = standardise_thumbnails(thumbnails)
    assert not standardised[:3].any()
    assert np.isfinite(standardised).all()
    assert group_near_duplicates(standardised, min_correlation=0.1).tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------ groups


def test_groups_are_chained_by_single_linkage() -> None:
    # cos 10° = 0.985, cos 20° = 0.940: the ends of the chain are linked only through its middle
    standardised = on_circle(0, 90, 20, 10, 95)
    assert group_near_duplicates(standardised, min_correlation=0.98).tolist() == [0, 1, 0, 0, 1]
    assert group_near_duplicates(standardised[[0, 1, 2, 4]], min_correlation=0.98).tolist() == [
        0,
        1,
        2,
        1,
    ]


def test_a_correlation_equal_to_the_threshold_is_a_link() -> None:
    standardised = np.array([[1, 0], [0.5, 0.5]], np.float32)  # a dot product of exactly 0.5
    assert group_near_duplicates(standardised, min_correlation=0.5).tolist() == [0, 0]
    assert group_near_duplicates(standardised, min_correlation=0.5001).tolist() == [0, 1]


@given(
    degrees=st.lists(st.integers(0, 359), max_size=14, unique=True),
    block_rows=st.integers(1, 5),
    shuffle=st.randoms(use_true_random=False),
)
def test_groups_match_brute_force_at_any_block_border(
    degrees: list[int], block_rows: int, shuffle: random.Random
) -> None:
    shuffle.shuffle(degrees)
    apart = np.abs(np.subtract.outer(degrees, degrees))
    links = np.minimum(apart, 360 - apart) <= 10
    expected = group_by_brute_force(links)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "_BLOCK_ROWS", block_rows)
        patch.setattr(near_duplicates, "_BLOCK_COLUMNS", 6 - block_rows)
        patch.setattr(near_duplicates, "_BATCH_PAIRS", block_rows)
        groups = group_near_duplicates(
            on_circle(*degrees), min_correlation=float(np.cos(np.deg2rad(10.5)))
        )
    assert groups.dtype == np.int64
    assert groups.tolist() == expected  # numbered from 0, in order of first appearance


def test_permutation_keeps_the_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_BLOCK_ROWS", 16)
    thumbnails = draw_thumbnails(60)
    thumbnails[30:] = thumbnails[:30] ^ 1  # each has a near duplicate in the other half
    order = np.random.default_rng(1).permutation(60)
    groups = group_near_duplicates(standardise_thumbnails(thumbnails[order]), min_correlation=0.99)
    assert len(set(groups)) == 30
    assert (groups[np.argsort(order)][:30] == groups[np.argsort(order)][30:]).all()


def test_find_nearest_matches_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(near_duplicates, "_BLOCK_COLUMNS", 5)
    query, reference = draw_thumbnails(24, seed=1), draw_thumbnails(19, seed=2)
    reference[18] = query[23]
    nearest, correlation = find_nearest(
        standardise_thumbnails(query), standardise_thumbnails(reference)
    )
    table = np.corrcoef(query, reference)[:24, 24:]
    assert nearest.tolist() == table.argmax(axis=1).tolist()
    np.testing.assert_allclose(correlation, table.max(axis=1), atol=2e-6)
    assert (nearest[23], float(correlation[23])) == (18, pytest.approx(1))
    empty = find_nearest(np.zeros((0, 576), np.float32), standardise_thumbnails(reference))
    assert [len(part) for part in empty] == [0, 0]


# ----------------------------------------------------------------------- search in large data sets


def draw_near_duplicates(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Draw standardised thumbnails; a third are others with added noise of varying strength."""
    rng = np.random.default_rng(seed)
    patterns = rng.normal(0, 1, (12, 576))
    pixels = 128 + 30 * (rng.normal(0, 1, (count, 12)) @ patterns) / 3
    pixels += rng.normal(0, 6, (count, 576))
    third = count // 3
    noise = rng.normal(0, 1, (third, 576)) * rng.uniform(0, 12, (third, 1))
    pixels[:third] = pixels[third : 2 * third] + noise
    order = rng.permutation(count)
    return standardise_thumbnails(np.clip(pixels, 0, 255).astype(np.uint8)[order])


@pytest.mark.parametrize("min_correlation", [0.9, 0.96, 0.995])
def test_groups_match_an_exhaustive_search(min_correlation: float) -> None:
    standardised = draw_near_duplicates(3000)
    links = standardised @ standardised.T >= min_correlation
    _, expected = connected_components(coo_array(links), directed=False)
    assert len(set(expected)) < 3000
    groups = group_near_duplicates(standardised, min_correlation=min_correlation)
    assert groups.tolist() == expected.tolist()


def test_search_by_cells_finds_nearly_all_pairs() -> None:
    standardised = draw_near_duplicates(6000, seed=1)
    exact = group_near_duplicates(standardised, min_correlation=0.96)
    by_cells = group_near_duplicates(standardised, min_correlation=0.96, exact_pairs=0)
    recall = measure_recall(standardised, by_cells, min_correlation=0.96, num_samples=6000)
    assert recall["num_pairs"] == int((standardised @ standardised.T >= 0.96).sum()) - 6000
    assert recall["num_grouped"] >= 0.999 * recall["num_pairs"]
    for group in np.unique(by_cells):  # the search by cells never joins two groups
        assert len(set(exact[by_cells == group])) == 1


def test_recall_counts_missed_pairs() -> None:
    standardised = draw_near_duplicates(300)
    recall = measure_recall(standardised, np.arange(300), min_correlation=0.96)
    assert recall["num_pairs"] > 20
    assert recall["num_grouped"] == 0


def test_search_by_cells_nearly_always_finds_the_nearest() -> None:
    standardised = draw_near_duplicates(6000, seed=2)
    queries, reference = standardised[:1500], standardised[1500:]
    nearest, correlation = find_nearest(queries, reference, exact_pairs=0)
    best = (queries @ reference.T).max(axis=1)
    expected = np.einsum("ij,ij->i", queries, reference[nearest])
    np.testing.assert_allclose(correlation, expected, atol=2e-6)
    assert (correlation >= best - 2e-6).mean() > 0.9
    assert (correlation[best >= 0.96] >= 0.96).mean() > 0.99


def count_in_process(blocks: list[Block], rows: NDArray[np.float32]) -> tuple[int, int, int]:
    return os.getpid(), count_products(blocks), len(rows)


@pytest.mark.usefixtures("local_ray")
def test_large_searches_run_in_ray_tasks_and_small_ones_in_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks, rows = list_tiles(20_000, 30_000), np.zeros((7, 3), np.float32)
    assert list(run_blocks(count_in_process, blocks, rows)) == [(os.getpid(), 20_000 * 30_000, 7)]
    monkeypatch.setattr(near_duplicates, "MIN_RAY_PRODUCTS", 20_000 * 30_000)
    found = list(run_blocks(count_in_process, blocks, rows))
    assert len(found) >= 2
    assert os.getpid() not in {process for process, _, _ in found}
    assert sum(products for _, products, _ in found) == 20_000 * 30_000
    assert {shape for _, _, shape in found} == {7}


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("exact_pairs", [0, EXACT_PAIRS])
def test_ray_tasks_and_one_process_find_the_same(
    monkeypatch: pytest.MonkeyPatch, exact_pairs: int
) -> None:
    standardised = draw_near_duplicates(3000)
    groups = group_near_duplicates(standardised, min_correlation=0.96, exact_pairs=exact_pairs)
    nearest = find_nearest(standardised[:900], standardised[900:], exact_pairs=exact_pairs)
    monkeypatch.setattr(near_duplicates, "MIN_RAY_PRODUCTS", 0)
    task_groups = group_near_duplicates(standardised, min_correlation=0.96, exact_pairs=exact_pairs)
    task_nearest = find_nearest(standardised[:900], standardised[900:], exact_pairs=exact_pairs)
    assert 1000 < len(set(groups)) < 3000
    assert groups.tolist() == task_groups.tolist()
    assert nearest[0].tolist() == task_nearest[0].tolist()
    np.testing.assert_allclose(nearest[1], task_nearest[1], atol=2e-6)


@given(
    seed=st.integers(0, 1000), count=st.integers(2, 40), num_axes=st.integers(0, 40),
    dimensions=st.integers(1, 40),
)  # fmt: skip
@example(seed=227, count=19, num_axes=7, dimensions=8)  # one vector is nearly in the 7 axes
def test_products_of_sketches_are_upper_bounds_of_products_of_vectors(
    seed: int, count: int, num_axes: int, dimensions: int
) -> None:
    vectors = np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    sketches = build_sketches(vectors, num_axes)
    assert sketches.shape == (count, min(num_axes, dimensions) + 1)
    assert (sketches @ sketches.T >= vectors @ vectors.T - 1e-5).all()


def test_exact_duplicates_are_one_group_and_uniform_images_are_not() -> None:
    thumbnails = draw_thumbnails(40)
    thumbnails[5:25] = thumbnails[4]
    thumbnails[30:35] = 9
    groups = group_near_duplicates(standardise_thumbnails(thumbnails), min_correlation=1.0)
    assert len(set(groups[4:25])) == 1
    assert len(set(groups)) == 40 - 20


@pytest.mark.parametrize(
    ("given_groups", "same"),
    [
        ([None] * 6, [0, 0, 1, 1, 2, 3]),
        (["p", None, None, "p", None, None], [0, 0, 0, 0, 2, 3]),  # joins two groups
        (["p", None, "q", None, "q", "p"], [0, 0, 1, 1, 1, 0]),
        (["p", None, "p", "q", None, "q"], [0, 0, 0, 0, 2, 0]),  # joins three groups
        (["", None, None, "", None, None], [0, 0, 1, 1, 2, 3]),  # empty names are ignored
    ],
)
def test_groups_are_merged_by_given_names(given_groups: list[str | None], same: list[int]) -> None:
    merged = merge_groups(np.array([0, 0, 1, 1, 2, 3]), given_groups)
    assert (np.equal.outer(merged, merged) == np.equal.outer(same, same)).all()
    assert merged.min() == 0


def test_merge_groups_of_many_images_with_one_name() -> None:
    merged = merge_groups(np.repeat([0, 1, 2], 256), ["a"] * 512 + [None] * 256)
    assert (merged[:512] == merged[0]).all()
    assert (merged[512:] != merged[0]).all()
    assert len(merge_groups(np.zeros(0, np.int64), [])) == 0


def test_slices_of_a_phantom_subject_are_one_group() -> None:
    phantoms = list(iterate_phantoms(num_per_class=4, seed=5, slices_per_subject=2))
    thumbnails = [
        compute_thumbnail(np.asarray(Image.open(io.BytesIO(p.image_bytes)).convert("L")))
        for p in phantoms
    ]
    groups = group_near_duplicates(
        standardise_thumbnails(np.stack(thumbnails)), min_correlation=0.96
    )
    of_subject: dict[str, set[int]] = {}
    for phantom, group in zip(phantoms, groups, strict=True):
        of_subject.setdefault(phantom.subject, set()).add(int(group))
    assert len(of_subject) == 8
    assert all(len(found) == 1 for found in of_subject.values())
    assert len(set(groups)) >= 4  # subjects are not all in one group


# --------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def read_real() -> Callable[[str], NDArray[np.float32]]:
    """Read the standardised thumbnails of a folder of the real data."""
    if not (DATA / "Testing").is_dir():
        pytest.skip(f"no real data in {DATA}; set BRAINRAY_DATA to its folder")

    def read(folder: str) -> NDArray[np.float32]:
        files = sorted((DATA / folder).glob("*.jpg"))
        pictures = [np.asarray(Image.open(file).convert("L")) for file in files]
        return standardise_thumbnails(np.stack([compute_thumbnail(p) for p in pictures]))

    return read


def test_real_groups_are_small_and_of_one_class(
    read_real: Callable[[str], NDArray[np.float32]],
) -> None:
    parts = {name: read_real(f"Testing/{name}") for name in BRAIN_TUMOUR_CLASSES}
    assert {name: len(part) for name, part in parts.items()} == NUM_TESTING
    labels = np.repeat(np.arange(4), list(NUM_TESTING.values()))
    groups = group_near_duplicates(np.concatenate(list(parts.values())), min_correlation=0.96)
    sizes = np.bincount(groups)
    # Over all 7,019 images: 3,752 groups, the largest 57, 10 of them with mixed labels.
    assert 0.53 < len(sizes) / len(labels) < 0.95
    assert 2 <= sizes.max() <= 57
    assert sum(len(set(labels[groups == group])) > 1 for group in range(len(sizes))) <= 10


def test_real_near_duplicates_between_testing_and_training(
    read_real: Callable[[str], NDArray[np.float32]],
) -> None:
    # 365 of the official notumor test images, of which Testing/notumor's 201 are half, have a
    # near duplicate in Training.
    _, correlation = find_nearest(read_real("Testing/notumor"), read_real("Training/notumor"))
    share = float((correlation >= NEAR_DUPLICATE_CORRELATION).mean())
    assert share == pytest.approx(365 / (2 * 201), abs=0.05)
    assert (correlation > 0.99999).sum() > 10  # exact duplicates
