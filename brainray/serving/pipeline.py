"""From uploaded files to answers: decode in threads, predict in batches, build the bodies.

It imports neither HTTP nor Ray.
"""

import asyncio
import base64
import math
import secrets
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from time import monotonic
from typing import Any, Generic, Literal, TypeVar, TypeVarTuple

import numpy as np

from brainray.errors import RejectedImage
from brainray.images import (  # noqa: F401 - import the slow libraries now, not in a request
    dicom_pixels,
    nifti,
)
from brainray.images.heatmap import render_grey, render_map, render_overlay
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import (
    OpenedSlice,
    ReadOptions,
    ScanFile,
    SliceInfo,
    open_file,
    open_slice,
    recognise_format,
    show_slice,
)
from brainray.io.identifiers import NUM_KEY_BYTES
from brainray.model.explain import STRIDE_PX
from brainray.serving.answers import (
    ExplainedSlice,
    ProcessedFile,
    build_answer,
    build_picture,
    build_rejection,
    build_slice,
    summarise_answers,
)
from brainray.serving.batcher import Batcher
from brainray.serving.options import ServiceLimits
from brainray.serving.predictor import Predictor
from brainray.serving.problem import Problem
from brainray.serving.schemas import (
    MAX_SERIES_SLICES,
    AnswerBody,
    ExplainedBody,
    PictureBody,
    SeriesBody,
    SliceBody,
)
from brainray.serving.uploads import Upload, limit_time, too_many_files

Render = Literal["map", "overlay"]
Rendered = tuple[SliceInfo, bytes | RejectedImage]
Decoded = TypeVar("Decoded")
Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

MAX_BATCH_SIZE, MAX_GPU_BATCH_SIZE = 16, 64
"""Images of one call. A CPU computes them one after another, and gains little beyond a few."""
BATCHES_PER_REQUEST = 2
"""Batches of slices that one request may hold decoded: one is computed while one is decoded."""
MAX_OPEN_FILES = 4
"""DICOM and NIfTI files open at a time. A volume of zeros decompresses from half a megabyte to
eight bytes for each voxel that the limit allows."""
SELF_TEST_VALID_S = 2.0
"""A self-test that passed so recently is not repeated."""
SELF_TEST_TIMEOUT_S = 5.0
NUM_DECODERS = 2
NO_SAMPLES = np.empty((0, 0), np.uint8)


@dataclass(frozen=True, slots=True)
class _Job(Generic[Decoded, Result]):
    """The steps by which a request's slices become results."""

    decode: Callable[[ScanFile, int], Decoded]
    """Runs in a decoder thread."""
    finish: Callable[[SliceInfo, Decoded], Awaitable[Result]]
    reject: Callable[[SliceInfo, RejectedImage], Result]
    frame: int | None = None
    """Number of the one slice to process of each file; all slices if None."""
    needs_one_slice: bool = False
    """Refuse a file with several slices if ``frame`` is None."""


@dataclass(slots=True)
class _Request(Generic[Decoded, Result]):
    """The state of one request."""

    job: _Job[Decoded, Result]
    tasks: asyncio.TaskGroup
    slots: asyncio.Semaphore
    """One for each slice from its decoding to its result, which bounds memory."""
    num_slices: int = 0


class Pipeline:
    """Answers the files of requests.

    The slices of a file are decoded one after another. A request holds at most
    :data:`BATCHES_PER_REQUEST` batches of decoded slices. Slices of all requests are batched
    together.
    """

    def __init__(
        self,
        predictor: Predictor,
        limits: ServiceLimits,
        *,
        id_key: bytes | None = None,
        max_batch_size: int = MAX_BATCH_SIZE,
    ) -> None:
        self.limits = limits
        self.metadata, self.runtime = predictor.metadata, predictor.runtime
        self.classes: tuple[str, ...] = tuple(self.metadata["classes"])
        self.classifier_id: str = self.metadata["classifier_id"]
        bounds = {"max_batch_size": max_batch_size, "max_queued": limits.queued}
        self.predictions = Batcher(predictor.predict, **bounds)
        self.explanations = Batcher(predictor.explain, **bounds)
        self._predictor = predictor
        self._id_key = id_key or secrets.token_bytes(NUM_KEY_BYTES)
        # Half of the queue at most, so that one request leaves capacity for others.
        self._max_decoded = min(BATCHES_PER_REQUEST * max_batch_size, max(1, limits.queued // 2))
        self._open_files = asyncio.Semaphore(MAX_OPEN_FILES)
        self._decoders = ThreadPoolExecutor(NUM_DECODERS, thread_name_prefix="decode")
        self._tested_at = -math.inf

    async def classify(
        self, uploads: Sequence[Upload], *, needs_one_slice: bool = False
    ) -> list[AnswerBody]:
        """Answer every file, in order, with an answer for each slice if it has several.

        An unreadable file gets the answer `rejected`. A request beyond the limits raises a Problem.
        """
        self.predictions.check_capacity(min(len(uploads), self._max_decoded))
        decode = partial(decode_slice, preprocessing=self._predictor.preprocessing)
        job = _Job(decode, self._predict, build_rejection, needs_one_slice=needs_one_slice)
        return [build_answer(AnswerBody, file) for file in await self._process(uploads, job)]

    async def explain(
        self, uploads: Sequence[Upload], render: Render, frame: int | None = None
    ) -> list[ExplainedBody]:
        """Answer one slice of every file, with a heat map of its most probable class.

        ``frame`` is required if a file has several slices.
        """
        self.explanations.check_capacity(min(len(uploads), self._max_decoded))
        decode = partial(decode_displayed, preprocessing=self._predictor.preprocessing)
        finish = partial(self._explain, render)
        job = _Job(decode, finish, build_rejection, frame=frame, needs_one_slice=True)
        return [build_answer(ExplainedBody, file) for file in await self._process(uploads, job)]

    async def render(
        self, uploads: Sequence[Upload], frame: int | None = None
    ) -> list[PictureBody]:
        """Render every slice of every file as a picture, or one slice of each."""
        num_bytes = 0

        async def count(info: SliceInfo, png: bytes) -> Rendered:
            nonlocal num_bytes
            num_bytes += len(png)
            if num_bytes > self.limits.body_bytes:
                raise Problem(
                    "too_many_slices",
                    f"The pictures have more than {self.limits.body_bytes:,} bytes. Send fewer "
                    "files, or request one slice with ?frame=N.",
                )
            return info, png

        def reject(info: SliceInfo, rejection: RejectedImage) -> Rendered:
            return info, rejection

        files = await self._process(uploads, _Job(render_slice, count, reject, frame=frame))
        return [
            build_picture(upload, info, found)
            for upload, file in enumerate(files)
            for info, found in file.slices
        ]

    async def summarise(self, answers: Sequence[AnswerBody]) -> list[SeriesBody]:
        """Summarise the slices of each series."""
        slices = [one for answer in answers for one in answer.slices or (answer,)]
        if len(slices) > MAX_SERIES_SLICES:
            raise too_many_slices(MAX_SERIES_SLICES)
        if any(one.probs is not None and set(one.probs) != set(self.classes) for one in slices):
            raise Problem(
                "invalid_request",
                "An answer has probabilities of other classes than this service's. "
                "Send the files again.",
            )
        async with self._limit_time():
            return await self._run_in_decoder(summarise_answers, answers, self.classes)

    async def check_ready(self, max_age_s: float = SELF_TEST_VALID_S) -> None:
        """Check that the predictor passes its self-test, or passed it recently."""
        if monotonic() - self._tested_at < max_age_s:
            return
        async with limit_time(
            SELF_TEST_TIMEOUT_S, "model_unavailable", "The model did not pass its self-test"
        ):
            await asyncio.to_thread(self._predictor.check)
        self._tested_at = monotonic()

    def _limit_time(self) -> AbstractAsyncContextManager[None]:
        return limit_time(self.limits.request_s, "timeout", "The answer was not complete")

    async def _process(
        self, uploads: Sequence[Upload], job: _Job[Decoded, Result]
    ) -> list[ProcessedFile[Result]]:
        """Process all files at the same time; the first failure cancels the others."""
        if len(uploads) > self.limits.files:
            raise too_many_files(self.limits.files)
        try:
            async with self._limit_time(), asyncio.TaskGroup() as tasks:
                request = _Request(job, tasks, asyncio.Semaphore(self._max_decoded))
                files = [tasks.create_task(self._process_file(one, request)) for one in uploads]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [file.result() for file in files]

    async def _process_file(
        self, upload: Upload, request: _Request[Decoded, Result]
    ) -> ProcessedFile[Result]:
        job, started = request.job, []
        async with self._limit_open_files(upload.content):
            digest, file = await self._run_in_decoder(
                open_upload, upload.content, self.limits, self._id_key
            )
            if isinstance(file, RejectedImage):
                info = SliceInfo()
                return ProcessedFile(upload.name, digest, info, [job.reject(info, file)])
            indices = choose_slices(file, job.frame, needs_one_slice=job.needs_one_slice)
            request.num_slices += len(indices)
            if request.num_slices > self.limits.slices:
                raise too_many_slices(self.limits.slices)
            for index in indices:
                await request.slots.acquire()  # _finish releases it
                decoded = await self._run_in_decoder(try_decode, job.decode, file, index)
                finishing = _finish(request, file.slices[index], decoded)
                started.append(request.tasks.create_task(finishing))
            info = file.slices[indices[0]]
            del file  # a large file need not stay in memory while its slices wait for the model
        return ProcessedFile(upload.name, digest, info, [await one for one in started])

    def _limit_open_files(self, content: bytes) -> AbstractAsyncContextManager[Any]:
        """Wait until another file may be open. Pictures need no limit: opening decodes nothing."""
        return nullcontext() if recognise_format(content) == "picture" else self._open_files

    async def _predict(self, info: SliceInfo, opened: OpenedSlice) -> SliceBody:
        found = await self.predictions.predict(opened.scan.image)
        return build_slice(
            info,
            opened.scan.frame.shape,
            self.classes,
            found.probs[0],
            found.reasons[0],
            grey_range=opened.grey_range,
        )

    async def _explain(self, render: Render, info: SliceInfo, opened: OpenedSlice) -> SliceBody:
        scan = opened.scan
        found = await self.explanations.predict(scan.image)
        probs, reason = found.probs[0], found.reasons[0]
        answer = build_slice(
            info, scan.frame.shape, self.classes, probs, reason, grey_range=opened.grey_range
        )
        if answer.status == "rejected":
            return answer
        assert found.class_maps is not None
        top = int(probs.argmax())
        class_map = found.class_maps[0, top]
        if render == "overlay":
            drawing = partial(render_overlay, class_map, scan.samples, scan.frame, STRIDE_PX)
        else:
            drawing = partial(render_map, class_map, scan.frame, STRIDE_PX)
        return ExplainedSlice(
            **dict(answer),
            explained_class=self.classes[top],
            heat_map_png=base64.b64encode(await self._run_in_decoder(drawing)).decode(),
        )

    def _run_in_decoder(
        self, function: Callable[[*Arguments], Result], *arguments: *Arguments
    ) -> "asyncio.Future[Result]":
        return asyncio.get_running_loop().run_in_executor(self._decoders, function, *arguments)


async def _finish(
    request: _Request[Decoded, Result], info: SliceInfo, decoded: Decoded | RejectedImage
) -> Result:
    try:
        if isinstance(decoded, RejectedImage):
            return request.job.reject(info, decoded)
        return await request.job.finish(info, decoded)
    finally:
        request.slots.release()


def choose_slices(file: ScanFile, frame: int | None, *, needs_one_slice: bool) -> range:
    """Return the indices of the requested slices, or raise a Problem if there are none."""
    count = len(file.slices)
    if frame is not None:
        if frame >= count:
            raise Problem(
                "slice_not_found",
                f"frame: Expected a number from 0 to {count - 1}, got {frame}.",
            )
        return range(frame, frame + 1)
    if needs_one_slice and count > 1:
        raise Problem(
            "several_slices",
            f"A file has {count} slices, and one is needed. Request one of them with "
            f"/v1/explain?frame=N or /v1/render?frame=N (0 to {count - 1}), or all of them with "
            "/v1/classify.",
        )
    return range(count)


def too_many_slices(limit: int) -> Problem:
    """Build the refusal of a request with more slices than the limit."""
    return Problem(
        "too_many_slices",
        f"The files have more than {limit} slices together. Send fewer files in a request, or use "
        "`brainray classify`, which has no such limit.",
    )


# ---- in decoder threads --------------------------------------------------------------------------


def open_upload(
    content: bytes, limits: ServiceLimits, id_key: bytes
) -> tuple[str, ScanFile | RejectedImage]:
    """Return the SHA-256 of a file, and the file with its header read or its rejection."""
    digest = sha256(content).hexdigest()
    try:
        return digest, open_file(content, ReadOptions(limits=limits.decode), key=id_key)
    except RejectedImage as rejection:
        return digest, rejection


def try_decode(
    decode: Callable[[ScanFile, int], Decoded], file: ScanFile, index: int
) -> Decoded | RejectedImage:
    """Decode one slice, or return its rejection."""
    try:
        return decode(file, index)
    except RejectedImage as rejection:
        return rejection


def decode_slice(file: ScanFile, index: int, preprocessing: Preprocessing) -> OpenedSlice:
    """Decode one slice to the network's input; drop its samples, which may be large."""
    opened = open_slice(file, index, preprocessing)
    return replace(opened, scan=replace(opened.scan, samples=NO_SAMPLES))


def decode_displayed(file: ScanFile, index: int, preprocessing: Preprocessing) -> OpenedSlice:
    """Decode one slice to the network's input, with its grey levels for display as samples."""
    opened = open_slice(file, index, preprocessing)
    if file.format == "picture":  # displayed as stored
        return opened
    return replace(opened, scan=replace(opened.scan, samples=show_slice(file, index)))


def render_slice(file: ScanFile, index: int) -> bytes:
    """Render one slice as an 8-bit grey PNG, through its window if it has one."""
    return render_grey(show_slice(file, index))
