"""The OpenVINO engine for CPUs, in fp32, bf16 or int8.

It does not import torch, which saves two seconds and 300 MB in a process that only predicts.
"""

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from brainray.images.preprocess import normalise_greys
from brainray.inference.engine import Engine, EngineOptions
from brainray.model.calibration import Outputs
from brainray.model.precision import Precision
from brainray.model.resnet50 import BATCH_NORM_EPSILON, NUM_DENSE_STAGES, STAGES

if TYPE_CHECKING:
    from brainray.inference.int8 import QuantisedModel
    from brainray.model.classifier import Classifier


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Import OpenVINO or NNCF without their telemetry.

    Each import and conversion (OpenVINO 2026.4, NNCF 3.4) sends an event to Google Analytics, and
    writes an identifier into ``~/intel``. Neither happens if the package ``openvino_telemetry`` is
    missing, so this hides it. The official switch, ``opt_in_out --opt_out``, changes the user's
    home and itself sends an event. Remove this when an environment variable or an argument
    disables telemetry.
    """
    sender = "openvino_telemetry"
    before = sys.modules.get(sender)
    sys.modules[sender] = None  # type: ignore[assignment]  # its import raises ImportError
    try:
        yield
    finally:
        del sys.modules[sender]
        if before is not None:
            sys.modules[sender] = before


with without_telemetry():
    import openvino
    from openvino import opset13 as ops

Weights = Mapping[str, NDArray[np.float32]]

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
        super().__init__(classifier)
        self.precision = precision
        self.int8_cost = quantised.cost if quantised else None
        self._num_threads = options.num_threads or len(os.sched_getaffinity(0))
        self._core = openvino.Core()
        self._weights = classifier.weights
        self._model = (
            self._core.read_model(quantised.xml, quantised.weights)
            if quantised
            else build_model(self._weights, self._preprocessing.size_px)
        )
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

    def _compile(self, model: openvino.Model, num_streams: int) -> openvino.CompiledModel:
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
        with self._counting:
            self._num_calls += 1
            is_alone = self._num_calls == 1
        try:
            if self._num_threads == 1 or (is_alone and len(images) < 2 * self._num_threads):
                self._compute_one_by_one(images, outputs)
            else:
                self._compute_concurrently(images, outputs)
        finally:
            with self._counting:
                self._num_calls -= 1
        return outputs

    def _compute_one_by_one(self, images: NDArray[np.uint8], outputs: Outputs) -> None:
        with self._turn:
            if self._one is None:
                self._one = self._compile(self._model, 1).create_infer_request()
            for index, image in enumerate(images):
                self._one.infer([self._greys[image][None, None]])
                _copy_outputs(self._one, outputs, index)

    def _compute_concurrently(self, images: NDArray[np.uint8], outputs: Outputs) -> None:
        """Compute each image in one thread, together with those of other calls."""
        done = threading.Semaphore(0)
        for index, image in enumerate(images):
            values = self._greys[image][None, None]
            with self._feeding:
                if self._many is None:
                    model = self._compile(self._model, num_streams=self._num_threads)
                    self._many = openvino.AsyncInferQueue(model, self._num_threads)
                    self._many.set_callback(_keep_output)
                    _queues.add(self._many)
                self._many.start_async([values], (outputs, index, done))
        for _ in images:
            done.acquire()

    def _compute_features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        features = []
        with self._turn:
            if self._explaining is None:
                model = build_model(self._weights, self._preprocessing.size_px, is_dense=True)
                self._explaining = self._compile(model, num_streams=1).create_infer_request()
            for image in images:
                self._explaining.infer([self._greys[image][None, None]])
                features.append(self._explaining.get_output_tensor(0).data.copy())
        return np.concatenate(features)


def _keep_output(
    request: openvino.InferRequest, place: tuple[Outputs, int, threading.Semaphore]
) -> None:
    outputs, index, done = place
    _copy_outputs(request, outputs, index)
    done.release()


def _copy_outputs(request: openvino.InferRequest, outputs: Outputs, index: int) -> None:
    outputs.logits[index] = request.get_output_tensor(0).data[0]
    outputs.features[index] = request.get_output_tensor(1).data[0]


def build_model(weights: Weights, size_px: int, *, is_dense: bool = False) -> openvino.Model:
    """Build a classifier's network with a batch size of one, without torch.

    Parameters
    ----------
    weights : mapping of str to ndarray of float32
        Names of torchvision's ResNet-50; one input channel.
    size_px : int
        Side of the image.
    is_dense : bool
        For class maps, see :mod:`brainray.model.explain`: the last stages have no stride.

    Returns
    -------
    openvino.Model
        Input: a normalised image, (1, 1, size_px, size_px). Outputs: logits, (1, K), and pooled
        features of the last three stages, (1, 3584); if dense, the last features, (1, 2048, h, w).
    """
    image = ops.parameter([1, 1, size_px, size_px], np.float32, name="image")
    values = ops.relu(_normalise(_convolve(image, weights, "conv1", 2), weights, "bn1"))
    values = ops.max_pool(values, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3]).output(0)
    stages, dilation = [], 1
    for place, stage in enumerate(STAGES):
        keeps_size = is_dense and place >= len(STAGES) - NUM_DENSE_STAGES
        for number in range(stage.num_blocks):
            stride = stage.stride if number == 0 and not keeps_size else 1
            values = _add_block(values, weights, f"{stage.name}.{number}", stride, dilation)
            if number == 0 and keeps_size:
                dilation *= stage.stride  # keeps the receptive field of the following blocks
        stages.append(values)
    if is_dense:
        return openvino.Model([values], [image], "dense_resnet50")
    means = [ops.reduce_mean(one, np.array([2, 3]), keep_dims=False) for one in stages[-3:]]
    head = ops.matmul(means[-1], ops.constant(weights["fc.weight"]), False, True)
    logits = ops.add(head, ops.constant(weights["fc.bias"][None]))
    return openvino.Model([logits, ops.concat(means, axis=1)], [image], "resnet50")


def _add_block(
    values: openvino.Output, weights: Weights, name: str, stride: int, dilation: int
) -> openvino.Output:
    """Add a bottleneck block: three convolutions and a shortcut."""
    shortcut = values
    if f"{name}.downsample.0.weight" in weights:
        shortcut = _convolve(values, weights, f"{name}.downsample.0", stride)
        shortcut = _normalise(shortcut, weights, f"{name}.downsample.1")
    for place in (1, 2, 3):
        strides = stride if place == 2 else 1
        values = _convolve(values, weights, f"{name}.conv{place}", strides, dilation)
        values = _normalise(values, weights, f"{name}.bn{place}")
        if place < 3:
            values = ops.relu(values)
    return ops.relu(ops.add(values, shortcut))


def _convolve(
    values: openvino.Output, weights: Weights, name: str, stride: int, dilation: int = 1
) -> openvino.Output:
    kernel = weights[f"{name}.weight"]
    padding = [dilation * (side // 2) for side in kernel.shape[2:]]
    return ops.convolution(
        values, ops.constant(kernel), [stride] * 2, padding, padding, [dilation] * 2
    )


def _normalise(values: openvino.Output, weights: Weights, name: str) -> openvino.Output:
    gamma, beta, mean, variance = (
        ops.constant(weights[f"{name}.{part}"])
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    return ops.batch_norm_inference(values, gamma, beta, mean, variance, BATCH_NORM_EPSILON)
