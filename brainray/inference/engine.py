"""The engines that compute predictions: OpenVINO or torch, in fp32, bf16 or int8.

Evaluation, calibration, bulk jobs, the HTTP service and ``brainray classify FILE`` all use
:func:`open_engine`. On a CPU, OpenVINO predicts about twice as many images per second as eager
torch (ResNet-50, 224 px), and as fast one at a time as in batches. On a GPU torch is used.

Opening an engine imports torch or OpenVINO; importing this module does not.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from brainray.errors import ConfigError
from brainray.model.calibration import Outputs
from brainray.model.explain import compute_class_maps, count_cells
from brainray.model.precision import (
    AskedPrecision,
    Precision,
    choose_precision,
    has_native_bf16,
)

if TYPE_CHECKING:
    from brainray.inference.int8 import QuantisedModel
    from brainray.model.classifier import Classifier

Backend = Literal["torch", "openvino"]
Output = Literal["logits", "features", "class_maps"]

NUM_POOLED_FEATURES = 512 + 1024 + 2048
"""Channels of ResNet-50's last three stages."""
MAP_BATCH_SIZE = 16
"""Images per batch of class maps; dense features take 6 MB per image at 224 px."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """Options of an engine."""

    backend: Literal["auto", "torch", "openvino"] = "auto"
    """`auto` is openvino on a CPU and torch on a GPU."""
    precision: AskedPrecision = "auto"
    """`auto` is bf16 if the processor or GPU has bf16 instructions, else fp32. int8 needs
    --calibration-uri."""
    num_threads: int | None = None
    """CPU threads of one engine. Default: all CPUs of this process; a service and a bulk job divide
    the CPUs among their engines."""
    use_gpu: bool = False
    """Compute on a GPU."""
    calibration_uri: str | None = None
    """For int8: a folder with some hundred scans of every class, similar to those to classify."""

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"num_threads must be at least 1, got {self.num_threads}.")


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predictions for N images."""

    probs: NDArray[np.float32]
    """Calibrated class probabilities, shape (N, K); rows sum to 1, columns in class order."""
    reasons: list[str | None]
    """For each image a key of :data:`brainray.model.calibration.NO_CLASS_REASONS`, or None if
    it has a class."""
    logits: NDArray[np.float32] | None = None
    """Logits before calibration, shape (N, K), if requested."""
    features: NDArray[np.float32] | None = None
    """Pooled features of the last three stages, shape (N, 3584), if requested."""
    class_maps: NDArray[np.float32] | None = None
    """Class activation maps of :func:`brainray.model.explain.compute_class_maps`, in logits before
    calibration, shape (N, K, h, w), if requested; a cell is
    :data:`brainray.model.explain.STRIDE_PX` pixels wide."""

    def take(self, row: int) -> "Prediction":
        """Return the prediction of one of the images."""
        rows = slice(row, row + 1)
        arrays = (self.logits, self.features, self.class_maps)
        rest = (None if values is None else values[rows] for values in arrays)
        return Prediction(self.probs[rows], self.reasons[rows], *rest)


class Engine(ABC):
    """A classifier that predicts; several threads may call it at once."""

    backend: Backend
    precision: Precision
    description: str
    """Such as `OpenVINO 2026.4.1, bf16, 2 threads`."""
    int8_cost: str | None = None
    """The difference of int8 from fp32 in a sentence; None for other precisions."""

    def __init__(self, classifier: "Classifier") -> None:
        self._num_classes = len(classifier.classes)
        self._preprocessing = classifier.preprocessing
        self._calibration = classifier.calibration
        self._weight = classifier.weights["fc.weight"]
        self._bias = classifier.weights["fc.bias"]

    def describe(self) -> dict[str, str]:
        """Return ``backend``, ``precision``, ``description``, and ``int8_cost`` for int8."""
        names = ("backend", "precision", "description", "int8_cost")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def make_batch(self, count: int) -> NDArray[np.uint8]:
        """Return a batch of black images for :meth:`predict`."""
        return np.zeros((count, self._preprocessing.size_px, self._preprocessing.size_px), np.uint8)

    def predict(self, images: NDArray[np.uint8], outputs: Collection[Output] = ()) -> Prediction:
        """Predict class probabilities, and the images that get no class.

        Parameters
        ----------
        images : ndarray of uint8, shape (N, size_px, size_px)
            From :func:`brainray.images.slices.open_slice` with the classifier's preprocessing; N
            may be 0.
        outputs : collection of {"logits", "features", "class_maps"}
            Additional outputs.

        Returns
        -------
        Prediction
            Probabilities are computed in float32, whatever the precision of the network. Class maps
            need a second pass, which takes several times as long as the first one; for an int8
            network it uses fp32. Their first pass compiles another model (OpenVINO).
        """
        side = self._preprocessing.size_px
        assert images.dtype == np.uint8, images.dtype
        assert images.shape[1:] == (side, side), images.shape
        found = self._compute_outputs(images) if len(images) else self._allocate(0)
        probs = self._calibration.calibrate(found.logits)
        distances = self._calibration.compute_distances(found.features)
        return Prediction(
            probs,
            self._calibration.find_reasons(probs, distances),
            found.logits if "logits" in outputs else None,
            found.features if "features" in outputs else None,
            self._compute_maps(images) if "class_maps" in outputs else None,
        )

    def _compute_maps(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        side = count_cells(self._preprocessing.size_px)
        maps = np.empty((len(images), self._num_classes, side, side), np.float32)
        for start in range(0, len(images), MAP_BATCH_SIZE):
            rows = slice(start, start + MAP_BATCH_SIZE)
            features = self._compute_features(images[rows])
            maps[rows] = compute_class_maps(features, self._weight, self._bias)
        return maps

    def _allocate(self, count: int) -> Outputs:
        return Outputs(
            np.empty((count, self._num_classes), np.float32),
            np.empty((count, NUM_POOLED_FEATURES), np.float32),
        )

    @abstractmethod
    def _compute_outputs(self, images: NDArray[np.uint8]) -> Outputs:
        """Return logits and pooled features of at least one image."""

    @abstractmethod
    def _compute_features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return dense features, (N, 2048, h, w), of a few images."""


def open_engine(
    classifier: "Classifier", options: EngineOptions, quantised: "QuantisedModel | None" = None
) -> Engine:
    """Open the engine of a classifier in this process.

    Parameters
    ----------
    classifier : Classifier
        It is not changed.
    options : EngineOptions
    quantised : QuantisedModel, optional
        The int8 network, if it is there already.

    Raises
    ------
    ConfigError
        The options contradict each other, or this machine does not support them.
    """
    if choose_backend(options) == "torch":
        from brainray.inference.engine_torch import TorchEngine

        return TorchEngine(classifier, check_precision(options, "torch"), options)
    from brainray.inference.engine_openvino import OpenVinoEngine

    quantised = quantised or _quantise(classifier, options)
    return OpenVinoEngine(classifier, check_precision(options, "openvino"), options, quantised)


def prepare_engine(classifier_uri: str, options: EngineOptions) -> Callable[[], Engine]:
    """Do the work once that several processes need to open the same engine.

    Returns
    -------
    callable
        Opens the engine, and chooses its precision. It is picklable and contains the weights, 94 MB
        in fp32.

    Raises
    ------
    UserError
        The classifier cannot be read, or the options contradict each other.
    """
    from brainray.model.classifier import load_classifier

    classifier = load_classifier(classifier_uri)
    is_torch = options.use_gpu or options.backend == "torch"
    quantised = None if is_torch else _quantise(classifier, options)
    return partial(open_engine, classifier, options, quantised)


def _quantise(classifier: "Classifier", options: EngineOptions) -> "QuantisedModel | None":
    if options.precision != "int8":
        return None
    from brainray.inference.int8 import quantise_and_compare

    return quantise_and_compare(classifier, options)


def choose_backend(options: EngineOptions) -> Backend:
    """Choose the backend; a GPU needs torch, and torch must find one."""
    if not options.use_gpu:
        return "openvino" if options.backend == "auto" else options.backend
    if options.backend == "openvino":
        raise ConfigError(
            "OpenVINO uses the CPU, but --use-gpu was given. "
            "Leave out --use-gpu, or pass --backend torch."
        )
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "--use-gpu was given, but torch finds no GPU on this machine. "
            "Leave out --use-gpu, or see `brainray doctor`."
        )
    return "torch"


def check_precision(options: EngineOptions, backend: Backend) -> Precision:
    """Choose the precision, and check that the backend and this machine support it."""
    if options.precision == "int8" and backend == "torch":
        raise ConfigError(
            "int8 needs OpenVINO on a CPU. "
            "Pass --backend openvino without --use-gpu, or another --precision."
        )
    has_bf16 = has_native_bf16(use_gpu=options.use_gpu)
    if options.precision == "bf16" and not has_bf16:
        raise ConfigError(
            f"This {'GPU' if options.use_gpu else 'processor'} has no bf16 instructions. "
            "Leave out --precision, or pass --precision fp32."
        )
    return choose_precision(options.precision, has_bf16=has_bf16)
