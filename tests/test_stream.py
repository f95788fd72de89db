"""Scanning and streaming on Ray: every image once, in the order that was planned."""

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from numpy.typing import NDArray

from brainray.data import scan as scan_room
from brainray.data.labelled import find_samples
from brainray.data.scan import ScanResult, scan_samples
from brainray.data.stream import (
    LoadedBatch,
    StreamPlan,
    count_off,
    iterate_batches,
    list_chunks,
    open_stream,
    shuffle_epoch,
)
from brainray.errors import TrainingError
from brainray.images.decode import DecodeLimits
from brainray.images.preprocess import Preprocessing, load_image
from tests.conftest import CLASSES

pytestmark = pytest.mark.usefixtures("local_ray")


def scan(place: Path) -> ScanResult:
    samples = find_samples(str(place), CLASSES, splits=("train",)).samples
    return scan_samples(samples, limits=DecodeLimits())


def plan_stream(world_size: int, num_images: int, **changes: object) -> StreamPlan:
    values: dict[str, object] = {
        "train_indices": np.arange(num_images - 10),
        "val_indices": np.arange(num_images - 10, num_images),
        "epoch_sizes_px": (32, 48),
        "start_epoch": 0,
        "global_batch_size": 7,
        "world_size": world_size,
        "seed": 5,
        "preprocessing": Preprocessing(size_px=40),
        "limits": DecodeLimits(),
    }
    return StreamPlan(**(values | changes))  # type: ignore[arg-type]


def drain(plan: StreamPlan, found: ScanResult) -> list[list[LoadedBatch]]:
    """Read every worker's end at once, as the workers do."""
    shards = open_stream(plan, found.store, num_tasks=2)
    batches: list[list[LoadedBatch]] = [[] for _ in shards]

    def read(rank: int) -> None:
        batches[rank].extend(iterate_batches(shards[rank], plan, rank))

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    return batches


def join_steps(batches: list[list[LoadedBatch]]) -> list[tuple[str, int, NDArray[np.int64]]]:
    """Put the workers' shares of every step together again."""
    return [
        (shares[0].kind, shares[0].epoch, np.concatenate([share.indices for share in shares]))
        for shares in zip(*batches, strict=True)
    ]


def test_scan_knows_every_file_and_gives_its_bytes(phantom_folder: Path) -> None:
    found = scan(phantom_folder)
    files = sorted(p for p in (phantom_folder / "Training").rglob("*") if p.is_file())
    assert found.table["index"].to_pylist() == list(range(len(files)))
    assert found.table["reason"].null_count == len(files)
    assert found.store.in_object_store
    assert found.store.read([5, 0, 5]) == [files[i].read_bytes() for i in (5, 0, 5)]


def test_kept_pixels_are_those_that_decoding_again_gives(phantom_folder: Path) -> None:
    samples = find_samples(str(phantom_folder), CLASSES).samples
    sizes = [
        Preprocessing(size_px=48),
        Preprocessing(size_px=32, fit="pad"),
        Preprocessing(size_px=32, fit="pad", crop="head"),
        Preprocessing(size_px=32, fit="pad", intensity="percentile"),
    ]
    limits = DecodeLimits()
    kept = scan_samples(samples, limits=limits, keep=sizes).store
    plain = scan_samples(samples, limits=limits).store
    for preprocessing in sizes:
        again = [load_image(c, preprocessing, limits) for c in plain.read([7, 0, 7])]
        np.testing.assert_array_equal(kept.load_images([7, 0, 7], preprocessing, limits), again)
        np.testing.assert_array_equal(plain.load_images([7, 0, 7], preprocessing, limits), again)


def test_kept_pixels_are_not_decoded_again(
    phantom_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = find_samples(str(phantom_folder), CLASSES).samples
    size = Preprocessing(size_px=48)
    kept = scan_samples(samples, limits=DecodeLimits(), keep=[size]).store
    monkeypatch.setattr("brainray.data.scan.load_image", None)
    assert kept.load_images([3, 1], size, DecodeLimits()).shape == (2, 48, 48)
    with pytest.raises(TypeError):
        kept.load_images([3], Preprocessing(size_px=64), DecodeLimits())


def test_scan_names_the_reason_of_every_scan_it_rejects(
    phantom_folder: Path, tmp_path: Path
) -> None:
    for name in CLASSES:
        source = next((phantom_folder / "Testing" / name).iterdir())
        (tmp_path / name).mkdir()
        (tmp_path / name / source.name).write_bytes(source.read_bytes())
    (tmp_path / "glioma" / "a-empty.jpg").write_bytes(b"")
    (tmp_path / "glioma" / "b-text.png").write_text("hello")
    whole = next(p for p in (phantom_folder / "Testing").rglob("*.jpg")).read_bytes()
    (tmp_path / "glioma" / "c-cut.jpg").write_bytes(whole[: len(whole) // 2])
    found = find_samples(str(tmp_path), CLASSES)
    (tmp_path / "meningioma" / "gone.jpg").write_bytes(whole)
    found_with_gone = find_samples(str(tmp_path), CLASSES)
    (tmp_path / "meningioma" / "gone.jpg").unlink()
    reasons = dict(
        zip(
            found_with_gone.samples["path"].to_pylist(),
            scan_samples(found_with_gone.samples, limits=DecodeLimits())
            .table["reason"]
            .to_pylist(),
            strict=True,
        )
    )
    assert {p: r for p, r in reasons.items() if r} == {
        "glioma/a-empty.jpg": "empty",
        "glioma/b-text.png": "not_an_image",
        "glioma/c-cut.jpg": "truncated",
        "meningioma/gone.jpg": "missing",
    }
    assert found.samples.num_rows + 1 == len(reasons)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_step_is_the_same_images_whatever_the_number_of_workers(
    phantom_folder: Path, world_size: int
) -> None:
    found = scan(phantom_folder)
    plan = plan_stream(world_size, found.table.num_rows)
    steps = join_steps(drain(plan, found))
    for epoch in (0, 1):
        order = shuffle_epoch(plan, epoch)
        train = [indices for kind, e, indices in steps if kind == "train" and e == epoch]
        assert len(train) == plan.steps_per_epoch == len(order) // 7
        np.testing.assert_array_equal(np.concatenate(train), order[: 7 * len(train)])
        val = [indices for kind, e, indices in steps if kind == "val" and e == epoch]
        np.testing.assert_array_equal(np.concatenate(val), plan.val_indices)


def test_counting_off_takes_no_task() -> None:
    hold = ray.remote(num_cpus=ray.cluster_resources()["CPU"])(Holder).remote()
    ray.get(hold.stay.remote())  # type: ignore[attr-defined]
    counted: list[int] = []

    def count() -> None:
        counted.extend(row["id"] for row in count_off(300).iter_rows())

    thread = threading.Thread(target=count, daemon=True)
    try:
        thread.start()
        thread.join(timeout=30)
        assert counted == list(range(300))
        assert count_off(300).num_blocks() == 300
    finally:
        ray.kill(hold)


class Holder:
    """Holds CPUs, as training workers do."""

    def stay(self) -> None:
        """Say that it is there."""


def test_batches_are_decoded_as_the_pixel_room_decodes(phantom_folder: Path) -> None:
    found = scan(phantom_folder)
    plan = plan_stream(1, found.table.num_rows)
    sides = set()
    for batch in drain(plan, found)[0]:
        size_px = plan.preprocessing.size_px if batch.kind == "val" else (32, 48)[batch.epoch]
        sides.add(size_px)
        content = found.store.read([int(batch.indices[-1])])[0]
        expected = load_image(content, Preprocessing(size_px=size_px), plan.limits)
        np.testing.assert_array_equal(batch.images[-1], expected)
    assert sides == {32, 40, 48}


def test_streaming_from_storage_gives_the_same_batches(
    phantom_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = scan(phantom_folder)
    monkeypatch.setattr(scan_room, "OBJECT_STORE_SHARE", 0.0)
    streamed = scan(phantom_folder)
    assert held.store.in_object_store
    assert not streamed.store.in_object_store
    plan = plan_stream(2, held.table.num_rows, epoch_sizes_px=(32,))
    for left, right in zip(
        [b for rank in drain(plan, held) for b in rank],
        [b for rank in drain(plan, streamed) for b in rank],
        strict=True,
    ):
        np.testing.assert_array_equal(left.indices, right.indices)
        np.testing.assert_array_equal(left.images, right.images)


def test_parquet_rows_are_the_files_they_were_made_of(
    phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(p for p in (phantom_folder / "Training").rglob("*") if p.is_file())
    table = pa.table(
        {
            "image_bytes": [file.read_bytes() for file in files],
            "label": [file.parent.name for file in files],
            "path": [file.name for file in files],
        }
    )
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=10)
    for share in (0.4, 0.0):  # held in the object store, and streamed from the file
        monkeypatch.setattr(scan_room, "OBJECT_STORE_SHARE", share)
        found = scan(tmp_path)
        assert found.store.in_object_store == (share > 0)
        assert found.store.read([0, 41, 7]) == [files[i].read_bytes() for i in (0, 41, 7)]


def test_a_chunk_dealt_to_the_wrong_worker_is_noticed(phantom_folder: Path) -> None:
    found = scan(phantom_folder)
    plan = plan_stream(1, found.table.num_rows)
    (shard,) = open_stream(plan, found.store, num_tasks=2)
    other = plan_stream(2, found.table.num_rows, global_batch_size=14)
    assert len(list_chunks(other)) > 0
    with pytest.raises(TrainingError, match="Expected part 1 of the stream, got 0"):
        next(iterate_batches(shard, other, rank=1))
