"""A fake engine, for tests that need no network.

``python -m tests.fakes …`` is ``brainray classify …`` with :class:`FakeEngine`.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from brainray.images.preprocess import Preprocessing
from brainray.inference.engine import NUM_POOLED_FEATURES, Engine, EngineOptions
from brainray.model.calibration import Calibration, Outputs
from brainray.model.classifier import Classifier, read_classifier_metadata
from brainray.model.explain import count_cells

DELAY_VARIABLE = "BRAINRAY_TEST_DELAY_S"
"""Environment variable: the seconds that each call of the engine takes."""


class FakeEngine(Engine):
    """Predicts from the mean grey value of an image, without a network."""

    backend = "torch"
    precision = "fp32"
    description = "a fake engine"

    def __init__(self, classes: tuple[str, ...], preprocessing: Preprocessing) -> None:
        weight = np.zeros((len(classes), 2048), np.float32)
        head = {"fc.weight": weight, "fc.bias": weight[:, 0]}
        calibration = Calibration.identity(len(classes))
        super().__init__(Classifier(head, classes, preprocessing, calibration, {}))
        self._delay_s = float(os.environ.get(DELAY_VARIABLE, "0"))

    def _compute_outputs(self, images: NDArray[np.uint8]) -> Outputs:
        time.sleep(self._delay_s)
        grey = images.mean(axis=(1, 2), dtype=np.float32)
        centres = np.linspace(0, 64, self._num_classes, dtype=np.float32)
        features = np.zeros((len(images), NUM_POOLED_FEATURES), np.float32)
        return Outputs(-abs(grey[:, None] - centres) / 16, features)

    def _compute_features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        side = count_cells(self._preprocessing.size_px)
        return np.zeros((len(images), 2048, side, side), np.float32)


def prepare_fake_engine(classifier_uri: str, options: EngineOptions) -> Callable[[], Engine]:
    """Replace :func:`brainray.inference.engine.prepare_engine`."""
    del options
    metadata = read_classifier_metadata(classifier_uri)
    return partial(
        FakeEngine, tuple(metadata["classes"]), Preprocessing(**metadata["preprocessing"])
    )


def main() -> None:
    """Run `brainray classify` with the fake engine."""
    from brainray import cli
    from brainray.inference import bulk

    bulk.prepare_engine = prepare_fake_engine
    cli.main(["classify", *sys.argv[1:]])


if __name__ == "__main__":
    main()
