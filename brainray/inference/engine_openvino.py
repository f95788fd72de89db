"""The OpenVINO engine: CPUs, in fp32, bf16 or int8.

It loads an :class:`ExportedModel`, and does without torch: a process that only predicts starts two
seconds sooner and takes 300 MB less.
"""

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from brainray.images.preprocess import Preprocessing
from brainray.inference.engine import Engine, EngineOptions
from brainray.model.precision import Precision
from brainray.model.trust import Outputs, Trust

if TYPE_CHECKING:
    import openvino

opening_lock = threading.Lock()
"""Held while OpenVINO is imported or traces: both change the state of the whole process."""

_queues: "weakref.WeakSet[openvino.AsyncInferQueue]" = weakref.WeakSet()
"""Those whose threads may be in our callback."""


@atexit.register
def _wait_for_callbacks() -> None:
    """Let OpenVINO's threads leave Python before the interpreter ends.

    The last callback of a call wakes the caller, which may then end the process. A thread still in
    it would find no interpreter to return to, and abort the process ("terminate called without an
    active exception").
    """
    for queue in _queues:
        queue.wait_all()


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """A classifier as the OpenVINO engine loads it; several processes can share one.

    From :func:`brainray.inference.export_openvino.export_model`.
    """

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    trust: Trust
    head_weight: NDArray[np.float32]
    """Shape (K, 2048)."""
    head_bias: NDArray[np.float32]
    """Shape (K,)."""
    xml: bytes
    """The network as OpenVINO's intermediate representation: outputs logits and pooled features."""
    weights: bytes
    greys: NDArray[np.float32]
    """Network input for each grey value, shape (256,)."""
    precision: Precision | None = None
    """int8 where the network is quantised; None where any other can be chosen."""
    int8_cost: str | None = None


class OpenVinoEngine(Engine):
    """One image at a time: on a CPU a batch gains nothing, and no prediction depends on another.

    A lone image is computed by all threads together. Where there are many, of one call or of
    several at once, each thread computes its own: 5 to 10 % more images per second, since no
    thread waits for another, and none is idle while calls follow each other.
    """

    backend = "openvino"

    def __init__(self, model: ExportedModel, precision: Precision, options: EngineOptions) -> None:
        super().__init__(
            model.classes, model.preprocessing, model.trust, model.head_weight, model.head_bias
        )
        with opening_lock, without_telemetry():
            import openvino

        self.precision = precision
        self.int8_cost = model.int8_cost
        self._num_threads = options.num_threads or len(os.sched_getaffinity(0))
        self._core = openvino.Core()
        self._model = self._core.read_model(model.xml, model.weights)
        # Each is compiled when it is first asked for, which takes half a second.
        self._one: openvino.InferRequest | None = None
        self._many: openvino.AsyncInferQueue | None = None
        self._explaining: openvino.InferRequest | None = None
        self._turn, self._feeding, self._counting = (threading.Lock() for _ in range(3))
        self._num_calls = 0
        self._greys = model.greys
        version = openvino.get_version().split("-")[0]
        threads = f"{self._num_threads} thread{'s' * (self._num_threads > 1)}"
        self.description = f"OpenVINO {version}, {precision}, {threads}"

    def _compile(self, model: "openvino.Model", num_streams: int) -> "openvino.CompiledModel":
        return self._core.compile_model(
            model,
            "CPU",
            {
                # Left to itself, OpenVINO takes bf16 wherever the processor has it.
                "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bf16" else "f32",
                "INFERENCE_NUM_THREADS": self._num_threads,
                "NUM_STREAMS": num_streams,
                # Several processes on one machine would be pinned to the same cores.
                "ENABLE_CPU_PINNING": False,
            },
        )

    def _compute_outputs(self, images: NDArray[np.uint8]) -> Outputs:
        outputs = self._allocate(len(images))
        with self._count_call() as is_alone:
            if self._num_threads == 1 or (is_alone and len(images) < 2 * self._num_threads):
                with self._turn:
                    if self._one is None:
                        self._one = self._compile(self._model, 1).create_infer_request()
                    for index, image in enumerate(images):
                        self._one.infer([self._greys[image][None, None]])
                        _copy_outputs(self._one, outputs, index)
            else:
                self._compute_many(images, outputs)
        return outputs

    @contextmanager
    def _count_call(self) -> Iterator[bool]:
        """Count a call while it lasts, and tell whether it is the only one."""
        with self._counting:
            self._num_calls += 1
            is_alone = self._num_calls == 1
        try:
            yield is_alone
        finally:
            with self._counting:
                self._num_calls -= 1

    def _compute_many(self, images: NDArray[np.uint8], outputs: Outputs) -> None:
        """Compute each image in a thread of its own, beside those of other calls."""
        call = _Call(outputs)
        for index, image in enumerate(images):
            values = self._greys[image][None, None]
            with self._feeding:
                self._build_queue().start_async([values], (call, index))
        call.wait()

    def _build_queue(self) -> "openvino.AsyncInferQueue":
        """Compile the model once more, for many images, when they first come."""
        if self._many is None:
            import openvino

            self._many = openvino.AsyncInferQueue(
                self._compile(self._model, num_streams=self._num_threads), self._num_threads
            )
            self._many.set_callback(_keep_output)
            _queues.add(self._many)
        return self._many

    def _compute_features(self, images: NDArray[np.uint8]) -> tuple[Outputs, NDArray[np.float32]]:
        outputs = self._allocate(len(images))
        features = []
        with self._turn:
            if self._explaining is None:  # compiled once more, when it is first asked for
                model = _keep_features(self._model)
                self._explaining = self._compile(model, num_streams=1).create_infer_request()
            for index, image in enumerate(images):
                self._explaining.infer([self._greys[image][None, None]])
                _copy_outputs(self._explaining, outputs, index)
                features.append(self._explaining.get_output_tensor(2).data.copy())
        return outputs, np.concatenate(features)


class _Call:
    """The images of one call, until the last of them is computed."""

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs
        self._left = len(outputs.logits)
        self._lock = threading.Lock()
        self._is_done = threading.Event()

    def keep(self, index: int, request: "openvino.InferRequest") -> None:
        """Take what was computed of one image."""
        _copy_outputs(request, self._outputs, index)
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._is_done.set()

    def wait(self) -> None:
        """Wait for the last image."""
        self._is_done.wait()


def _keep_output(request: "openvino.InferRequest", place: tuple[_Call, int]) -> None:
    call, index = place
    call.keep(index, request)


def _copy_outputs(request: "openvino.InferRequest", outputs: Outputs, index: int) -> None:
    outputs.logits[index] = request.get_output_tensor(0).data[0]
    outputs.features[index] = request.get_output_tensor(1).data[0]


def _keep_features(model: "openvino.Model") -> "openvino.Model":
    """Return a copy whose third output are the features that the head averages."""
    kept = model.clone()
    node = kept.output(0).get_node()
    while node.get_type_name() != "Relu":  # the last one is where the head begins
        node = node.input_value(0).get_node()
    assert len(node.output(0).get_shape()) == 4, node
    kept.add_outputs(node.output(0))
    return kept


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Import OpenVINO or NNCF such that neither reports to its maker.

    Each import and each conversion of theirs (OpenVINO 2026.4, NNCF 3.4) sends an event to
    Google Analytics, and leaves an identifier in ``~/intel``. Both do without where the package
    that sends is not installed, so it is hidden from them. Their own switch, ``opt_in_out
    --opt_out``, is one for the user's whole home, and itself sends an event. Drop this when an
    environment variable or an argument turns it off.
    """
    sender = "openvino_telemetry"
    before = sys.modules.get(sender)
    sys.modules[sender] = None  # type: ignore[assignment]  # importing it is an ImportError now
    try:
        yield
    finally:
        del sys.modules[sender]
        if before is not None:
            sys.modules[sender] = before
