"""The bulk stream on Ray Data: list, read and decode, predict; a chunk of scans at a time.

A block is a chunk: one row that holds a whole table, so that Ray neither splits nor joins
what a task is to do, and so that a chunk leaves the listing the moment it is full.
"""

import json
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import Dataset, ExecutionResources

from brainray.dataset.inbox import CHUNK_ROWS
from brainray.dataset.scan import view_pixels
from brainray.dataset.stream import TASK_CPUS, count_off, pause_scheduling
from brainray.errors import ClassifierError
from brainray.model.answer import name_status
from brainray.model.classifier import Classifier, load_classifier
from brainray.model.runtime import RuntimeOptions, measure_disagreement, open_runtime
from brainray.model.trust import UNLIKE_TRAINING
from brainray.pipelines.answers import Ledger
from brainray.pipelines.load import LoadPlan, list_chunks, list_unanswered, load_chunk, pack, unpack
from brainray.pixels.decode import REJECTION_REASONS

NUM_COST_IMAGES = 128
"""Images on which int8 is compared with fp32."""

CHUNKS_PER_PREDICTOR = 8
"""Decoded chunks that may wait for each predictor; more would only take memory."""

CPU_PAUSE_S, GPU_PAUSE_S = 0.5, 0.005
"""Pause of Ray Data's scheduling loop: short beside what a chunk takes to predict."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BulkPlan:
    """What a bulk run computes, and with what."""

    load: LoadPlan
    classifier_uri: str
    runtime: RuntimeOptions
    calibration: "ray.ObjectRef[NDArray[np.uint8]] | None" = None
    """Images for int8, shape (n, size, size)."""
    explain: bool = False
    """Whether answers have their class maps."""
    num_predictors: int
    num_decoders: int
    cpus_per_predictor: float
    """Logical CPUs that one predictor reserves."""
    gpus_per_predictor: float = 0.0


def open_bulk_stream(plan: BulkPlan, ledger: "ray.ObjectRef[Ledger]") -> Dataset:
    """Build the stream of answers; nothing runs until it is read.

    Parameters
    ----------
    plan : BulkPlan
        What to classify, and with what.
    ledger : ObjectRef of Ledger
        What is answered already.

    Returns
    -------
    Dataset
        Rows of ``answers`` (see :func:`brainray.pipelines.load.unpack`), ``runtime`` (JSON) and
        the busy seconds ``list_s``, ``read_s``, ``decode_s`` and ``predict_s``.
    """
    on_gpu = plan.gpus_per_predictor > 0
    stream = count_off(1).map_batches(
        list_chunks,  # type: ignore[arg-type]  # Ray's hint knows no fn_kwargs
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"plan": plan.load, "ledger": ledger},
        num_cpus=TASK_CPUS,
    )
    stream = stream.map_batches(
        load_chunk,  # type: ignore[arg-type]
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"plan": plan.load, "ledger": ledger},
        num_cpus=TASK_CPUS,
        compute=ray.data.TaskPoolStrategy(size=plan.num_decoders),
    )
    with warnings.catch_warnings():
        # Ray 2.60 deprecates `max_restarts` here and offers nothing in its place yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        stream = stream.map_batches(
            _Predictor,
            batch_size=1,  # a chunk; with GPUs, Ray refuses None
            batch_format="pyarrow",
            fn_constructor_kwargs={"plan": plan},
            num_cpus=plan.cpus_per_predictor,
            num_gpus=plan.gpus_per_predictor or None,
            max_restarts=0,  # the run begins again with what is left, and gives up in the end
            compute=ray.data.ActorPoolStrategy(
                size=plan.num_predictors, max_tasks_in_flight_per_actor=4
            ),
        )
    context = stream.context
    context.target_max_block_size = 1  # bytes: every row is a block of its own
    pause_scheduling(context, GPU_PAUSE_S if on_gpu else CPU_PAUSE_S)
    chunk_bytes = CHUNK_ROWS * plan.load.preprocessing.size_px**2
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=(2 + plan.num_predictors) * CHUNKS_PER_PREDICTOR * chunk_bytes
    )
    return stream


@dataclass(slots=True)
class Counted:
    """How many scans there are to answer, counted beside the work."""

    total: int = 0
    """Scans whose name and time are not known yet."""
    hidden: int = 0
    """Hidden files passed over."""
    is_final: bool = False


@contextmanager
def count_beside(plan: LoadPlan, ledger: Ledger) -> Iterator[Counted]:
    """Count the scans while the first are already being classified."""
    counted, stopped = Counted(), threading.Event()

    def count_hidden() -> None:
        counted.hidden += 1

    def count() -> None:
        for _ in list_unanswered(plan, ledger, count_hidden):
            counted.total += 1
            if stopped.is_set():
                return
        counted.is_final = True

    thread = threading.Thread(target=count, name="count", daemon=True)
    thread.start()
    try:
        yield counted
    finally:
        stopped.set()
        thread.join()


class _Predictor:
    """Holds an opened classifier, and predicts; one process for each."""

    def __init__(self, plan: BulkPlan) -> None:
        device = "cuda" if plan.runtime.use_gpu else "cpu"
        classifier = load_classifier(plan.classifier_uri, device=device)
        images = ray.get(plan.calibration) if plan.calibration is not None else None
        self._runtime = open_runtime(classifier, plan.runtime, calibration_images=images)
        self._side = plan.load.preprocessing.size_px
        self._explain = plan.explain
        self._classes = classifier.classes
        about = {
            "backend": self._runtime.name,
            "precision": self._runtime.precision,
            "description": self._runtime.description,
        }
        if images is not None:
            about["cost"] = self._measure_cost(classifier, plan, images[:NUM_COST_IMAGES])
        self._about = json.dumps(about)
        predict = self._runtime.explain if plan.explain else self._runtime.predict_probs
        predict(np.zeros((1, self._side, self._side), np.uint8))  # warm up

    def _measure_cost(
        self, classifier: Classifier, plan: BulkPlan, images: NDArray[np.uint8]
    ) -> str:
        """Say how far the reduced network is from fp32, on images that it was calibrated on."""
        exact = open_runtime(classifier, replace(plan.runtime, precision="fp32"))
        found = measure_disagreement(
            exact.predict_probs(images), self._runtime.predict_probs(images)
        )
        return (
            f"{self._runtime.precision} against fp32 on {found['n']} of the calibration images: "
            f"{found['same_top_class']:.1%} have the same class, "
            f"the largest difference of a probability is {found['largest_difference']:.3f}."
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        started = time.perf_counter()
        chunk = unpack(block["chunk"][0])
        rows = np.flatnonzero(chunk["pixels"].is_valid().to_numpy())
        probs = np.zeros((chunk.num_rows, len(self._classes)), np.float32)
        reasons = chunk["reason"].to_pylist()
        images = view_pixels(chunk["pixels"], self._side)
        ask = self._runtime.explain if self._explain else self._runtime.predict
        found = ask(images[rows])
        probs[rows] = found.probs
        class_maps: list[NDArray[np.float32] | None] = [None] * chunk.num_rows
        for place, row in enumerate(rows):
            reasons[row] = found.reasons[place]
            if found.maps is not None and reasons[row] != UNLIKE_TRAINING:
                class_maps[row] = found.maps[place, found.probs[place].argmax()].ravel()
        if not np.isfinite(probs).all():
            raise ClassifierError("The classifier gives probabilities that are not numbers.")
        chunk = chunk.drop_columns(["pixels", "reason"])
        answers = self._build_answers(chunk, probs, reasons, class_maps)
        return pa.table(
            {
                "answers": [pack(answers)],
                "runtime": [self._about],
                **{name: block[name] for name in ("list_s", "read_s", "decode_s")},
                "predict_s": [time.perf_counter() - started],
            }
        )

    def _build_answers(
        self,
        chunk: pa.Table,
        probs: NDArray[np.float32],
        reasons: list[str | None],
        class_maps: list[NDArray[np.float32] | None],
    ) -> pa.Table:
        statuses = ["rejected" if r in REJECTION_REASONS else name_status(r) for r in reasons]
        status = np.array(statuses, dtype=object)
        top = probs.argmax(1)
        names = np.array(self._classes, dtype=object)[top]
        columns: dict[str, pa.Array] = {
            "reason": pa.array(reasons, pa.string()),
            "status": pa.array(status, pa.string()),
            "predicted_class": pa.array(names, pa.string(), mask=status != "classified"),
            "confidence": pa.array(probs[np.arange(len(top)), top], mask=status == "rejected"),
            **{
                f"prob_{name}": pa.array(probs[:, k], mask=status == "rejected")
                for k, name in enumerate(self._classes)
            },
            "classified_at": pa.array([datetime.now(UTC)] * len(top), pa.timestamp("us", tz="UTC")),
            "class_map": pa.array(class_maps, pa.list_(pa.float32())),
        }
        for name, values in columns.items():
            chunk = chunk.append_column(name, values)
        return chunk
