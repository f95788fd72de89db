"""A classifier that is ready to predict, and the queue in front of it."""

import asyncio
from collections.abc import Callable
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
from brainray.serving.problem import Problem

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
    """A classifier bundle: loaded, warmed up, and compared with eager fp32.

    Several threads may call it at once. ``runtime`` names backend and precision. A classifier that
    fails its self-test is a ServingError.
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


class Batcher:
    """Calls ``predict`` in a thread with all waiting images, one call at a time.

    An image that finds it idle is computed at once, alone. Images that arrive while it computes
    form the next batch.

    ``@serve.batch`` closes its next batch before the batch being computed has ended: with 16
    clients 294 of 320 images were computed alone. This queue made batches of 7 to 14 from the same
    load, and 1.13 to 1.19 times the images per second (Ray 2.60, two CPUs). Replace it by
    ``@serve.batch`` when that waits for the batch being computed.
    """

    def __init__(
        self,
        predict: Callable[[NDArray[np.uint8]], Prediction],
        *,
        max_batch_size: int,
        max_queued: int,
    ) -> None:
        self._predict = predict
        self._max_batch_size, self._max_queued = max_batch_size, max_queued
        self._queue: list[tuple[NDArray[np.uint8], asyncio.Future[Prediction]]] = []
        self._consumer: asyncio.Task[None] | None = None

    @property
    def num_queued(self) -> int:
        """Number of waiting images."""
        return len(self._queue)

    def check_capacity(self, count: int = 1) -> None:
        """Check that the queue can take ``count`` more images."""
        if len(self._queue) + count > self._max_queued:
            raise Problem(
                "too_busy",
                f"{len(self._queue)} scans wait for the model, of at most {self._max_queued}. "
                "Try again later, with fewer scans in a request.",
            )

    async def predict(self, image: NDArray[np.uint8]) -> Prediction:
        """Return the prediction of one image, shape (size_px, size_px)."""
        self.check_capacity()
        result: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
        self._queue.append((image, result))
        if self._consumer is None:
            self._consumer = asyncio.create_task(self._consume())
        return await result  # cancelling the request cancels it, and it is not computed

    async def _consume(self) -> None:
        while waiting := [pending for pending in self._queue if not pending[1].done()]:
            batch, self._queue = waiting[: self._max_batch_size], waiting[self._max_batch_size :]
            images, results = zip(*batch, strict=True)
            try:
                found = await asyncio.to_thread(self._predict, np.stack(images))
            except Exception as error:  # fails every request of the batch
                for result in results:
                    if not result.done():
                        result.set_exception(error)
            else:
                for row, result in enumerate(results):
                    if not result.done():
                        result.set_result(found.take(row))
        self._queue, self._consumer = [], None
