"""What the stream delivers, before any byte is read: which image, when, to which worker."""

from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from brainray.data.stream import (
    CHUNK_BYTES,
    SHUFFLE_WINDOW_ROW_GROUPS,
    StreamPlan,
    list_chunks,
    list_indices,
    share_of,
    shuffle_epoch,
)
from brainray.images.decode import DecodeLimits
from brainray.images.preprocess import Preprocessing

WORLD_SIZES = (1, 2, 3, 4, 7)
SIZES = [(40, 9, 8), (41, 17, 8), (23, 5, 5), (16, 16, 16), (100, 33, 7), (9, 1, 1), (30, 4, 3)]
"""Training images, validation images, global batch size."""
SIDE_PX = 1024
"""So large that a chunk is a few steps, and an epoch several chunks."""

Step = tuple[Literal["train", "val"], int, int]


def make_plan(
    num_train: int = 41,
    num_val: int = 17,
    batch: int = 8,
    world_size: int = 1,
    **changes: Any,  # noqa: ANN401 - any field of a plan
) -> StreamPlan:
    """Plan over sample numbers that are neither sorted nor dense."""
    numbers = np.random.default_rng(5).permutation(3 * (num_train + num_val))
    given: dict[str, Any] = {
        "train_indices": numbers[:num_train],
        "val_indices": numbers[num_train : num_train + num_val],
        "epoch_sizes_px": (64, SIDE_PX, SIDE_PX),
        "start_epoch": 0,
        "global_batch_size": batch,
        "world_size": world_size,
        "seed": 11,
        "preprocessing": Preprocessing(size_px=SIDE_PX),
        "limits": DecodeLimits(),
        **changes,
    }
    return StreamPlan(**given)


def collect_steps(plan: StreamPlan) -> dict[Step, list[NDArray[np.int64]]]:
    """Every step of the run in the order of delivery, with each worker's real images."""
    steps: dict[Step, list[NDArray[np.int64]]] = {}
    for chunk in list_chunks(plan):
        shares = [list_indices(plan, chunk, rank) for rank in range(plan.world_size)]
        for row, step in enumerate(range(chunk.start, chunk.stop)):
            key: Step = (chunk.kind, chunk.epoch, step)
            assert key not in steps
            steps[key] = [share[row][share[row] >= 0] for share in shares]
    return steps


def list_seen(steps: dict[Step, list[NDArray[np.int64]]], kind: str, epoch: int) -> list[int]:
    """All images of one kind in one epoch, in order of the steps and ranks."""
    return [
        int(index)
        for (found, at, _), shares in steps.items()
        if (found, at) == (kind, epoch)
        for share in shares
        for index in share
    ]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("num_train", "num_val", "batch"), SIZES)
def test_workers_together_see_the_global_batch_in_order(
    num_train: int, num_val: int, batch: int, world_size: int
) -> None:
    plan = make_plan(num_train, num_val, batch, world_size)
    steps = collect_steps(plan)
    alone = collect_steps(replace(plan, world_size=1))
    assert list(steps) == list(alone), "the same steps in the same order"
    for key, shares in steps.items():
        kind, epoch, step = key
        order = shuffle_epoch(plan, epoch) if kind == "train" else plan.val_indices
        expected = order[step * batch : (step + 1) * batch]
        assert len(expected) > 0
        assert np.concatenate(shares).tolist() == expected.tolist()
        assert alone[key][0].tolist() == expected.tolist()
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= plan.batch_size_per_worker


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("num_train", "num_val", "batch"), SIZES)
def test_an_epoch_sees_each_image_once(
    num_train: int, num_val: int, batch: int, world_size: int
) -> None:
    plan = make_plan(num_train, num_val, batch, world_size)
    assert plan.steps_per_epoch == num_train // batch
    steps = collect_steps(plan)
    for epoch in range(3):
        train = list_seen(steps, "train", epoch)
        assert len(set(train)) == len(train) == num_train // batch * batch
        assert set(train) <= set(plan.train_indices.tolist())
        val = list_seen(steps, "val", epoch)
        assert sorted(val) == sorted(plan.val_indices.tolist())
        assert sum(key[:2] == ("val", epoch) for key in steps) == plan.num_val_steps


def test_an_epoch_trains_before_it_validates() -> None:
    kinds = [(epoch, kind) for kind, epoch, _ in collect_steps(make_plan())]
    expected = [(epoch, kind) for epoch in range(3) for kind in ("train", "val")]
    assert list(dict.fromkeys(kinds)) == expected
    assert kinds == sorted(kinds)  # "train" < "val"


def test_epochs_differ_and_a_seed_repeats_them() -> None:
    plan = make_plan()
    orders = [shuffle_epoch(plan, epoch).tolist() for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == sorted(plan.train_indices.tolist()) for order in orders)
    again = make_plan(world_size=3, batch=4, start_epoch=1)
    assert [shuffle_epoch(again, epoch).tolist() for epoch in range(3)] == orders
    other = shuffle_epoch(make_plan(seed=12), 0).tolist()
    assert other not in orders
    left_out = [set(order[40:]) for order in orders]
    assert len({frozenset(rest) for rest in left_out}) > 1, "the same image never trained on"


@pytest.mark.parametrize("start_epoch", [0, 1, 2, 3])
def test_resuming_cuts_the_front_and_nothing_else(start_epoch: int) -> None:
    whole = collect_steps(make_plan(world_size=2))
    rest = collect_steps(make_plan(world_size=2, start_epoch=start_epoch))
    expected = {key: shares for key, shares in whole.items() if key[1] >= start_epoch}
    assert list(rest) == list(expected)
    for key, shares in expected.items():
        for found, share in zip(rest[key], shares, strict=True):
            assert found.tolist() == share.tolist()


@pytest.mark.parametrize("start_step", [0, 1, 3, 4, 5])
def test_resuming_within_an_epoch_cuts_its_first_steps_and_nothing_else(start_step: int) -> None:
    whole = collect_steps(make_plan(world_size=2))
    rest = collect_steps(make_plan(world_size=3, start_epoch=1, start_step=start_step))
    begin = list(whole).index(("val", 0, 2)) + 1 + start_step
    assert list(rest) == list(whole)[begin:]
    for key, shares in rest.items():
        assert np.concatenate(shares).tolist() == np.concatenate(whole[key]).tolist()


def test_another_number_of_workers_may_resume() -> None:
    """The steps do not change, only who computes them."""
    two = collect_steps(make_plan(world_size=2, start_epoch=1))
    three = collect_steps(make_plan(world_size=3, start_epoch=1))
    assert list(two) == list(three)
    for key, shares in two.items():
        assert np.concatenate(shares).tolist() == np.concatenate(three[key]).tolist()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_chunks_hold_sizes_and_stay_small(world_size: int) -> None:
    plan = make_plan(100, 33, 7, world_size, preprocessing=Preprocessing(size_px=512))
    chunks = list_chunks(plan)
    assert {(c.epoch, c.size_px) for c in chunks if c.kind == "train"} == {
        (0, 64),
        (1, SIDE_PX),
        (2, SIDE_PX),
    }
    assert {c.size_px for c in chunks if c.kind == "val"} == {512}
    for chunk in chunks:
        num_bytes = (chunk.stop - chunk.start) * plan.batch_size_per_worker * chunk.size_px**2
        assert num_bytes <= CHUNK_BYTES or chunk.stop - chunk.start == 1
        assert chunk.stop > chunk.start
    assert sum(c.kind == "train" and c.epoch == 1 for c in chunks) > 1


def test_shares_are_padded_to_one_shape() -> None:
    plan = make_plan(9, 1, 4, world_size=3)
    for chunk in list_chunks(plan):
        for rank in range(3):
            indices = list_indices(plan, chunk, rank)
            assert indices.shape == (chunk.stop - chunk.start, 2)
            assert indices.dtype == np.int64
            for row in indices:  # padding comes last
                assert (np.diff((row < 0).astype(int)) >= 0).all()


@given(world_size=st.integers(1, 20), num_images=st.integers(0, 200))
def test_shares_part_a_batch(world_size: int, num_images: int) -> None:
    shares = [share_of(rank, world_size, num_images) for rank in range(world_size)]
    assert shares[0][0] == 0
    assert shares[-1][1] == num_images
    assert all(a[1] == b[0] for a, b in pairwise(shares))
    sizes = [stop - start for start, stop in shares]
    assert set(sizes) <= {num_images // world_size, num_images // world_size + 1}
    assert sizes == sorted(sizes, reverse=True)


@given(
    num_train=st.integers(1, 120),
    num_val=st.integers(0, 40),
    batch=st.integers(1, 30),
    world_size=st.integers(1, 9),
    row_group=st.sampled_from([None, 1, 4, 13]),
)
def test_any_plan_delivers_every_batch_whole(
    num_train: int, num_val: int, batch: int, world_size: int, row_group: int | None
) -> None:
    rows = None if row_group is None else np.arange(num_train) // row_group
    plan = make_plan(num_train, num_val, batch, world_size, row_groups=rows)
    steps = collect_steps(plan)
    for epoch in range(3):
        order = shuffle_epoch(plan, epoch)
        assert sorted(order.tolist()) == sorted(plan.train_indices.tolist())
        train = list_seen(steps, "train", epoch)
        assert train == order[: num_train // batch * batch].tolist()
        assert list_seen(steps, "val", epoch) == plan.val_indices.tolist()


def test_row_groups_are_mixed_within_windows() -> None:
    num_train, per_group = 120, 5
    rows = np.random.default_rng(0).permutation(np.arange(num_train) // per_group)
    plan = make_plan(num_train, row_groups=rows)
    group_of = dict(zip(plan.train_indices.tolist(), rows.tolist(), strict=True))
    orders = [shuffle_epoch(plan, epoch).tolist() for epoch in range(2)]
    window = SHUFFLE_WINDOW_ROW_GROUPS * per_group
    windows = []
    for order in orders:
        assert sorted(order) == sorted(plan.train_indices.tolist())
        for start in range(0, num_train, window):
            groups = [group_of[index] for index in order[start : start + window]]
            assert len(set(groups)) == SHUFFLE_WINDOW_ROW_GROUPS, "a task reads few row groups"
            changes = sum(a != b for a, b in pairwise(groups))
            assert changes > 2 * SHUFFLE_WINDOW_ROW_GROUPS, "row groups are mixed"
            windows.append(frozenset(groups))
    assert orders[0] != orders[1]
    assert len(set(windows)) > 3, "other row groups meet in another epoch"
    assert shuffle_epoch(replace(plan, world_size=4), 1).tolist() == orders[1]
