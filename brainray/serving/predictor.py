"""A classifier that is ready to answer: opened, tested against eager fp32, and warmed up."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from brainray.errors import ServingError
from brainray.images.preprocess import preprocess_image
from brainray.inference.engine import Engine, EngineOptions, Prediction, open_engine
from brainray.model.classifier import Classifier, find_default_classifier, load_classifier
from brainray.model.precision import Precision
from brainray.phantoms.painter import draw_phantom

TOLERANCES: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.5}
"""How far a probability of the self-test may be from fp32's. bf16 was 0.02 off at most on a barely
trained network, whose answers move most; a wrong preprocessing or class order moves them more."""

NUM_TEST_IMAGES = 2
WARM_UP_REPEATS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Which classifier answers, and what it computes with."""

    classifier_uri: str = field(default_factory=find_default_classifier)
    """A classifier bundle: local, s3:// or gs://; `$BRAINRAY_CLASSIFIER`, else the one that comes
    with the project, if not given."""
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = EngineOptions()


class Predictor:
    """A classifier bundle, ready to predict; several threads may call it at once.

    ``metadata`` is the bundle's metadata, ``preprocessing`` makes its input of a scan, and ``runtime``
    names backend and precision.

    Raises
    ------
    UserError
        The classifier cannot be opened, or not with these options.
    ServingError
        It does not pass its self-test.
    """

    def __init__(self, options: ModelOptions) -> None:
        classifier = load_classifier(options.classifier_uri)
        self.metadata = classifier.metadata
        self.preprocessing = classifier.preprocessing
        self._test = SelfTest(classifier)  # in eager fp32, whatever is tested
        self._engine = open_engine(classifier, options.engine)
        self.runtime = self._engine.describe()
        self.check()
        self._test.warm_up(self._engine)

    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        """Predict class probabilities.

        Raises
        ------
        ServingError
            They are not finite.
        """
        return _check_finite(self._engine.predict(images))

    def explain(self, images: NDArray[np.uint8]) -> Prediction:
        """Predict class probabilities, and where in the image each class's evidence is."""
        return _check_finite(self._engine.predict(images, ["class_maps"]))

    def check(self) -> None:
        """Run the self-test.

        Raises
        ------
        ServingError
            It fails.
        """
        self._test.check(self._engine)


class SelfTest:
    """A few drawn images, and what eager fp32 predicts of them."""

    def __init__(self, classifier: Classifier) -> None:
        rng = np.random.default_rng(0)
        planes: tuple[Literal["axial", "coronal"], ...] = ("axial", "coronal")
        drawn = [draw_phantom("glioma", rng, plane=plane) for plane in planes[:NUM_TEST_IMAGES]]
        self._images = np.stack([preprocess_image(one, classifier.preprocessing) for one in drawn])
        exact = EngineOptions(backend="torch", precision="fp32")
        self._expected = open_engine(classifier, exact).predict(self._images).probs

    def check(self, engine: Engine) -> None:
        """Check that an engine gives the same probabilities.

        Raises
        ------
        ServingError
            They are not finite, do not sum to 1, or are too far from fp32's.
        """
        probs = engine.predict(self._images).probs
        if not np.isfinite(probs).all() or not np.allclose(probs.sum(1), 1, atol=1e-3):
            raise ServingError(f"The self-test's answers are no probabilities: {probs.tolist()}.")
        worst = float(np.abs(probs - self._expected).max())
        if worst > TOLERANCES[engine.precision]:
            raise ServingError(
                f"The self-test's answers ({engine.description}) differ from fp32's by {worst:.3f}"
                f", more than {TOLERANCES[engine.precision]}. Compute with --precision fp32."
            )

    def warm_up(self, engine: Engine) -> None:
        """Compute a batch once: OpenVINO compiles the model again for the first one."""
        engine.predict(np.repeat(self._images, WARM_UP_REPEATS, axis=0))


def _check_finite(found: Prediction) -> Prediction:
    if not np.isfinite(found.probs).all():
        raise ServingError("The classifier gives probabilities that are not numbers.")
    return found
