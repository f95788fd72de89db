"""From the bytes of uploaded scans to answers: decode in threads, batch, predict.

It knows neither HTTP nor Ray.
"""

import asyncio
import math
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from time import monotonic
from typing import Any, Literal, TypeVar, TypeVarTuple

import numpy as np
from numpy.typing import NDArray

from brainray.errors import RejectedImage
from brainray.images import (  # noqa: F401 - their libraries take seconds to load: not in a request
    dicom_pixels,
    nifti,
)
from brainray.images.heatmap import render_grey, render_map, render_overlay
from brainray.images.preprocess import OpenedScan, Preprocessing
from brainray.images.slices import (
    GreyRange,
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
    build_explained,
    build_pictures,
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
Decoded = TypeVar("Decoded")
Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

MAX_BATCH_SIZE, MAX_GPU_BATCH_SIZE = 16, 64
"""Images of one call. A CPU computes them one after another, and gains little beyond a few."""
BATCHES_UNDER_WAY = 2
"""Batches that one request's slices may fill at a time: one is computed, one is decoded."""
MAX_OPEN_FILES = 4
"""DICOM and NIfTI files that are open at a time. A volume that is all zeros unpacks from half a
megabyte to eight bytes for each voxel allowed."""
SELF_TEST_VALID_S = 2.0
"""How long a passed self-test stands for the next one."""
SELF_TEST_TIMEOUT_S = 5.0
NUM_DECODERS = 2


@dataclass(frozen=True, slots=True)
class Selection:
    """Which slices of each file are asked for: all, unless said otherwise."""

    frame: int | None = None
    """The number of one slice."""
    one: bool = False
    """Whether a file with several slices is refused where no number is given."""

    def choose(self, file: ScanFile) -> range:
        """Return the indices of a file's slices.

        Raises
        ------
        Problem
            ``invalid_parameter``: it has no such slice; ``several_slices``.
        """
        count = len(file.slices)
        if self.frame is not None:
            if self.frame >= count:
                raise Problem(
                    "invalid_parameter",
                    f"frame: Expected a number from 0 to {count - 1}, got {self.frame}.",
                )
            return range(self.frame, self.frame + 1)
        if self.one and count > 1:
            raise Problem(
                "several_slices",
                f"A file has {count} slices, and one is needed. Ask for one of them with "
                f"/v1/explain?frame=N or /v1/render?frame=N (0 to {count - 1}); /v1/classify "
                "answers all of them.",
            )
        return range(count)


@dataclass(frozen=True, eq=False, slots=True)
class NetworkInput:
    """A slice without its samples, which may be large."""

    image: NDArray[np.uint8]
    """Shape (size_px, size_px)."""
    shape: tuple[int, ...]
    """Height and width of the slice, in pixels."""
    info: SliceInfo
    grey_range: GreyRange


@dataclass(eq=False, slots=True)
class _Request:
    """What one request may still ask for, and what of it is under way."""

    most: int
    """Slices of the request."""
    slots: asyncio.Semaphore
    """For slices between decoding and their answer, which bounds their memory."""
    count: int = 0
    tasks: "list[asyncio.Task[Any]]" = field(default_factory=list)

    def add(self, count: int) -> None:
        """Count slices that are to be decoded.

        Raises
        ------
        Problem
            ``too_many_slices``.
        """
        self.count += count
        if self.count > self.most:
            raise too_many_slices(self.most)

    def start(self, work: Coroutine[Any, Any, Result]) -> "asyncio.Task[Result]":
        """Start what is to end with the request."""
        task = asyncio.create_task(work)
        self.tasks.append(task)
        return task


class Pipeline:
    """Answers uploads.

    A file's slices are decoded one after another, and a request has at most
    :data:`BATCHES_UNDER_WAY` batches of slices between decoding and their answer. Slices of all
    requests are predicted together.

    Parameters
    ----------
    predictor : Predictor
        Computes.
    limits : ServiceLimits
        Beyond them uploads are refused.
    id_key : bytes, optional
        Key of the hashes that stand for identifiers; random if not given.
    max_batch_size : int
        Images that are predicted together, at most.
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
        self._preprocessing = predictor.preprocessing
        self._id_key = id_key or secrets.token_bytes(NUM_KEY_BYTES)
        self._max_under_way = BATCHES_UNDER_WAY * max_batch_size
        self._open_files = asyncio.Semaphore(MAX_OPEN_FILES)
        self._decoders = ThreadPoolExecutor(NUM_DECODERS, thread_name_prefix="decode")
        self._tested_at = -math.inf

    async def classify(
        self, uploads: Sequence[Upload], *, one_slice: bool = False
    ) -> list[AnswerBody]:
        """Answer every upload, in order, and each slice of those that have several.

        Parameters
        ----------
        one_slice : bool
            Whether a file with several slices is refused.

        Raises
        ------
        Problem
            ``too_many_files``, ``too_many_slices``, ``several_slices``, ``too_busy`` or
            ``timeout``; a scan that cannot be read has an answer.
        """
        self._check(len(uploads), self.predictions)
        decode = partial(open_input, preprocessing=self._preprocessing)
        selection = Selection(one=one_slice)
        found = await self._process(uploads, selection, decode, self._predict)
        return [build_answer(file) for file in found]

    async def explain(
        self, uploads: Sequence[Upload], render: Render, frame: int | None = None
    ) -> list[ExplainedBody]:
        """Answer one slice of every upload, with the evidence for its most probable class.

        Parameters
        ----------
        frame : int, optional
            Number of the slice; needed where a file has several.
        """
        self._check(len(uploads), self.explanations)
        decode = partial(open_shown, preprocessing=self._preprocessing)
        finish = partial(self._explain, render)
        found = await self._process(uploads, Selection(frame, one=True), decode, finish)
        return [build_explained(file) for file in found]

    async def render(
        self, uploads: Sequence[Upload], frame: int | None = None
    ) -> list[PictureBody]:
        """Return every slice of every upload as a picture, or one of each.

        Raises
        ------
        Problem
            As :meth:`classify`; ``too_many_slices`` also where the pictures together have more
            bytes than a request may have.
        """
        self._check(len(uploads), None)
        num_bytes = 0

        async def count(png: bytes) -> bytes:
            nonlocal num_bytes
            num_bytes += len(png)
            if num_bytes > self.limits.body_bytes:
                raise Problem(
                    "too_many_slices",
                    f"The pictures have more than {self.limits.body_bytes:,} bytes. Ask for fewer "
                    "files, or for one slice with ?frame=N.",
                )
            return png

        found = await self._process(uploads, Selection(frame), render_slice, count)
        return [
            picture for upload, file in enumerate(found) for picture in build_pictures(upload, file)
        ]

    async def summarise(self, answers: Sequence[AnswerBody]) -> list[SeriesBody]:
        """Put slices together to the series that they belong to.

        Raises
        ------
        Problem
            ``invalid_request``: an answer is not of this classifier's classes;
            ``too_many_slices``; ``timeout``.
        """
        slices = [one for answer in answers for one in answer.slices or (answer,)]
        if len(slices) > MAX_SERIES_SLICES:
            raise too_many_slices(MAX_SERIES_SLICES)
        for one in slices:
            if one.probs is not None and set(one.probs) != set(self.classes):
                raise Problem(
                    "invalid_request",
                    "An answer has probabilities of other classes than this service's. "
                    "Send the files again.",
                )
        async with self._limit_time():
            return await self._run_in_decoder(summarise_answers, answers, self.classes)

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

    def _check(self, count: int, batcher: Batcher | None) -> None:
        if count > self.limits.files:
            raise too_many_files(self.limits.files)
        if batcher is not None:
            batcher.check_disk_space(min(count, self._max_under_way))

    def _limit_time(self) -> AbstractAsyncContextManager[None]:
        return limit_time(self.limits.request_s, "timeout", "There was no answer")

    async def _process(
        self,
        uploads: Sequence[Upload],
        selection: Selection,
        decode: Callable[[ScanFile, int], Decoded],
        finish: Callable[[Decoded], Awaitable[Result]],
    ) -> list[ProcessedFile[Result]]:
        """Decode slices in threads, and finish each as soon as it is decoded."""
        share = min(self._max_under_way, max(1, self.limits.queued // 2))  # others wait, too
        request = _Request(self.limits.slices, asyncio.Semaphore(share))
        files = [
            request.start(self._process_file(upload, request, selection, decode, finish))
            for upload in uploads
        ]
        try:
            async with self._limit_time():
                return await asyncio.gather(*files)
        finally:
            for task in request.tasks:  # where one failed, nobody wants the others
                task.cancel()

    async def _process_file(
        self,
        upload: Upload,
        request: _Request,
        selection: Selection,
        decode: Callable[[ScanFile, int], Decoded],
        finish: Callable[[Decoded], Awaitable[Result]],
    ) -> ProcessedFile[Result]:
        async with self._hold_place(upload.content):
            digest, file = await self._run_in_decoder(
                open_upload, upload.content, self.limits, self._id_key
            )
            if isinstance(file, RejectedImage):
                return ProcessedFile(upload.name, digest, file)
            chosen = selection.choose(file)
            request.add(len(chosen))
            started = []
            for index in chosen:
                await request.slots.acquire()  # released by _finish
                decoded = await self._run_in_decoder(try_to_decode, decode, file, index)
                started.append(request.start(_finish(decoded, finish, request)))
            infos = [file.slices[index] for index in chosen]
            has_several = len(file.slices) > 1
            del file  # a large one need not be held while its slices wait for the model
        found = [await one for one in started]
        slices = list(zip(infos, found, strict=True))
        return ProcessedFile(upload.name, digest, has_several=has_several, slices=slices)

    def _hold_place(self, content: bytes) -> AbstractAsyncContextManager[Any]:
        """Wait until a further file may be open; pictures are unpacked only by their decoder."""
        return nullcontext() if recognise_format(content) == "picture" else self._open_files

    async def _predict(self, opened: NetworkInput) -> SliceBody:
        found = await self.predictions.predict(opened.image)
        return build_slice(
            opened.shape,
            self.classes,
            found.probs[0],
            found.reasons[0],
            info=opened.info,
            grey_range=opened.grey_range,
        )

    async def _explain(self, render: Render, opened: OpenedSlice) -> ExplainedSlice:
        found = await self.explanations.predict(opened.scan.image)
        probs, reason = found.probs[0], found.reasons[0]
        answer = build_slice(
            opened.scan.samples.shape,
            self.classes,
            probs,
            reason,
            info=opened.info,
            grey_range=opened.grey_range,
        )
        if answer.status == "rejected":
            return ExplainedSlice(answer)
        assert found.class_maps is not None
        top = int(probs.argmax())
        picture = await self._run_in_decoder(
            draw_heat_map, render, opened.scan, found.class_maps[0, top]
        )
        return ExplainedSlice(answer, self.classes[top], picture)

    def _run_in_decoder(
        self, function: Callable[[*Arguments], Result], *arguments: *Arguments
    ) -> "asyncio.Future[Result]":
        return asyncio.get_running_loop().run_in_executor(self._decoders, function, *arguments)


async def _finish(
    decoded: Decoded | RejectedImage,
    finish: Callable[[Decoded], Awaitable[Result]],
    request: _Request,
) -> Result | RejectedImage:
    try:
        return decoded if isinstance(decoded, RejectedImage) else await finish(decoded)
    finally:
        request.slots.release()


def too_many_slices(most: int) -> Problem:
    """Build the refusal of a request whose scans have more slices than it may have."""
    return Problem(
        "too_many_slices",
        f"The files have more than {most} slices together. Send fewer files in a request; "
        "`brainray classify` and the bulk job take files with more slices.",
    )


# ---- in the decoders' threads --------------------------------------------------------------------


def open_upload(
    content: bytes, limits: ServiceLimits, id_key: bytes
) -> tuple[str, ScanFile | RejectedImage]:
    """Return the SHA-256 of a file, and the file with its header read, or why it is rejected."""
    digest = sha256(content).hexdigest()
    try:
        return digest, open_file(content, ReadOptions(limits=limits.decode), key=id_key)
    except RejectedImage as rejection:
        return digest, rejection


def try_to_decode(
    decode: Callable[[ScanFile, int], Decoded], file: ScanFile, index: int
) -> Decoded | RejectedImage:
    """Decode one slice, or return why it is rejected."""
    try:
        return decode(file, index)
    except RejectedImage as rejection:
        return rejection


def open_input(file: ScanFile, index: int, preprocessing: Preprocessing) -> NetworkInput:
    """Open one slice, and keep only what is needed of it while it waits for the model."""
    opened = open_slice(file, index, preprocessing)
    scan = opened.scan
    return NetworkInput(scan.image, scan.samples.shape, opened.info, opened.grey_range)


def open_shown(file: ScanFile, index: int, preprocessing: Preprocessing) -> OpenedSlice:
    """Open one slice, with the grey levels that a person sees as its samples."""
    opened = open_slice(file, index, preprocessing)
    if file.format == "picture":  # whose samples are what is shown
        return opened
    return replace(opened, scan=replace(opened.scan, samples=show_slice(file, index)))


def render_slice(file: ScanFile, index: int) -> bytes:
    """Render one slice as an 8-bit grey PNG, through its window where it has one."""
    return render_grey(show_slice(file, index))


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
