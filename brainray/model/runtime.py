"""How an opened classifier computes: with OpenVINO or torch, in fp32, bf16 or int8.

On a CPU, OpenVINO gives ResNet-50 at 224 px about twice the images per second of eager torch, and
as many one at a time as in batches. On a GPU it is torch. The lower number formats are faster and
round more; what that changes in a set of answers, :func:`measure_disagreement` says.

OpenVINO and NNCF are imported when a runtime is opened, not with this module.
"""

import atexit
import contextlib
import copy
import importlib
import io
import itertools
import logging
import os
import sys
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from brainray.errors import ConfigError
from brainray.model.classifier import Classifier
from brainray.model.explain import STRIDE_PX, compute_class_maps
from brainray.model.network import STAGE_WIDTHS, pool_stages, split_head
from brainray.model.precision import Precision, has_native_bf16
from brainray.model.trust import Outputs
from brainray.pixels.normalise import normalise_images
from brainray.pixels.preprocess import Preprocessing

if TYPE_CHECKING:
    import openvino

Backend = Literal["torch", "openvino"]

NUM_CALIBRATION_IMAGES = 300
"""Images that int8 ranges are taken from, at most; NNCF's own default."""
CHUNK_SIZE = {"cpu": 32, "cuda": 256}
"""Images that torch computes at once; bounds the memory of a call of any size."""
EXPLAIN_CHUNK_SIZE = 16
"""Images whose last features, 0.4 MB each at 224 px, are held at once."""

logger = logging.getLogger(__name__)

_opening = threading.Lock()
"""Held while OpenVINO is imported or traces: both change the state of the whole process."""

_queues: "weakref.WeakSet[openvino.AsyncInferQueue]" = weakref.WeakSet()
"""Those whose threads may be in our callback."""


@atexit.register
def _wait_for_callbacks() -> None:
    """Let OpenVINO's threads come out of Python before it ends.

    The last callback of a call wakes the caller, which may then end the process. A thread still in
    it would find no interpreter to go back to, and abort the process ("terminate called without an
    active exception").
    """
    for queue in _queues:
        queue.wait_all()


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeOptions:
    """How to compute."""

    backend: Literal["auto", "torch", "openvino"] = "auto"
    """`auto` takes openvino on a CPU and torch on a GPU."""
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """`auto` takes bf16 where the processor or GPU has it natively, else fp32; int8 needs
    calibration images."""
    num_threads: int | None = None
    """CPU threads to compute with (torch: of the whole process). When not given, as many as this
    process may use cores (openvino), or as torch has."""
    use_gpu: bool = False
    """Compute on a GPU."""

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"num_threads must be at least 1, got {self.num_threads}.")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a classifier says to some images."""

    probs: NDArray[np.float32]
    """Calibrated class probabilities, shape (N, K); rows sum to 1, columns in class order."""
    reasons: list[str | None]
    """Why an image gets no class: a key of :data:`brainray.model.trust.TRUST_REASONS`; None where
    it gets one."""
    maps: NDArray[np.float32] | None = None
    """Class activation maps of :func:`brainray.model.explain.compute_class_maps`, in logits before
    calibration, shape (N, K, h, w); a cell for every :data:`brainray.model.explain.STRIDE_PX`
    pixels, begun or whole. Their mean is the logit, within 1e-4 in fp32. None if not asked for."""

    def take(self, row: int) -> "Prediction":
        """Return what is said to one of the images."""
        rows = slice(row, row + 1)
        maps = None if self.maps is None else self.maps[rows]
        return Prediction(self.probs[rows], self.reasons[rows], maps)


class Runtime(ABC):
    """A classifier made ready to compute; several threads may use it at once."""

    name: Backend
    precision: Precision
    description: str
    """One line for a person, as `OpenVINO 2026.4.1, bf16, 2 threads`."""

    def __init__(self, classifier: Classifier) -> None:
        self._num_classes = len(classifier.classes)
        self._preprocessing = classifier.preprocessing
        self._trust = classifier.trust
        head = classifier.network.get_submodule("fc")
        self._weight, self._bias = (
            head.get_parameter(name).detach().float().cpu().numpy().copy()
            for name in ("weight", "bias")
        )

    def predict_probs(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Predict class probabilities: those of :meth:`predict`."""
        return self.predict(images).probs

    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        """Predict class probabilities, and for which images they are not to be trusted.

        Parameters
        ----------
        images : ndarray of uint8, shape (N, size_px, size_px)
            From :func:`brainray.pixels.preprocess.load_image`, with the classifier's
            preprocessing; N may be 0.

        Returns
        -------
        Prediction
            Without maps. Probabilities are computed in float32 whatever the precision of the
            network.
        """
        self._check(images)
        if len(images) == 0:
            return Prediction(np.empty((0, self._num_classes), np.float32), [])
        return self._conclude(self._compute_outputs(images))

    def explain(self, images: NDArray[np.uint8]) -> Prediction:
        """Predict class probabilities, and where the evidence for each class lies.

        Any backend and precision can. The first call compiles the network again (OpenVINO).

        Parameters
        ----------
        images : ndarray of uint8, shape (N, size_px, size_px)
            As for :meth:`predict`.

        Returns
        -------
        Prediction
            With maps. The probabilities are those of :meth:`predict`: the same to the last bit in
            torch, within 1e-5 in OpenVINO's fp32, and within 0.002 in its bf16 (3e-4 measured) and
            int8 (none measured), which may round elsewhere when the features are kept.
        """
        self._check(images)
        side = -(-self._preprocessing.size_px // STRIDE_PX)
        probs = np.empty((len(images), self._num_classes), np.float32)
        maps = np.empty((len(images), self._num_classes, side, side), np.float32)
        reasons: list[str | None] = []
        for start in range(0, len(images), EXPLAIN_CHUNK_SIZE):
            chunk = slice(start, start + EXPLAIN_CHUNK_SIZE)
            outputs, features = self._compute_features(images[chunk])
            found = self._conclude(outputs)
            probs[chunk] = found.probs
            reasons += found.reasons
            maps[chunk] = compute_class_maps(features, self._weight, self._bias)
        return Prediction(probs, reasons, maps)

    def _conclude(self, outputs: Outputs) -> Prediction:
        probs = self._trust.calibrate(outputs.logits)
        distances = self._trust.compute_distances(outputs.features)
        return Prediction(probs, self._trust.find_reasons(probs, distances))

    def _check(self, images: NDArray[np.uint8]) -> None:
        side = self._preprocessing.size_px
        assert images.dtype == np.uint8, images.dtype
        assert images.shape[1:] == (side, side), images.shape

    @abstractmethod
    def _compute_outputs(self, images: NDArray[np.uint8]) -> Outputs:
        """Return logits and pooled features of at least one image."""

    @abstractmethod
    def _compute_features(self, images: NDArray[np.uint8]) -> tuple[Outputs, NDArray[np.float32]]:
        """Return the same, and the last features, (N, 2048, h, w), of a few images."""


def open_runtime(
    classifier: Classifier,
    options: RuntimeOptions,
    *,
    calibration_images: NDArray[np.uint8] | None = None,
) -> Runtime:
    """Make a classifier ready to compute.

    Parameters
    ----------
    classifier : Classifier
        Stays as it is.
    options : RuntimeOptions
        What to compute with.
    calibration_images : ndarray of uint8, shape (M, size_px, size_px), optional
        Images such as will be classified, of every class; for int8, which takes the range of
        each layer's values from :data:`NUM_CALIBRATION_IMAGES` of them, evenly spread.

    Raises
    ------
    ConfigError
        The options contradict each other, or ask for what this machine lacks.
    """
    backend = _choose_backend(options)
    precision = _choose_precision(options, backend)
    if backend == "torch":
        return _TorchRuntime(classifier, precision, options)
    if precision != "int8":
        return _OpenVinoRuntime(classifier, _convert_network(classifier), precision, options)
    if calibration_images is None or len(calibration_images) == 0:
        raise ConfigError(
            "int8 takes the range of each layer's values from images, and got none. "
            "Pass --calibration-uri FOLDER with a few hundred scans, or another --precision."
        )
    model = _quantise(classifier, calibration_images)
    return _OpenVinoRuntime(classifier, model, precision, options)


def _choose_backend(options: RuntimeOptions) -> Backend:
    if not options.use_gpu:
        return "openvino" if options.backend == "auto" else options.backend
    if options.backend == "openvino":
        raise ConfigError(
            "OpenVINO computes on the CPU here, but a GPU was asked for. "
            "Leave out --use-gpu, or pass --backend torch."
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            "A GPU was asked for, but torch sees none on this machine. "
            "Leave out --use-gpu, or see `brainray doctor`."
        )
    return "torch"


def _choose_precision(options: RuntimeOptions, backend: Backend) -> Precision:
    if options.precision == "int8":
        if backend == "torch":
            raise ConfigError(
                "int8 is computed by OpenVINO on a CPU only. "
                "Pass --backend openvino without --use-gpu, or another --precision."
            )
        return "int8"
    if options.precision == "fp32":
        return "fp32"
    if has_native_bf16(use_gpu=options.use_gpu):
        return "bf16"
    if options.precision == "bf16":
        raise ConfigError(
            f"This {'GPU' if options.use_gpu else 'processor'} has no bf16 instructions. "
            "Leave out --precision, or pass --precision fp32."
        )
    return "fp32"


def measure_disagreement(
    reference_probs: NDArray[np.float32], probs: NDArray[np.float32]
) -> dict[str, float | int]:
    """Measure how far two runtimes' answers to the same images are apart.

    Parameters
    ----------
    reference_probs, probs : ndarray of float32, shape (N, K)

    Returns
    -------
    dict
        ``largest_difference`` of any probability, in [0, 1]; ``same_top_class``, the fraction
        of images with the same most probable class, in [0, 1]; ``n``, the number of images.
        Both are NaN when there are none.
    """
    assert reference_probs.shape == probs.shape, (reference_probs.shape, probs.shape)
    if len(probs) == 0:
        return {"largest_difference": float("nan"), "same_top_class": float("nan"), "n": 0}
    return {
        "largest_difference": float(np.abs(reference_probs - probs).max()),
        "same_top_class": float((reference_probs.argmax(1) == probs.argmax(1)).mean()),
        "n": len(probs),
    }


# --- torch --------------------------------------------------------------------------------


class _TorchRuntime(Runtime):
    name = "torch"

    def __init__(
        self, classifier: Classifier, precision: Precision, options: RuntimeOptions
    ) -> None:
        super().__init__(classifier)
        self.precision = precision
        self._device = torch.device("cuda" if options.use_gpu else "cpu")
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)  # torch has one pool for the process
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        network = _fuse_batch_norm(classifier.network)
        network.to(self._device, self._dtype).to(memory_format=torch.channels_last)
        self._trunk, head = split_head(network)
        # In bf16 a logit of 8 to 16 is a multiple of 1/16; the head costs too little for that.
        self._layer = head[-1].float()
        if options.use_gpu:
            where = torch.cuda.get_device_name(self._device)
            # Else cuDNN computes convolutions of fp32 numbers in TF32, with 10 bits of mantissa.
            torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        else:
            where = _count(torch.get_num_threads(), "thread")
        self.description = f"torch {torch.__version__.split('+')[0]}, {precision}, {where}"

    @torch.inference_mode()
    def _compute_outputs(self, images: NDArray[np.uint8]) -> Outputs:
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        chunks = [self._run(chunk)[1:] for chunk in pixels.split(CHUNK_SIZE[self._device.type])]
        logits, features = (torch.cat(parts).cpu().numpy() for parts in zip(*chunks, strict=True))
        return Outputs(logits, features)

    @torch.inference_mode()
    def _compute_features(self, images: NDArray[np.uint8]) -> tuple[Outputs, NDArray[np.float32]]:
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        features, logits, pooled = self._run(pixels)
        outputs = Outputs(logits.cpu().numpy(), pooled.cpu().numpy())
        return outputs, features.float().contiguous().cpu().numpy()

    def _run(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the last features, the logits and the pooled features."""
        features, pooled = pool_stages(self._trunk, self._prepare(pixels))
        return features, self._layer(pooled[-1]), torch.cat(pooled, 1)

    def _prepare(self, pixels: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            pixels = pixels.pin_memory().to(self._device, non_blocking=True)
        return normalise_images(pixels, self._preprocessing).to(
            dtype=self._dtype, memory_format=torch.channels_last
        )


def _fuse_batch_norm(network: nn.Module) -> nn.Module:
    """Return a copy whose convolutions hold the batch normalisation that follows each."""
    fused = copy.deepcopy(network).eval()
    for parent in list(fused.modules()):
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return fused


# --- OpenVINO -----------------------------------------------------------------------------


class _OpenVinoRuntime(Runtime):
    """One image at a time: on a CPU a batch gains nothing, and an answer depends on no other.

    A lone image is computed by all threads together. Where there are many, of one call or of
    several at once, each thread computes its own: 5 to 10 % more images per second, since no
    thread waits for another, and none is idle while calls follow each other.
    """

    name = "openvino"

    def __init__(
        self,
        classifier: Classifier,
        model: "openvino.Model",
        precision: Precision,
        options: RuntimeOptions,
    ) -> None:
        super().__init__(classifier)
        import openvino

        self.precision = precision
        self._num_threads = options.num_threads or len(os.sched_getaffinity(0))
        self._model = model
        self._core = openvino.Core()
        self._one = self._compile(self._model, num_streams=1).create_infer_request()
        self._many: openvino.AsyncInferQueue | None = None
        self._explaining: openvino.InferRequest | None = None
        self._turn, self._feeding, self._counting = (threading.Lock() for _ in range(3))
        self._num_calls = 0
        self._normalised = _normalise_greys(self._preprocessing)
        version = openvino.get_version().split("-")[0]
        threads = _count(self._num_threads, "thread")
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
                    for index, image in enumerate(images):
                        self._one.infer([self._normalised[image][None, None]])
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
        parcel = _Parcel(outputs)
        for index, image in enumerate(images):
            values = self._normalised[image][None, None]
            with self._feeding:
                self._build_queue().start_async([values], (parcel, index))
        parcel.wait()

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
                self._explaining.infer([self._normalised[image][None, None]])
                _copy_outputs(self._explaining, outputs, index)
                features.append(self._explaining.get_output_tensor(2).data.copy())
        return outputs, np.concatenate(features)

    def _allocate(self, count: int) -> Outputs:
        return Outputs(
            np.empty((count, self._num_classes), np.float32),
            np.empty((count, sum(STAGE_WIDTHS)), np.float32),
        )


class _Parcel:
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


def _keep_output(request: "openvino.InferRequest", place: tuple[_Parcel, int]) -> None:
    parcel, index = place
    parcel.keep(index, request)


def _copy_outputs(request: "openvino.InferRequest", outputs: Outputs, index: int) -> None:
    outputs.logits[index] = request.get_output_tensor(0).data[0]
    outputs.features[index] = request.get_output_tensor(1).data[0]


def _keep_features(model: "openvino.Model") -> "openvino.Model":
    """Return a copy whose third output are the features that the head averages."""
    kept = model.clone()
    node = kept.output(0).get_node()
    while node.get_type_name() != "Relu":  # the last one is where the head begins
        node = node.input_value(0).get_node()
    assert node.output(0).get_shape()[1] == STAGE_WIDTHS[-1], node
    kept.add_outputs(node.output(0))
    return kept


def _normalise_greys(preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Return what :func:`normalise_images` makes of each grey value, shape (256,)."""
    greys = torch.arange(256, dtype=torch.uint8).view(1, 1, 256)
    values: NDArray[np.float32] = normalise_images(greys, preprocessing).flatten().numpy()
    return values


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


@contextmanager
def _without_telemetry() -> Iterator[None]:
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


class _WithFeatures(nn.Module):
    """Gives logits, (N, K), and pooled features, (N, C)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = split_head(network)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, pooled = pool_stages(self.trunk, inputs)
        return self.head[-1](pooled[-1]), torch.cat(pooled, 1)


def _convert_network(classifier: Classifier) -> "openvino.Model":
    """Convert a classifier's network to OpenVINO, for one image at a time.

    ``openvino.convert_model`` does the same through the same frontend, and reports it.
    """
    with _opening, _without_telemetry(), warnings.catch_warnings(), torch.no_grad():
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        # torch 2.15 deprecates tracing; torch.export takes six seconds where it takes a half.
        warnings.simplefilter("ignore", FutureWarning)
        decoder = TorchScriptPythonDecoder(
            _WithFeatures(classifier.network),
            example_input=torch.zeros(1, 1, 32, 32),
            trace_kwargs={"check_trace": False},
        )
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
    side = classifier.preprocessing.size_px
    model.reshape([1, 1, side, side])
    return model


def _quantise(classifier: Classifier, images: NDArray[np.uint8]) -> "openvino.Model":
    """Convert a classifier's network to int8, except for its first and last layers.

    Weights are scaled per output channel; ranges of activations come from ``images``, and
    biases are corrected for what rounding does to the mean of each channel.
    """
    nncf = _import_nncf()
    model = _convert_network(classifier)
    layers = [
        operation.get_friendly_name()
        for operation in model.get_ordered_ops()
        if operation.get_type_name() in ("Convolution", "MatMul")
    ]
    count = min(len(images), NUM_CALIBRATION_IMAGES)
    chosen = images[np.linspace(0, len(images) - 1, count).round().astype(np.int64)]
    normalised = _normalise_greys(classifier.preprocessing)
    logger.info("Calibrating int8 on %d images.", count)
    with _opening, _silence():
        quantised: openvino.Model = nncf.quantize(
            model,
            nncf.Dataset(chosen, lambda image: normalised[image][None, None]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=count,
            ignored_scope=nncf.IgnoredScope(names=[layers[0], layers[-1]]),
        )
    return quantised


def _import_nncf() -> ModuleType:
    with _opening, _without_telemetry(), _silence():
        try:
            return importlib.import_module("nncf")
        except ImportError as error:
            raise ConfigError(
                "int8 needs NNCF, which is not installed. "
                "Run `pip install brainray[int8]`, or pass another --precision."
            ) from error


@contextmanager
def _silence() -> Iterator[None]:
    """Keep NNCF from printing bars and warnings, and from changing how others log."""
    disabled, logger_class = logging.root.manager.disable, logging.getLoggerClass()
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        logging.setLoggerClass(logger_class)
