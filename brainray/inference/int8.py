"""Quantise a classifier's network to int8, and compare it with fp32."""

import contextlib
import importlib
import io
import logging
import math
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from brainray.data.read import read_named_scan
from brainray.data.scans import list_scans
from brainray.errors import ConfigError, RejectedImage
from brainray.images.decode import DecodeLimits
from brainray.images.preprocess import Preprocessing, normalise_greys
from brainray.images.slices import open_file, open_slice
from brainray.inference.engine import EngineOptions, open_engine
from brainray.inference.engine_openvino import build_model, without_telemetry
from brainray.model.classifier import Classifier

if TYPE_CHECKING:
    import openvino

logger = logging.getLogger(__name__)

NUM_CALIBRATION_IMAGES = 300
"""Most images for the ranges of int8; the default of NNCF."""
NUM_COMPARED_IMAGES = 128
"""Calibration images on which int8 is compared with fp32."""

_nncf_lock = threading.Lock()
"""Held while NNCF is imported and used, since both change global state."""


@dataclass(frozen=True, slots=True)
class QuantisedModel:
    """An int8 model in OpenVINO's file format."""

    xml: bytes
    weights: bytes
    cost: str = ""
    """The difference from fp32 in a sentence."""


def quantise_and_compare(classifier: Classifier, options: EngineOptions) -> QuantisedModel:
    """Quantise a network with the images of ``options.calibration_uri``, and measure the cost."""
    images = read_calibration_images(options.calibration_uri, classifier.preprocessing)
    quantised = quantise(classifier, images)
    compared = images[:NUM_COMPARED_IMAGES]
    exact = open_engine(classifier, replace(options, precision="fp32"))
    found = measure_disagreement(
        exact.predict(compared).probs,
        open_engine(classifier, options, quantised).predict(compared).probs,
    )
    return replace(
        quantised,
        cost=f"int8 against fp32 on {found['n']} of the calibration images: "
        f"{found['same_top_class']:.1%} have the same class, "
        f"the largest difference of a probability is {found['largest_difference']:.3f}.",
    )


def read_calibration_images(
    calibration_uri: str | None, preprocessing: Preprocessing
) -> NDArray[np.uint8]:
    """Read about 300 images, evenly spaced in the folder, shape (n, size_px, size_px)."""
    if calibration_uri is None:
        raise ConfigError(
            "int8 needs images to measure the range of each layer's values. "
            "Pass --calibration-uri FOLDER with a few hundred scans, or another --precision."
        )
    found = list_scans([calibration_uri])["scan_uri"].to_pylist()
    chosen = _choose_evenly(found, NUM_CALIBRATION_IMAGES)
    most = math.ceil(NUM_CALIBRATION_IMAGES / max(1, len(chosen)))
    images = [image for uri in chosen for image in _load_slices(uri, preprocessing, most)]
    if not images:
        raise ConfigError(f"None of the {len(found)} files in '{calibration_uri}' is a scan.")
    return np.stack(images)


def _load_slices(
    scan_uri: str, preprocessing: Preprocessing, most: int
) -> Iterator[NDArray[np.uint8]]:
    try:
        file = open_file(read_named_scan(scan_uri, max_bytes=DecodeLimits().max_bytes))
    except RejectedImage:
        return
    usable = [index for index, info in enumerate(file.slices) if info.rejection is None]
    for index in _choose_evenly(usable, most):
        with contextlib.suppress(RejectedImage):
            yield open_slice(file, index, preprocessing).scan.image


def _choose_evenly(values: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many values, evenly spaced."""
    positions = np.linspace(0, len(values) - 1, min(len(values), most)).round()
    return [values[position] for position in positions.astype(np.int64)]


def measure_disagreement(
    reference_probs: NDArray[np.float32], probs: NDArray[np.float32]
) -> dict[str, Any]:
    """Compare two engines' predictions for the same N images, both of shape (N, K).

    Returns
    -------
    dict
        ``largest_difference`` of any probability, in [0, 1]; ``same_top_class``, the fraction
        of images with the same most probable class, in [0, 1]; ``n``, the number of images.
        Both are NaN when there are none.
    """
    if len(probs) == 0:
        return {"largest_difference": float("nan"), "same_top_class": float("nan"), "n": 0}
    return {
        "largest_difference": float(np.abs(reference_probs - probs).max()),
        "same_top_class": float((reference_probs.argmax(1) == probs.argmax(1)).mean()),
        "n": len(probs),
    }


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
    chosen = np.stack(_choose_evenly(images, NUM_CALIBRATION_IMAGES))  # type: ignore[arg-type]
    greys = normalise_greys(classifier.preprocessing)
    logger.info("Calibrating int8 on %d images.", len(chosen))
    with _nncf_lock, _silence():
        quantised = nncf.quantize(
            model,
            nncf.Dataset(chosen, lambda image: greys[image][None, None]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(chosen),
            ignored_scope=nncf.IgnoredScope(names=[layers[0], layers[-1]]),
        )
    return QuantisedModel(*_serialise(quantised))


def _serialise(model: "openvino.Model") -> tuple[bytes, bytes]:
    import openvino  # not at the top: build_model's module imports it without telemetry

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.serialize(model, path)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def _import_nncf() -> ModuleType:
    with _nncf_lock, without_telemetry(), _silence():
        try:
            return importlib.import_module("nncf")
        except ImportError as error:
            raise ConfigError(
                "int8 needs NNCF, which is not installed. "
                "Run `pip install brainray[int8]`, or pass another --precision."
            ) from error


@contextlib.contextmanager
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
