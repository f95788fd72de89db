"""The OpenVINO engine for CPUs, in fp32, bf16 or int8.

It does not import torch, which saves two seconds and 300 MB in a process that only predicts.
"""

import atexit
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from brainray.images.preprocess import normalise_greys
from brainray.inference.engine import Engine, EngineOptions
from brainray.inference.openvino_model import (
    build_dense_model,
    build_model,
    importing_lock,
    without_telemetry,
)
from brainray.model.calibration import Outputs
from brainray.model.precision import Precision

if TYPE_CHECKING:
    import openvino

    from brainray.inference.openvino_model import QuantisedModel
    from brainray.model.classifier import Classifier

_queues: "weakref.WeakSet[openvino.AsyncInferQueue]" = weakref.WeakSet()
"""Queues whose threads may be in our callback."""


@atexit.register
def _wait_for_callbacks() -> None:
    """Wait for OpenVINO's threads before the interpreter exits.

    The last callback of a call wakes the caller, which may then exit. A thread that is still in the
    callback would abort the process ("terminate called without an active exception").
    """
    for queue in _queues:
        queue.wait_all()


class OpenVinoEngine(Engine):
    """Predicts one image at a time, since batches are not faster on a CPU.

    All threads compute a single image together. If there are many images, of one call or several
    concurrent ones, each thread computes its own: that is 5 to 10 % faster, since no thread waits
    for another.
    """

    backend = "openvino"

    def __init__(
        self,
        classifier: "Classifier",
        precision: Precision,
        options: EngineOptions,
        quantised: "QuantisedModel | None" = None,
    ) -> None:
        super().__init__(
            classifier.classes,
            classifier.preprocessing,
            classifier.calibration,
            classifier.weights["fc.weight"],
            classifier.weights["fc.bias"],
        )
        with importing_lock, without_telemetry():
            import openvino

        self.precision = precision
        self.int8_cost = quantised.cost if quantised else None
        self._num_threads = options.num_threads or len(os.sched_getaffinity(0))
        self._core = openvino.Core()
        self._model = (
            self._core.read_model(quantised.xml, quantised.weights)
            if quantised
            else build_model(classifier.weights, classifier.preprocessing.size_px)
        )
        self._weights, self._size_px = classifier.weights, classifier.preprocessing.size_px
        # Each model is compiled when it is first needed, which takes half a second.
        self._one: openvino.InferRequest | None = None
        self._many: openvino.AsyncInferQueue | None = None
        self._explaining: openvino.InferRequest | None = None
        self._turn, self._feeding, self._counting = (threading.Lock() for _ in range(3))
        self._num_calls = 0
        self._greys = normalise_greys(classifier.preprocessing)
        version = openvino.get_version().split("-")[0]
        threads = f"{self._num_threads} thread{'s' * (self._num_threads > 1)}"
        self.description = f"OpenVINO {version}, {precision}, {threads}"

    def _compile(self, model: "openvino.Model", num_streams: int) -> "openvino.CompiledModel":
        return self._core.compile_model(
            model,
            "CPU",
            {
                # OpenVINO would choose bf16 whenever the processor has it.
                "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bf16" else "f32",
                "INFERENCE_NUM_THREADS": self._num_threads,
                "NUM_STREAMS": num_streams,
                # Pinning would put several processes on the same cores.
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
        """Count a call until it ends; yield whether it is the only one."""
        with self._counting:
            self._num_calls += 1
            is_alone = self._num_calls == 1
        try:
            yield is_alone
        finally:
            with self._counting:
                self._num_calls -= 1

    def _compute_many(self, images: NDArray[np.uint8], outputs: Outputs) -> None:
        """Compute each image in one thread, concurrently with those of other calls."""
        call = _Call(outputs)
        for index, image in enumerate(images):
            values = self._greys[image][None, None]
            with self._feeding:
                self._build_queue().start_async([values], (call, index))
        call.wait()

    def _build_queue(self) -> "openvino.AsyncInferQueue":
        """Compile the model for one image per thread at the first call."""
        if self._many is None:
            import openvino

            self._many = openvino.AsyncInferQueue(
                self._compile(self._model, num_streams=self._num_threads), self._num_threads
            )
            self._many.set_callback(_keep_output)
            _queues.add(self._many)
        return self._many

    def _compute_features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        features = []
        with self._turn:
            if self._explaining is None:
                model = build_dense_model(self._weights, self._size_px)
                self._explaining = self._compile(model, num_streams=1).create_infer_request()
            for image in images:
                self._explaining.infer([self._greys[image][None, None]])
                features.append(self._explaining.get_output_tensor(0).data.copy())
        return np.concatenate(features)


class _Call:
    """The outputs of one call."""

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs
        self._left = len(outputs.logits)
        self._lock = threading.Lock()
        self._is_done = threading.Event()

    def keep(self, index: int, request: "openvino.InferRequest") -> None:
        """Keep the outputs of one image."""
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
