"""Predict on Ray Data: a pool of actors turns opened scans into rows of the prediction table.

Bulk jobs, evaluation and calibration share it.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import Dataset
from ray.exceptions import RayError, RayTaskError

from brainray.cluster import TASK_CPUS, list_nodes, share_cpus
from brainray.data.scan_store import view_pixels
from brainray.errors import BrainrayError
from brainray.images.preprocess import Preprocessing
from brainray.inference.engine import Engine, EngineOptions, Output, prepare_engine
from brainray.inference.schema import SCAN_SCHEMA, build_rows
from brainray.model.classifier import read_classifier_metadata
from brainray.runlog import Log

CPUS_PER_ENGINE = 4
"""Most threads of one engine on a CPU."""
GPU_BATCH_SIZE = 256
"""Images per call of an engine on a GPU, where Ray Data requires a batch size and merges smaller
blocks. On a CPU each block is one call."""
MAX_FAILURES = 3
"""Failures of Ray in a row, as by the loss of a node, without a new prediction."""
WARM_UP_SIZE = 8
"""Black images predicted first, enough for the engine to compile its model for batches."""

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginePool:
    """How many engines run, and the resources of each."""

    options: EngineOptions
    num_engines: int
    cpus: float
    """Logical CPUs that one engine reserves."""
    gpus: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictStage:
    """Configuration of the actors that predict; picklable."""

    classifier_id: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    engine: "ray.ObjectRef[Callable[[], Engine]]"
    """From :func:`brainray.inference.engine.prepare_engine`."""
    pool: EnginePool
    outputs: tuple[Output, ...] = ()

    @classmethod
    def open(
        cls, classifier_uri: str, pool: EnginePool, outputs: Sequence[Output] = ()
    ) -> "PredictStage":
        """Prepare the engine of a classifier, and put it into the object store."""
        engine = prepare_engine(classifier_uri, pool.options)
        return cls.of(read_classifier_metadata(classifier_uri), engine, pool, outputs)

    @classmethod
    def of(
        cls,
        metadata: dict[str, Any],
        engine: Callable[[], Engine],
        pool: EnginePool,
        outputs: Sequence[Output] = (),
    ) -> "PredictStage":
        """Put a prepared engine into the object store."""
        return cls(
            classifier_id=str(metadata["classifier_id"]),
            classes=tuple(metadata["classes"]),
            preprocessing=Preprocessing(**metadata["preprocessing"]),
            engine=ray.put(engine),
            pool=pool,
            outputs=tuple(outputs),
        )

    def apply(self, scans: Dataset) -> Dataset:
        """Predict a stream of opened scans.

        Parameters
        ----------
        scans : Dataset
            Columns of :data:`brainray.inference.schema.SCAN_SCHEMA`; ``image``, the network input
            as bytes, null if there is a ``reason``; and any others.

        Returns
        -------
        Dataset
            Rows of the prediction table with the other columns; ``predict_s``, the row's share of
            the engine's time; and ``runtime``, JSON of
            :meth:`brainray.inference.engine.Engine.describe`. A block stays one block.
        """
        pool = self.pool
        with warnings.catch_warnings():
            # Ray 2.60 deprecates `max_restarts` here without a replacement. Without it Ray restarts
            # an actor that a scan kills for ever.
            warnings.simplefilter("ignore", DeprecationWarning)
            predicted: Dataset = scans.map_batches(
                _PredictBatch,
                batch_size=GPU_BATCH_SIZE if pool.gpus else None,
                batch_format="pyarrow",
                fn_constructor_kwargs={"stage": self},
                num_cpus=pool.cpus,
                num_gpus=pool.gpus or None,
                max_restarts=0,
                compute=ray.data.ActorPoolStrategy(
                    size=pool.num_engines, max_tasks_in_flight_per_actor=2
                ),
            )
        return predicted


def retry_lost(start: Callable[[], Iterator[Item]], log: Log = lambda _: None) -> Iterator[Item]:
    """Yield from a stream of Ray Data; after Ray lost a process, start another for what is left.

    Raises
    ------
    RayTaskError
        A task failed; a second attempt would fail too.
    RayError
        Ray failed :data:`MAX_FAILURES` times in a row.
    """
    failures = 0
    while True:
        try:
            for item in start():
                failures = 0
                yield item
            return
        except RayTaskError:
            raise
        except RayError as error:
            failures += 1
            if failures == MAX_FAILURES:
                raise
            first_line = str(error).strip().partition("\n")[0]
            log(f"Ray lost a process ({first_line}); continuing with the other shards.")


def pack_images(images: Sequence[NDArray[np.uint8] | None], size_px: int) -> pa.Array:
    """Return network inputs, (size_px, size_px) each, as the column ``image``."""
    values = [None if image is None else image.tobytes() for image in images]
    return pa.array(values, pa.binary(size_px**2))


class _PredictBatch:
    """An actor with an engine."""

    def __init__(self, stage: PredictStage) -> None:
        self._stage = stage
        self._error: BrainrayError | None = None
        try:
            self._engine = ray.get(stage.engine)()
        except BrainrayError as error:
            # Raised here, the driver would only see the text of an ActorDiedError (Ray 2.60).
            self._error = error
            return
        self._engine.predict(self._engine.make_batch(WARM_UP_SIZE), stage.outputs)

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._error is not None:
            raise self._error
        started = time.perf_counter()
        stage, about = self._stage, self._engine.describe()
        images = view_pixels(batch["image"], stage.preprocessing.size_px)
        opened = np.flatnonzero(batch["image"].is_valid().to_numpy())
        rows = build_rows(
            batch,
            self._engine.predict(images[opened], stage.outputs),
            classes=stage.classes,
            classifier_id=stage.classifier_id,
            engine=about,
        )
        for name in batch.column_names:
            if name not in SCAN_SCHEMA.names and name != "image":
                rows = rows.append_column(name, batch[name])
        seconds = (time.perf_counter() - started) / max(1, batch.num_rows)
        rows = rows.append_column("predict_s", pa.array([seconds] * batch.num_rows, pa.float32()))
        return rows.append_column("runtime", pa.array([json.dumps(about)] * batch.num_rows))


def plan_pool(
    options: EngineOptions, *, num_engines: int | None = None, gpus_per_engine: float = 1.0
) -> EnginePool:
    """Divide the cluster's CPUs or GPUs among engines; Ray must be connected.

    The default of ``num_engines`` is one per GPU, or one per four CPUs. Each has the share
    ``gpus_per_engine`` of a GPU. ``options.num_threads`` is chosen if it is not given.
    """
    nodes = list_nodes()
    sizes = [int(node.get("CPU", 0.0)) for node in nodes]
    if options.use_gpu:
        gpus = sum(node.get("GPU", 0.0) for node in nodes)
        count = num_engines or max(1, int(gpus / gpus_per_engine))
        cpus = share_cpus(count, nodes, GPU=gpus_per_engine)
        return EnginePool(options=options, num_engines=count, cpus=cpus, gpus=gpus_per_engine)
    most = max(1, min(CPUS_PER_ENGINE, max(sizes, default=1)))
    count = num_engines or sum(max(1, n // most) for n in sizes if n) or 1
    threads = options.num_threads or max(1, min(most, max(1, sum(sizes)) // count))
    # One CPU per engine stays free for decoding, which needs a tenth of the engine's time.
    cpus = share_cpus(count, nodes, wanted=max(0.5, threads - 1.0))
    return EnginePool(
        options=replace(options, num_threads=threads), num_engines=count, cpus=max(cpus, TASK_CPUS)
    )
