"""From the bytes of uploaded scans to answers: decode in threads, batch, predict.

It knows neither HTTP nor Ray.
"""

import asyncio
import base64
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from time import monotonic
from typing import Any, Literal, TypeVar, TypeVarTuple

import numpy as np
from numpy.typing import NDArray

from brainray.errors import RejectedImage
from brainray.images.decode import DecodeLimits
from brainray.images.heatmap import render_map, render_overlay
from brainray.images.preprocess import OpenedScan, Preprocessing, open_scan
from brainray.model.explain import STRIDE_PX
from brainray.model.reasons import REASONS, find_status
from brainray.serving.batcher import Batcher
from brainray.serving.options import ServiceLimits
from brainray.serving.predictor import Predictor
from brainray.serving.problem import Problem
from brainray.serving.schemas import AnswerBody, ExplainedBody

Render = Literal["map", "overlay"]
Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

MAX_BATCH_SIZE, MAX_GPU_BATCH_SIZE = 16, 64
"""Images of one call. A CPU computes them one after another, and gains little beyond a few."""
SELF_TEST_VALID_S = 2.0
"""How long a passed self-test stands for the next one."""
SELF_TEST_TIMEOUT_S = 5.0
NUM_DECODERS = 2


@dataclass(frozen=True, slots=True)
class Upload:
    """One scan as it came."""

    name: str | None
    content: bytes


class Pipeline:
    """Answers uploads.

    Parameters
    ----------
    predictor : Predictor
        Computes.
    limits : ServiceLimits
        Beyond them uploads are refused.
    max_batch_size : int
        Images that are predicted together, at most.
    """

    def __init__(
        self, predictor: Predictor, limits: ServiceLimits, *, max_batch_size: int = MAX_BATCH_SIZE
    ) -> None:
        self.limits = limits
        self.card, self.runtime = predictor.card, predictor.runtime
        self.classes: tuple[str, ...] = tuple(self.card["classes"])
        self.classifier_id: str = self.card["classifier_id"]
        bounds = {"max_batch_size": max_batch_size, "max_queued": limits.queued}
        self.predictions = Batcher(predictor.predict, **bounds)
        self.explanations = Batcher(predictor.explain, **bounds)
        self._predictor = predictor
        self._preprocessing = predictor.preprocessing
        self._decoders = ThreadPoolExecutor(NUM_DECODERS, thread_name_prefix="decode")
        self._tested_at = -math.inf

    async def classify(self, uploads: Sequence[Upload]) -> list[AnswerBody]:
        """Answer every upload, in order.

        Raises
        ------
        Problem
            ``too_many_files``, ``too_busy`` or ``timeout``; a scan that cannot be read has an
            answer.
        """
        self._check(len(uploads), self.predictions)
        return await self._gather(self._classify(upload) for upload in uploads)

    async def explain(self, uploads: Sequence[Upload], render: Render) -> list[ExplainedBody]:
        """Answer every upload, with a picture of the evidence for its most probable class."""
        self._check(len(uploads), self.explanations)
        return await self._gather(self._explain(upload, render) for upload in uploads)

    async def check_ready(self, max_age_s: float = SELF_TEST_VALID_S) -> None:
        """Check that the engine passes its self-test, or passed it not long ago.

        Raises
        ------
        Problem
            ``model_unavailable``: it does not in 5 s.
        ServingError
            It fails.
        """
        if monotonic() - self._tested_at < max_age_s:
            return
        async with limit_time(
            SELF_TEST_TIMEOUT_S, "model_unavailable", "The model did not pass its self-test"
        ):
            await asyncio.to_thread(self._predictor.check)
        self._tested_at = monotonic()

    def _check(self, count: int, batcher: Batcher) -> None:
        if count > self.limits.files:
            raise too_many_files(self.limits.files)
        batcher.check_room(count)

    async def _gather(self, answers: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
        tasks = [asyncio.create_task(answer) for answer in answers]
        try:
            async with limit_time(self.limits.request_s, "timeout", "There was no answer"):
                return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # where one failed, nobody wants the others
                task.cancel()

    async def _classify(self, upload: Upload) -> AnswerBody:
        digest, opened = await self._open(upload)
        if isinstance(opened, RejectedImage):
            return build_rejection(upload.name, digest, opened)
        shape, image = opened.samples.shape, opened.image
        del opened  # a large scan need not be held while its image waits
        found = await self.predictions.predict(image)
        return build_answer(
            upload.name, digest, shape, self.classes, found.probs[0], found.reasons[0]
        )

    async def _explain(self, upload: Upload, render: Render) -> ExplainedBody:
        digest, opened = await self._open(upload)
        if isinstance(opened, RejectedImage):
            return ExplainedBody(**dict(build_rejection(upload.name, digest, opened)))
        found = await self.explanations.predict(opened.image)
        probs, reason = found.probs[0], found.reasons[0]
        answer = build_answer(
            upload.name, digest, opened.samples.shape, self.classes, probs, reason
        )
        if answer.status == "rejected":
            return ExplainedBody(**dict(answer))
        assert found.class_maps is not None
        top = int(probs.argmax())
        picture = await self._run_in_decoder(
            draw_heat_map, render, opened, found.class_maps[0, top]
        )
        return ExplainedBody(
            **dict(answer),
            explained_class=self.classes[top],
            heat_map_png=base64.b64encode(picture).decode(),
        )

    async def _open(self, upload: Upload) -> tuple[str, OpenedScan | RejectedImage]:
        return await self._run_in_decoder(
            open_upload, upload.content, self._preprocessing, self.limits.decode
        )

    def _run_in_decoder(
        self, function: Callable[[*Arguments], Result], *arguments: *Arguments
    ) -> "asyncio.Future[Result]":
        return asyncio.get_running_loop().run_in_executor(self._decoders, function, *arguments)


def too_many_files(most: int) -> Problem:
    """Build the refusal of a request with more scans than it may have."""
    return Problem(
        "too_many_files",
        f"The request has more than {most} files. Send the others in further requests.",
    )


@asynccontextmanager
async def limit_time(seconds: float, code: str, failure: str) -> AsyncIterator[None]:
    """Bound the time of what is done inside.

    Parameters
    ----------
    code : str
        Of the problem.
    failure : str
        What did not come about in time, as the start of a sentence.

    Raises
    ------
    Problem
        It took longer.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Problem(
            code, f"{failure} in {seconds:g} s. Try again later, with fewer scans at a time."
        ) from None


def open_upload(
    content: bytes, preprocessing: Preprocessing, limits: DecodeLimits
) -> tuple[str, OpenedScan | RejectedImage]:
    """Return the SHA-256 of a scan, and the scan decoded and resized, or why it is rejected."""
    digest = sha256(content).hexdigest()
    try:
        return digest, open_scan(content, preprocessing, limits)
    except RejectedImage as rejection:
        return digest, rejection


def draw_heat_map(render: Render, opened: OpenedScan, class_map: NDArray[np.float32]) -> bytes:
    """Draw the evidence for a class as a PNG: the map alone, or the scan with the map on it.

    Parameters
    ----------
    class_map : ndarray of float32, shape (h, w)
        Of the explained class.
    """
    if render == "overlay":
        return render_overlay(class_map, opened.samples, opened.frame, STRIDE_PX)
    return render_map(class_map, opened.frame, STRIDE_PX)


def build_answer(
    name: str | None,
    content_sha256: str,
    shape: tuple[int, ...],
    classes: Sequence[str],
    probs: NDArray[np.float32],
    reason: str | None = None,
) -> AnswerBody:
    """Build the answer to a scan that was decoded and predicted.

    Parameters
    ----------
    shape : (int, int)
        Height and width of the scan, in pixels.
    classes : sequence of str
        In class order.
    probs : ndarray of float32, shape (K,)
        In class order.
    reason : str, optional
        Why no class is given: a key of :data:`brainray.model.trust.TRUST_REASONS`.
    """
    status, top = find_status(reason), int(probs.argmax())
    shown = [shorten(prob) for prob in probs]
    is_rejected = status == "rejected"
    height, width = shape
    return AnswerBody(
        name=name,
        status=status,
        reason=reason,
        detail=None if reason is None else REASONS[reason],
        predicted_class=classes[top] if status == "classified" else None,
        confidence=None if is_rejected else shown[top],
        probs=None if is_rejected else dict(zip(classes, shown, strict=True)),
        width_px=width,
        height_px=height,
        content_sha256=content_sha256,
    )


def build_rejection(name: str | None, content_sha256: str, rejection: RejectedImage) -> AnswerBody:
    """Build the answer to a scan that could not be decoded."""
    return AnswerBody(
        name=name,
        status="rejected",
        reason=rejection.reason,
        detail=rejection.message,
        content_sha256=content_sha256,
    )


def shorten(value: np.float32) -> float:
    """Return the shortest decimal that a float32 is read back from: 0.9, not 0.8999999762."""
    return float(str(value))
