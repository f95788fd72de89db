"""From a request's bytes to its answers; plain Python that knows neither HTTP nor Ray."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from brainray.errors import RejectedImage
from brainray.images.decode import DecodeLimits
from brainray.images.heatmap import render_map, render_overlay
from brainray.images.intensity import Samples
from brainray.images.preprocess import Frame, OpenedScan, Preprocessing, open_scan
from brainray.model.explain import STRIDE_PX
from brainray.serving.answer import Answer, build_answer, build_rejection
from brainray.serving.courier import Courier
from brainray.serving.limits import ServiceLimits
from brainray.serving.predictor import Meaning, Reply
from brainray.serving.problem import Problem

Render = Literal["map", "overlay"]

MAX_CHANGES = 5
"""How often a scan is made ready anew because the classifier was replaced meanwhile."""
READY_FOR_S = 2.0
"""How long a passed self-test stands for the next one, in seconds."""
READY_TIME_S = 5.0
"""Time in which a model must pass its self-test, in seconds."""


class Model(Protocol):
    """What answers: model replicas, or in tests a predictor in the same process."""

    async def predict(
        self, preprocessing: Preprocessing, images: Sequence[NDArray[np.uint8]]
    ) -> Reply:
        """Predict class probabilities of images made with a preprocessing."""

    async def explain(
        self, preprocessing: Preprocessing, images: Sequence[NDArray[np.uint8]]
    ) -> Reply:
        """Predict them, with a map for each class."""

    async def describe(self) -> dict[str, Any]:
        """Return card, meaning and runtime."""

    async def check(self) -> None:
        """Run the self-test."""


@dataclass(frozen=True, slots=True)
class Upload:
    """One scan as it came."""

    name: str | None
    content: bytes


@dataclass(frozen=True, slots=True)
class Evidence:
    """Where in one scan the network saw its class."""

    samples: Samples
    """The scan itself, shape (height, width)."""
    frame: Frame
    """Which part of the scan the network sees, and where in its square."""
    class_map: NDArray[np.float32]
    """Of the explained class, shape (h, w)."""
    explained_class: str

    def render(self, kind: Render) -> bytes:
        """Render it as a PNG: the map alone, or the scan with the map on it."""
        if kind == "overlay":
            return render_overlay(self.class_map, self.samples, self.frame, STRIDE_PX)
        return render_map(self.class_map, self.frame, STRIDE_PX)


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of one request: one for each upload, in order, of one classifier."""

    meaning: Meaning
    answers: list[Answer]
    evidence: list[Evidence | None]


class Handler:
    """Answers requests.

    Parameters
    ----------
    model : Model
        What answers.
    limits : ServiceLimits
        What is too much.
    max_calls, max_images : int
        Calls to the model at a time, and images of one.
    num_decoders : int
        Threads that decode.
    """

    def __init__(
        self,
        model: Model,
        limits: ServiceLimits,
        *,
        max_calls: int = 2,
        max_images: int = 8,
        num_decoders: int = 2,
    ) -> None:
        self._model, self.limits = model, limits
        bounds = {
            "max_calls": max_calls,
            "max_images": max_images,
            "max_waiting": limits.queued,
        }
        self.courier = Courier[Reply](partial(self._call, model.predict), **bounds)
        self.explainer = Courier[Reply](partial(self._call, model.explain), **bounds)
        self._decoders = ThreadPoolExecutor(num_decoders, thread_name_prefix="decode")
        self._meaning: Meaning | None = None
        self._ready_until = 0.0

    async def classify(self, uploads: Sequence[Upload]) -> Answers:
        """Answer every upload, in order.

        Raises
        ------
        Problem
            ``too_many_files``, ``too_busy``, ``timeout`` or ``model_unavailable``; a scan that
            cannot be read is an answer.
        """
        return await self._answer(uploads, self.courier, keep_samples=False)

    async def explain(self, uploads: Sequence[Upload]) -> Answers:
        """Answer every upload, with the evidence for its most probable class."""
        return await self._answer(uploads, self.explainer, keep_samples=True)

    async def draw(self, answered: Answers, kind: Render) -> list[bytes | None]:
        """Make the pictures of a request, in the threads that decode."""
        run = asyncio.get_running_loop().run_in_executor
        return [
            None if shown is None else await run(self._decoders, shown.render, kind)
            for shown in answered.evidence
        ]

    async def describe(self) -> dict[str, Any]:
        """Return the card of the classifier that answers, and what computes."""
        async with bound(self.limits.request_s):
            return await self._model.describe()

    async def check_ready(self) -> None:
        """Check that a model is loaded and answers its self-test rightly.

        Raises
        ------
        Problem
            ``model_unavailable``.
        """
        if time.monotonic() < self._ready_until:
            return
        try:
            async with asyncio.timeout(READY_TIME_S):
                await self._model.check()
        except TimeoutError:
            raise Problem(
                "model_unavailable", f"No model passed its self-test in {READY_TIME_S:g} s."
            ) from None
        self._ready_until = time.monotonic() + READY_FOR_S

    async def get_meaning(self) -> Meaning:
        """Return what the numbers of the latest answers mean."""
        if self._meaning is None:
            description = await self.describe()
            self._meaning = self._meaning or description["meaning"]
        return self._meaning

    async def _answer(
        self, uploads: Sequence[Upload], courier: Courier[Reply], *, keep_samples: bool
    ) -> Answers:
        if len(uploads) > self.limits.files:
            raise Problem(
                "too_many_files",
                f"The request has {len(uploads)} files; at most {self.limits.files} are taken. "
                "Send the others in further requests.",
            )
        courier.check_room(len(uploads))
        async with bound(self.limits.request_s):
            await self.get_meaning()
            for _ in range(MAX_CHANGES):
                answered = await self._answer_once(uploads, courier, keep_samples)
                if answered is not None:
                    return answered
        raise Problem("model_unavailable", "The classifier is being replaced. Try again.")

    async def _answer_once(
        self, uploads: Sequence[Upload], courier: Courier[Reply], keep_samples: bool
    ) -> Answers | None:
        """Answer all uploads by one classifier; None if it was replaced in between."""
        meaning = await self.get_meaning()
        tasks = [
            asyncio.ensure_future(self._answer_upload(upload, meaning, courier, keep_samples))
            for upload in uploads
        ]
        try:
            answered = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
        if None in answered:
            return None
        pairs = [pair for pair in answered if pair is not None]
        return Answers(meaning, [answer for answer, _ in pairs], [shown for _, shown in pairs])

    async def _answer_upload(
        self, upload: Upload, meaning: Meaning, courier: Courier[Reply], keep_samples: bool
    ) -> tuple[Answer, Evidence | None] | None:
        opened, digest = await asyncio.get_running_loop().run_in_executor(
            self._decoders,
            _open_upload,
            upload.content,
            meaning.preprocessing,
            self.limits.decode,
        )
        if isinstance(opened, RejectedImage):
            return build_rejection(upload.name, digest, opened), None
        image, frame = opened.image, opened.frame
        samples = opened.samples if keep_samples else None
        del opened  # what only waits for the model need not hold a large scan
        reply = await courier.carry(meaning.preprocessing, image)
        found = reply.prediction
        if found is None or reply.meaning.classifier_id != meaning.classifier_id:
            self._meaning = reply.meaning
            return None
        answer = build_answer(
            upload.name,
            digest,
            frame.shape,
            meaning.classes,
            found.probs[0],
            found.reasons[0],
        )
        if found.class_maps is None or samples is None or answer.status == "rejected":
            return answer, None
        top = int(found.probs[0].argmax())
        evidence = Evidence(samples, frame, found.class_maps[0, top], meaning.classes[top])
        return answer, evidence

    async def _call(
        self,
        ask: Any,  # noqa: ANN401 - predict or explain of the model
        preprocessing: Preprocessing,
        images: Sequence[NDArray[np.uint8]],
    ) -> list[Reply]:
        """Make one call, and part its reply into one for each image."""
        reply: Reply = await ask(preprocessing, images)
        found = reply.prediction
        if found is None:
            return [reply] * len(images)
        return [Reply(reply.meaning, found.take(row)) for row in range(len(images))]


@asynccontextmanager
async def bound(seconds: float) -> AsyncIterator[None]:
    """Give what is done here a time.

    Raises
    ------
    Problem
        ``timeout``.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Problem(
            "timeout",
            f"There was no answer in {seconds:g} s. Try again later, with fewer scans at a time.",
        ) from None


def _open_upload(
    content: bytes, preprocessing: Preprocessing, limits: DecodeLimits
) -> tuple[OpenedScan | RejectedImage, str]:
    """Decode and resize one scan; runs in a thread."""
    digest = sha256(content).hexdigest()
    try:
        return open_scan(content, preprocessing, limits), digest
    except RejectedImage as rejection:
        return rejection, digest
