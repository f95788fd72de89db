"""A classifier that is ready to predict: loaded, warmed up, and compared with eager fp32."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from brainray.errors import ServingError
from brainray.images.preprocess import preprocess_image
from brainray.inference.engine import EngineOptions, Prediction, open_engine
from brainray.model.classifier import find_default_classifier, load_classifier
from brainray.model.precision import Precision
from brainray.phantoms.painter import draw_phantom

TOLERANCES: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.5}
"""Largest difference of a probability from fp32 in the self-test. bf16 differed by 0.02 on a barely
trained network, which is most sensitive; wrong preprocessing or class order differ by more."""
TEST_PLANES: tuple[Literal["axial", "coronal"], ...] = ("axial", "coronal")
WARM_UP_REPEATS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """The classifier and the engine."""

    classifier_uri: str = field(default_factory=find_default_classifier)
    """A classifier bundle: local, s3:// or gs://. By default `$BRAINRAY_CLASSIFIER`, else the
    classifier of this project."""
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = EngineOptions()


class Predictor:
    """A classifier bundle, ready to predict; several threads may call it at once.

    ``metadata`` is the bundle's metadata, ``preprocessing`` its preprocessing, and ``runtime``
    names backend and precision. A classifier that fails its self-test is a ServingError.
    """

    def __init__(self, options: ModelOptions) -> None:
        classifier = load_classifier(options.classifier_uri)
        self.metadata = classifier.metadata
        self.preprocessing = classifier.preprocessing
        rng = np.random.default_rng(0)
        phantoms = [draw_phantom("glioma", rng, plane=plane) for plane in TEST_PLANES]
        self._test_images = np.stack([preprocess_image(p, self.preprocessing) for p in phantoms])
        reference = open_engine(classifier, EngineOptions(backend="torch", precision="fp32"))
        self._test_probs = reference.predict(self._test_images).probs
        self._engine = open_engine(classifier, options.engine)
        self.runtime = self._engine.describe()
        self.check()
        # OpenVINO compiles the model again for the first large batch.
        self._engine.predict(np.repeat(self._test_images, WARM_UP_REPEATS, axis=0))

    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        """Predict class probabilities."""
        return _check_finite(self._engine.predict(images))

    def explain(self, images: NDArray[np.uint8]) -> Prediction:
        """Predict class probabilities and class maps."""
        return _check_finite(self._engine.predict(images, ["class_maps"]))

    def check(self) -> None:
        """Run the self-test: predict drawn images, and compare with eager fp32."""
        probs = self._engine.predict(self._test_images).probs
        if not np.isfinite(probs).all() or not np.allclose(probs.sum(1), 1, atol=1e-3):
            raise ServingError(f"The self-test's results are not probabilities: {probs.tolist()}.")
        difference = float(np.abs(probs - self._test_probs).max())
        tolerance = TOLERANCES[self._engine.precision]
        if difference > tolerance:
            raise ServingError(
                f"The self-test's results ({self._engine.description}) differ from fp32's by "
                f"{difference:.3f}, more than {tolerance}. Compute with --precision fp32."
            )


def _check_finite(found: Prediction) -> Prediction:
    if not np.isfinite(found.probs).all():
        raise ServingError("The classifier's probabilities are not finite.")
    return found
