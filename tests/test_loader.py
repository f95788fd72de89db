"""Loaders: which images each worker gets in each step."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.train
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from brainray.cluster import list_nodes, share_cpus
from brainray.data import fingerprint
from brainray.data.fingerprint import fingerprint_samples
from brainray.data.labelled import find_samples
from brainray.errors import ConfigError
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions
from brainray.training.loader import (
    TRAIN_DATASET,
    Batch,
    LoaderSetup,
    ResidentLoader,
    StreamLoader,
    build_data_config,
    build_train_dataset,
    choose_loader,
    list_blocks,
    share_of,
)
from tests.conftest import CLASSES
from tests.open_scans import load_image

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(size_px=32)
NUM_IMAGES, NUM_VAL, BATCH_SIZE = 96, 13, 7


def make_setup(folder: Path, **changes: Any) -> LoaderSetup:  # noqa: ANN401 - any field
    """Set up a loader of phantoms whose training indices are neither sorted nor contiguous."""
    samples = find_samples(str(folder), CLASSES, splits=("train",)).samples
    store = fingerprint_samples(samples, reading=ReadOptions(), keep=[PREPROCESSING]).store
    numbers = np.random.default_rng(5).permutation(samples.num_rows)
    values: dict[str, Any] = {
        "kind": "resident",
        "train_ids": numbers[NUM_VAL:],
        "val_ids": np.sort(numbers[:NUM_VAL]),
        "labels": samples["label"].to_numpy().astype(np.int64),
        "store": store,
        "preprocessing": PREPROCESSING,
        "global_batch_size": BATCH_SIZE,
        "seed": 11,
        "num_tasks": 2,
    }
    return LoaderSetup(**(values | changes))


@pytest.fixture(scope="module")
def setup(local_ray: None, phantom_folder: Path) -> LoaderSetup:  # noqa: ARG001 - runs
    return make_setup(phantom_folder)


def open_resident(setup: LoaderSetup, world_size: int) -> list[ResidentLoader]:
    return [ResidentLoader(setup, rank, world_size, CPU) for rank in range(world_size)]


def join(shares: list[list[Batch]]) -> list[list[int]]:
    """Concatenate the workers' shares of every step."""
    return [
        np.concatenate([share.image_ids for share in step]).tolist()
        for step in zip(*shares, strict=True)
    ]


def list_epoch(setup: LoaderSetup, world_size: int, epoch: int) -> list[list[int]]:
    loaders = open_resident(setup, world_size)
    return join([list(loader.iterate_epoch(epoch)) for loader in loaders])


@given(world_size=st.integers(1, 9), num_images=st.integers(0, 40))
def test_shares_are_consecutive_and_their_sizes_differ_by_at_most_one(
    world_size: int, num_images: int
) -> None:
    shares = [range(num_images)[share_of(r, world_size, num_images)] for r in range(world_size)]
    assert [number for share in shares for number in share] == list(range(num_images))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_a_step_has_the_same_images_with_any_number_of_workers(
    setup: LoaderSetup, world_size: int
) -> None:
    for epoch in (0, 1):
        steps = list_epoch(setup, world_size, epoch)
        assert steps == list_epoch(setup, 1, epoch)
        assert len(steps) == (NUM_IMAGES - NUM_VAL) // BATCH_SIZE
        seen = [number for step in steps for number in step]
        assert len(seen) == len(set(seen)) == len(steps) * BATCH_SIZE
        assert set(seen) <= set(setup.train_ids.tolist())


def test_order_depends_on_epoch_and_seed_and_is_reproducible(setup: LoaderSetup) -> None:
    orders = [list_epoch(setup, 1, epoch) for epoch in range(3)]
    orders.append(list_epoch(replace(setup, seed=12), 1, 0))
    assert len({str(order) for order in orders}) == 4
    # A resumed run opens a new loader, and starts with a later epoch.
    assert list_epoch(setup, 2, 2) == orders[2]


@pytest.mark.parametrize("world_size", [1, 3, 20])
def test_iterate_once_yields_each_image_once(setup: LoaderSetup, world_size: int) -> None:
    for ids in (setup.val_ids, setup.train_ids):
        loaders = open_resident(setup, world_size)
        seen = [b.image_ids for loader in loaders for b in loader.iterate_once(ids)]
        assert sorted(np.concatenate(seen).tolist()) == sorted(ids.tolist())


def check_batch(setup: LoaderSetup, batch: Batch) -> None:
    uris = ray.get(setup.store.samples)["uri"].take(batch.image_ids).to_pylist()
    contents = [Path(uri).read_bytes() for uri in uris]
    expected = [load_image(content, PREPROCESSING) for content in contents]
    assert batch.images.dtype == torch.uint8
    np.testing.assert_array_equal(batch.images.numpy(), expected)
    assert batch.labels.tolist() == setup.labels[batch.image_ids].tolist()


def test_resident_images_equal_decoded_files(setup: LoaderSetup) -> None:
    (loader,) = open_resident(setup, 1)
    check_batch(setup, next(loader.iterate_epoch(0)))
    check_batch(setup, next(loader.iterate_once(setup.val_ids)))


def test_a_data_set_smaller_than_a_batch_is_one_batch(setup: LoaderSetup) -> None:
    small = replace(setup, global_batch_size=1000)
    (loader,) = open_resident(small, 1)
    assert (loader.global_batch_size, loader.steps_per_epoch) == (NUM_IMAGES - NUM_VAL, 1)


def test_the_loader_is_resident_if_the_pixels_fit(
    setup: LoaderSetup, phantom_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_loader("auto", setup.store, PREPROCESSING) == "resident"
    assert choose_loader("stream", setup.store, PREPROCESSING) == "stream"
    monkeypatch.setattr(fingerprint, "OBJECT_STORE_SHARE", 0.0)
    outside = make_setup(phantom_folder).store
    assert choose_loader("auto", outside, PREPROCESSING) == "stream"
    with pytest.raises(ConfigError, match="--loader resident: the pixels at 32 px do not fit"):
        choose_loader("resident", outside, PREPROCESSING)


# --------------------------------------------------------------------------------------- the stream


@ray.remote(num_cpus=0)
class Recorder:
    """Records the batches that the workers of a training read."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, str], list[list[int]]] = {}

    def write(self, rank: int, phase: str, batches: list[list[int]]) -> None:
        """Record the batches of a worker."""
        self.seen[rank, phase] = batches

    def read(self) -> dict[tuple[int, str], list[list[int]]]:
        """Return all records."""
        return self.seen


def read_stream(loop_config: dict[str, Any]) -> None:
    """Read two epochs as a training worker does, each followed by the validation images."""
    setup: LoaderSetup = loop_config["setup"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    loader = StreamLoader(setup, rank, context.get_world_size(), CPU)

    def record(phase: str, batches: Iterator[Batch]) -> None:
        found = list(batches)
        for batch in found[:2]:
            check_batch(setup, batch)
        ids = [batch.image_ids.tolist() for batch in found]
        ray.get(loop_config["recorder"].write.remote(rank, phase, ids))

    for epoch in range(2):
        record(f"train {epoch}", loader.iterate_epoch(epoch))
        record(f"val {epoch}", loader.iterate_once(setup.val_ids))


def stream(setup: LoaderSetup, num_workers: int) -> dict[tuple[int, str], list[list[int]]]:
    """Run a trainer whose workers read the stream; return the image ids of every batch."""
    recorder = Recorder.remote()  # type: ignore[attr-defined]
    TorchTrainer(
        read_stream,
        train_loop_config={"setup": setup, "recorder": recorder},
        datasets={TRAIN_DATASET: build_train_dataset(setup)},
        dataset_config=build_data_config(),
        scaling_config=ScalingConfig(
            num_workers=num_workers,  # they hold every CPU, as in a real run
            resources_per_worker={"CPU": share_cpus(num_workers, list_nodes())},
        ),
    ).fit()
    seen: dict[tuple[int, str], list[list[int]]] = ray.get(recorder.read.remote())
    return seen


@pytest.fixture(scope="module")
def streamed(setup: LoaderSetup) -> dict[tuple[int, str], list[list[int]]]:
    return stream(replace(setup, kind="stream"), 2)


def test_streaming_workers_share_an_epoch(
    setup: LoaderSetup, streamed: dict[tuple[int, str], list[list[int]]]
) -> None:
    loader = StreamLoader(setup, 0, 2, CPU)
    assert loader.global_batch_size == 2 * (BATCH_SIZE // 2)
    for epoch in (0, 1):
        seen = []
        for rank in (0, 1):
            batches = streamed[rank, f"train {epoch}"]
            assert [len(batch) for batch in batches] == [3] * loader.steps_per_epoch
            seen += [number for batch in batches for number in batch]
        assert len(seen) == len(set(seen)) > NUM_IMAGES - NUM_VAL - 2 * BATCH_SIZE
        assert set(seen) <= set(setup.train_ids.tolist())


def test_streaming_workers_read_each_validation_image_once(
    setup: LoaderSetup, streamed: dict[tuple[int, str], list[list[int]]]
) -> None:
    for epoch in (0, 1):
        seen = [n for rank in (0, 1) for batch in streamed[rank, f"val {epoch}"] for n in batch]
        assert sorted(seen) == setup.val_ids.tolist()


def test_the_stream_repeats_with_a_seed_and_differs_between_epochs(
    setup: LoaderSetup, streamed: dict[tuple[int, str], list[list[int]]]
) -> None:
    assert streamed[0, "train 0"] != streamed[0, "train 1"]
    assert streamed == stream(replace(setup, kind="stream"), 2)


def test_each_block_is_one_row_group(
    local_ray: None,  # noqa: ARG001 - runs
    phantom_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = sorted(p for p in (phantom_folder / "Training").rglob("*") if p.is_file())
    table = pa.table(
        {
            "image_bytes": [file.read_bytes() for file in files],
            "label": [file.parent.name for file in files],
            "path": [file.name for file in files],
        }
    )
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=20)
    monkeypatch.setattr(fingerprint, "OBJECT_STORE_SHARE", 0.0)
    setup = make_setup(tmp_path, kind="stream")
    blocks = list_blocks(setup, setup.train_ids)
    groups = [set(block["row_group"].to_pylist()) for block in blocks]
    assert groups == [{0}, {1}, {2}, {3}, {4}]
    found = [number for block in blocks for number in block["index"].to_pylist()]
    assert sorted(found) == sorted(setup.train_ids.tolist())


def test_blocks_of_files_mix_the_classes(setup: LoaderSetup) -> None:
    small = replace(setup, train_ids=np.arange(NUM_IMAGES))
    rows = build_train_dataset(small).take_all()
    labels = setup.labels[[row["index"] for row in rows]]
    assert (np.diff(labels) != 0).sum() > 2 * len(CLASSES)
