"""The prediction stage on samples of a data set, also when one of its processes is lost."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from brainray.data.labelled import find_samples
from brainray.errors import ConfigError, RejectedImage
from brainray.evaluation.prepared import PreparedData, group_samples, split_samples
from brainray.images.slices import ReadOptions
from brainray.inference import samples
from brainray.inference.engine import Engine, EngineOptions, open_engine
from brainray.inference.predict import EnginePool, PredictStage
from brainray.inference.samples import predict_samples
from brainray.inference.schema import stack_lists
from brainray.model.classifier import load_classifier, read_classifier_metadata
from tests.conftest import CLASSES

pytestmark = pytest.mark.usefixtures("local_ray")

OPTIONS = EngineOptions(precision="fp32", num_threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, phantom_folder: Path) -> Path:
    """Fill a folder with links to scans, which a test may remove."""
    folder = tmp_path_factory.mktemp("samples")
    for file in (phantom_folder / "Testing").rglob("*.*"):
        link = folder / file.relative_to(phantom_folder / "Testing")
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def data(folder: Path, local_ray: None) -> PreparedData:  # noqa: ARG001 - started
    return prepare(folder)


def prepare(folder: Path) -> PreparedData:
    found = find_samples(str(folder), CLASSES)
    grouped = group_samples(found, CLASSES, keep=[], reading=ReadOptions(), min_correlation=0.96)
    return split_samples(grouped, CLASSES, np.full(len(grouped.kept), "test"))


def build_stage(classifier: Path, engine: Callable[[], Engine]) -> PredictStage:
    pool = EnginePool(options=OPTIONS, num_engines=1, cpus=0.5)
    return PredictStage.of(read_classifier_metadata(str(classifier)), engine, pool, ["logits"])


def open_in_worker(classifier: Path) -> Engine:
    return open_engine(load_classifier(str(classifier)), OPTIONS)


def open_engine_that_exits(classifier: Path, marker: Path, times: int) -> Engine:
    """Open an engine that ends its process at the second block, ``times`` times."""
    engine = open_in_worker(classifier)
    calls, predict = iter(range(99)), engine.predict

    def predict_or_exit(*given: object) -> object:
        if next(calls) == 2:  # the first call warms up
            num_exits = int(marker.read_text()) if marker.exists() else 0
            if num_exits < times:
                marker.write_text(str(num_exits + 1))
                os._exit(1)
        return predict(*given)  # type: ignore[arg-type]

    engine.predict = predict_or_exit  # type: ignore[method-assign,assignment]
    return engine


def raise_config_error() -> Engine:
    raise ConfigError("This processor has no bf16 instructions.")


def test_rows_are_in_the_order_of_the_indices(
    data: PreparedData, tiny_classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "PART_ROWS", 5)
    stage = build_stage(tiny_classifier, partial(open_in_worker, tiny_classifier))
    indices = np.random.default_rng(0).permutation(32)[:23]
    rows, runtime = predict_samples(stage, data.store, data.scans, indices)
    uris = data.scans["scan_uri"].take(pa.array(indices))
    assert rows["scan_uri"].to_pylist() == uris.to_pylist()
    engine = open_in_worker(tiny_classifier)
    assert runtime == engine.describe()
    images = data.store.load_images(indices.tolist(), stage.preprocessing)
    expected = engine.predict(images, ["logits"]).logits
    np.testing.assert_allclose(stack_lists(rows["logits"]), expected, atol=1e-6)


@pytest.mark.slow
def test_the_part_of_a_lost_process_is_repeated(
    data: PreparedData, tiny_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "PART_ROWS", 8)
    engine = partial(open_engine_that_exits, tiny_classifier, tmp_path / "num_exits", 2)
    stage = build_stage(tiny_classifier, engine)
    rows, _ = predict_samples(stage, data.store, data.scans, np.arange(32))
    assert (tmp_path / "num_exits").read_text() == "2"
    assert rows["scan_uri"].to_pylist() == data.scans["scan_uri"].to_pylist()


def test_a_config_error_of_an_engine_is_one_line_in_the_driver(
    data: PreparedData, tiny_classifier: Path
) -> None:
    stage = build_stage(tiny_classifier, raise_config_error)
    with pytest.raises(ConfigError) as caught:
        predict_samples(stage, data.store, data.scans, np.arange(4))
    assert str(caught.value) == "This processor has no bf16 instructions."


def test_a_deleted_file_is_an_error_with_its_reason(
    folder: Path, tiny_classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brainray.data.fingerprint.OBJECT_STORE_SHARE", 0.0)
    data = prepare(folder)
    (link,) = folder.glob(f"{data.found.samples['path'][3]}")
    target = link.readlink()
    link.unlink()
    stage = build_stage(tiny_classifier, partial(open_in_worker, tiny_classifier))
    with pytest.raises(RejectedImage) as caught:
        predict_samples(stage, data.store, data.scans, np.arange(8))
    link.symlink_to(target)
    assert caught.value.reason == "missing"
    assert "\n" not in str(caught.value)


def test_rows_of_a_table_have_the_same_names_as_in_bulk_jobs(
    tmp_path: Path, phantom_folder: Path
) -> None:
    files = sorted((phantom_folder / "Testing").rglob("*.jpg"))
    table = pa.table(
        {
            "image_bytes": [file.read_bytes() for file in files],
            "label": [file.parent.name for file in files],
        }
    )
    pq.write_table(table, tmp_path / "scans.parquet", row_group_size=10)
    data = prepare(tmp_path)
    expected = [f"{tmp_path}/scans.parquet#row={row}" for row in range(len(files))]
    assert data.scans["scan_uri"].to_pylist() == expected
    assert data.scans["size_bytes"].to_pylist() == [file.stat().st_size for file in files]
