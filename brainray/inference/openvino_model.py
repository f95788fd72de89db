"""Build a classifier's network as an OpenVINO model, without torch."""

import contextlib
import importlib
import io
import logging
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from brainray.errors import ConfigError
from brainray.images.preprocess import normalise_greys
from brainray.inference.engine import NUM_CALIBRATION_IMAGES
from brainray.model.classifier import Classifier
from brainray.model.resnet50 import BATCH_NORM_EPSILON, NUM_DENSE_STAGES, STAGES

if TYPE_CHECKING:
    import openvino

logger = logging.getLogger(__name__)

importing_lock = threading.Lock()
"""Held while OpenVINO is imported, since the import changes global state."""

Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class QuantisedModel:
    """An int8 model in OpenVINO's file format."""

    xml: bytes
    weights: bytes
    cost: str = ""
    """The difference from fp32 in a sentence."""


def build_model(weights: Weights, size_px: int) -> "openvino.Model":
    """Build the network with a batch size of one.

    Parameters
    ----------
    weights : mapping of str to ndarray of float32
        Names of torchvision's ResNet-50; one input channel.
    size_px : int
        Side of the image.

    Returns
    -------
    openvino.Model
        Input: a normalised image, (1, 1, size_px, size_px). Outputs: logits, (1, K), and pooled
        features of the last three stages, (1, 3584).
    """
    image, stages = _build_stages(weights, size_px, num_dense=0)
    from openvino import Model
    from openvino import opset13 as ops

    means = [ops.reduce_mean(one, np.array([2, 3]), keep_dims=False) for one in stages[-3:]]
    head = ops.matmul(means[-1], ops.constant(weights["fc.weight"]), False, True)
    logits = ops.add(head, ops.constant(weights["fc.bias"][None]))
    return Model([logits, ops.concat(means, axis=1)], [image], "resnet50")


def build_dense_model(weights: Weights, size_px: int) -> "openvino.Model":
    """Build the network for dense features, see :mod:`brainray.model.explain`.

    Parameters are those of :func:`build_model`.

    Returns
    -------
    openvino.Model
        Input: a normalised image, (1, 1, size_px, size_px). Output: (1, 2048, h, w).
    """
    image, stages = _build_stages(weights, size_px, num_dense=NUM_DENSE_STAGES)
    from openvino import Model

    return Model([stages[-1]], [image], "dense_resnet50")


def _build_stages(
    weights: Weights, size_px: int, *, num_dense: int
) -> "tuple[openvino.Node, list[openvino.Output]]":
    """Return the input, and the output of each stage; the last ``num_dense`` have no stride."""
    with importing_lock, without_telemetry():
        from openvino import opset13 as ops

    image = ops.parameter([1, 1, size_px, size_px], np.float32, name="image")
    values = ops.relu(_normalise(_convolve(image, weights, "conv1", 2), weights, "bn1"))
    pooled = ops.max_pool(values, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3])
    values = pooled.output(0)
    stages, dilation = [], 1
    for place, stage in enumerate(STAGES):
        is_dense = place >= len(STAGES) - num_dense
        for number in range(stage.num_blocks):
            stride = stage.stride if number == 0 and not is_dense else 1
            values = _add_block(values, weights, f"{stage.name}.{number}", stride, dilation)
            if number == 0 and is_dense:
                dilation *= stage.stride  # keeps the receptive field of the following blocks
        stages.append(values)
    return image, stages


def _add_block(
    values: "openvino.Output", weights: Weights, name: str, stride: int, dilation: int
) -> "openvino.Output":
    """Add a bottleneck block: three convolutions and a shortcut."""
    from openvino import opset13 as ops

    shortcut = values
    if f"{name}.downsample.0.weight" in weights:
        shortcut = _normalise(
            _convolve(values, weights, f"{name}.downsample.0", stride),
            weights,
            f"{name}.downsample.1",
        )
    for place in (1, 2, 3):
        strides = stride if place == 2 else 1
        values = _convolve(values, weights, f"{name}.conv{place}", strides, dilation)
        values = _normalise(values, weights, f"{name}.bn{place}")
        if place < 3:
            values = ops.relu(values)
    return ops.relu(ops.add(values, shortcut))


def _convolve(
    values: "openvino.Output", weights: Weights, name: str, stride: int, dilation: int = 1
) -> "openvino.Output":
    from openvino import opset13 as ops

    kernel = weights[f"{name}.weight"]
    padding = [dilation * (side // 2) for side in kernel.shape[2:]]
    return ops.convolution(
        values, ops.constant(kernel), [stride] * 2, padding, padding, [dilation] * 2
    )


def _normalise(values: "openvino.Output", weights: Weights, name: str) -> "openvino.Output":
    from openvino import opset13 as ops

    gamma, beta, mean, variance = (
        ops.constant(weights[f"{name}.{part}"])
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    return ops.batch_norm_inference(values, gamma, beta, mean, variance, BATCH_NORM_EPSILON)


def quantise(classifier: Classifier, images: NDArray[np.uint8]) -> QuantisedModel:
    """Convert a classifier's network to int8, except for its first and last layers.

    Weights are scaled per output channel. Images give the ranges of activations, and a correction
    of the biases for the rounding error of each channel's mean.

    Parameters
    ----------
    classifier : Classifier
        It is not changed.
    images : ndarray of uint8, shape (M, size_px, size_px)
        Images of every class, similar to those to classify.

    Raises
    ------
    ConfigError
        NNCF is not installed.
    """
    nncf = _import_nncf()
    model = build_model(classifier.weights, classifier.preprocessing.size_px)
    layers = [
        operation.get_friendly_name()
        for operation in model.get_ordered_ops()
        if operation.get_type_name() in ("Convolution", "MatMul")
    ]
    count = min(len(images), NUM_CALIBRATION_IMAGES)
    chosen = images[np.linspace(0, len(images) - 1, count).round().astype(np.int64)]
    greys = normalise_greys(classifier.preprocessing)
    logger.info("Calibrating int8 on %d images.", count)
    with importing_lock, _silence():
        quantised = nncf.quantize(
            model,
            nncf.Dataset(chosen, lambda image: greys[image][None, None]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=count,
            ignored_scope=nncf.IgnoredScope(names=[layers[0], layers[-1]]),
        )
    return QuantisedModel(*_serialise(quantised))


def _serialise(model: "openvino.Model") -> tuple[bytes, bytes]:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.serialize(model, path)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def _import_nncf() -> ModuleType:
    with importing_lock, without_telemetry(), _silence():
        try:
            return importlib.import_module("nncf")
        except ImportError as error:
            raise ConfigError(
                "int8 needs NNCF, which is not installed. "
                "Run `pip install brainray[int8]`, or pass another --precision."
            ) from error


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress the output of NNCF, and restore the logging configuration that it changes."""
    disabled, logger_class = logging.root.manager.disable, logging.getLoggerClass()
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        logging.setLoggerClass(logger_class)


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
