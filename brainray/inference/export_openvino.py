"""Export a classifier's network to OpenVINO; this needs torch."""

import contextlib
import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from brainray.errors import ConfigError
from brainray.images.normalise import normalise_images
from brainray.images.preprocess import Preprocessing
from brainray.inference.engine import NUM_CALIBRATION_IMAGES
from brainray.inference.engine_openvino import ExportedModel, opening_lock, without_telemetry
from brainray.model.classifier import Classifier
from brainray.model.network import pool_stages, read_head, split_head

if TYPE_CHECKING:
    import openvino

logger = logging.getLogger(__name__)


def export_model(
    classifier: Classifier, calibration_images: NDArray[np.uint8] | None = None
) -> ExportedModel:
    """Export a classifier for the OpenVINO engine.

    Parameters
    ----------
    classifier : Classifier
        Stays as it is.
    calibration_images : ndarray of uint8, shape (M, size_px, size_px), optional
        For int8: images like those to classify, of every class.

    Raises
    ------
    ConfigError
        int8 without NNCF.
    """
    if calibration_images is None:
        model = convert_network(classifier)
    else:
        model = quantise(classifier, calibration_images)
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.serialize(model, path)
        xml, weights = path.read_bytes(), path.with_suffix(".bin").read_bytes()
    return ExportedModel(
        classifier.classes,
        classifier.preprocessing,
        classifier.trust,
        *read_head(classifier.network),
        xml,
        weights,
        normalise_greys(classifier.preprocessing),
        None if calibration_images is None else "int8",
    )


def normalise_greys(preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Return what :func:`normalise_images` makes of each grey value, shape (256,)."""
    greys = torch.arange(256, dtype=torch.uint8).view(1, 1, 256)
    values: NDArray[np.float32] = normalise_images(greys, preprocessing).flatten().numpy()
    return values


class _WithFeatures(nn.Module):
    """Gives logits, (N, K), and pooled features, (N, C)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = split_head(network)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, pooled = pool_stages(self.trunk, inputs)
        return self.head[-1](pooled[-1]), torch.cat(pooled, 1)


def convert_network(classifier: Classifier) -> "openvino.Model":
    """Convert a classifier's network to OpenVINO, for one image at a time.

    ``openvino.convert_model`` does the same through the same frontend, and reports it.
    """
    with opening_lock, without_telemetry(), warnings.catch_warnings(), torch.no_grad():
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


def quantise(classifier: Classifier, images: NDArray[np.uint8]) -> "openvino.Model":
    """Convert a classifier's network to int8, except for its first and last layers.

    Weights are scaled per output channel; ranges of activations come from ``images``, and
    biases are corrected for what rounding does to the mean of each channel.
    """
    nncf = _import_nncf()
    model = convert_network(classifier)
    layers = [
        operation.get_friendly_name()
        for operation in model.get_ordered_ops()
        if operation.get_type_name() in ("Convolution", "MatMul")
    ]
    count = min(len(images), NUM_CALIBRATION_IMAGES)
    chosen = images[np.linspace(0, len(images) - 1, count).round().astype(np.int64)]
    greys = normalise_greys(classifier.preprocessing)
    logger.info("Calibrating int8 on %d images.", count)
    with opening_lock, _silence():
        quantised: openvino.Model = nncf.quantize(
            model,
            nncf.Dataset(chosen, lambda image: greys[image][None, None]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=count,
            ignored_scope=nncf.IgnoredScope(names=[layers[0], layers[-1]]),
        )
    return quantised


def _import_nncf() -> ModuleType:
    with opening_lock, without_telemetry(), _silence():
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
