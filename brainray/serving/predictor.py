"""What a model replica holds: an opened classifier that checks itself, and may be replaced."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from brainray.errors import BrainrayError, ServingError
from brainray.images.preprocess import Preprocessing, preprocess_image
from brainray.inference.engine import Engine, EngineOptions, Prediction, open_engine
from brainray.model.classifier import Classifier, load_classifier, read_card
from brainray.model.precision import Precision
from brainray.model.shipped import find_default_classifier
from brainray.phantoms.painter import draw_phantom

TOLERANCES: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.5}
"""How far a probability of the self-test may be from fp32's. bf16 was 0.02 off at most on a barely
trained network, whose answers move most; a wrong preprocessing or class order moves them more."""

NUM_TEST_IMAGES = 2
WARM_UP_REPEATS = 32

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Which classifier a replica opens, and what it computes with."""

    classifier_uri: str = field(default_factory=find_default_classifier)
    """A sealed classifier folder: local, s3:// or gs://; `$BRAINRAY_CLASSIFIER`, else the one that
    comes with the project, if not given."""
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = EngineOptions()
    follow: bool = False
    """Look now and then whether the folder holds another classifier, and then take that one."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What an answer's numbers mean; travels with every answer."""

    classifier_id: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing


@dataclass(frozen=True, slots=True)
class Reply:
    """Answers to the images of one call."""

    meaning: Meaning
    prediction: Prediction | None
    """None where the images were made with another preprocessing than this classifier's, and have
    to be made again."""


class SelfTest:
    """A few drawn images, and what eager fp32 says to them."""

    def __init__(self, classifier: Classifier) -> None:
        dice = np.random.default_rng(0)
        planes: tuple[Literal["axial", "coronal"], ...] = ("axial", "coronal")
        drawn = [draw_phantom("glioma", dice, plane=plane) for plane in planes[:NUM_TEST_IMAGES]]
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
        """Compute a batch once: OpenVINO compiles the model anew for the first one."""
        engine.predict(np.repeat(self._images, WARM_UP_REPEATS, axis=0))


class _Opened:
    """A classifier, ready to answer and tested."""

    def __init__(self, options: ModelOptions) -> None:
        classifier = load_classifier(options.classifier_uri)
        test = SelfTest(classifier)  # in eager fp32, whatever is tested
        self.engine = open_engine(classifier, options.engine)
        test.check(self.engine)
        test.warm_up(self.engine)
        self.test = test
        self.card = classifier.card
        self.meaning = Meaning(
            classifier.classifier_id, classifier.classes, classifier.preprocessing
        )


class Predictor:
    """Answers calls with one classifier; several threads may call at once.

    Raises
    ------
    UserError
        The classifier cannot be opened, or not with these options.
    ServingError
        It does not pass its self-test.
    """

    def __init__(self, options: ModelOptions) -> None:
        self._options = options
        self._opened = _Opened(options)

    def predict(self, preprocessing: Preprocessing, images: Sequence[NDArray[np.uint8]]) -> Reply:
        """Predict class probabilities, if the images suit the classifier."""
        opened = self._opened  # one, whatever takes its place meanwhile
        if preprocessing != opened.meaning.preprocessing:
            return Reply(opened.meaning, None)
        found = opened.engine.predict(np.stack(images))
        if not np.isfinite(found.probs).all():
            raise ServingError("The classifier gives probabilities that are not numbers.")
        return Reply(opened.meaning, found)

    def explain(self, preprocessing: Preprocessing, images: Sequence[NDArray[np.uint8]]) -> Reply:
        """Predict class probabilities, and where in the image each class's evidence is."""
        opened = self._opened
        if preprocessing != opened.meaning.preprocessing:
            return Reply(opened.meaning, None)
        return Reply(opened.meaning, opened.engine.predict(np.stack(images), ["class_maps"]))

    def describe(self) -> dict[str, Any]:
        """Return the classifier's card, and what computes."""
        opened = self._opened
        return {
            "card": opened.card,
            "meaning": opened.meaning,
            "runtime": opened.engine.describe(),
        }

    def check(self) -> None:
        """Run the self-test.

        Raises
        ------
        ServingError
            It fails.
        """
        opened = self._opened
        opened.test.check(opened.engine)

    def follow(self) -> bool:
        """Take the classifier that has replaced this one in its folder, once it is whole and sound.

        Returns
        -------
        bool
            Whether another one answers from now on.
        """
        if not self._options.follow:
            return False
        try:
            found = read_card(self._options.classifier_uri)["classifier_id"]
            if found == self._opened.meaning.classifier_id:
                return False
            self._opened = _Opened(self._options)
        except BrainrayError as error:  # half written, perhaps: the next look tells
            logger.warning("Keeping the classifier: %s", error)
            return False
        return True
