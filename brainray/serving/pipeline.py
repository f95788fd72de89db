"""From uploaded files to answers: decode in threads, predict in batches, build the bodies.

It imports neither HTTP nor Ray.
"""

import asyncio
import base64
import math
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from functools import partial
from hashlib import sha256
from time import monotonic
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from brainray.errors import RejectedImage
from brainray.images import (  # noqa: F401 - import the slow libraries now, not in a request
    dicom_pixels,
    nifti,
)
from brainray.images.heatmap import render_grey, render_map, render_overlay
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import (
    GreyRange,
    OpenedSlice,
    ReadOptions,
    ScanFile,
    SliceInfo,
    name_slice,
    open_file,
    open_slice,
    recognise_format,
    show_slice,
    split_name,
)
from brainray.inference.series import summarise_series
from brainray.io.identifiers import NUM_KEY_BYTES
from brainray.model.explain import STRIDE_PX
from brainray.model.reasons import REASONS, find_status
from brainray.serving.options import ServiceLimits
from brainray.serving.predictor import Batcher, Predictor
from brainray.serving.problem import Problem, limit_time
from brainray.serving.schemas import (
    MAX_COSINE,
    MAX_POSITION_MM,
    MAX_SERIES_SLICES,
    AnswerBody,
    ExplainedBody,
    PictureBody,
    SeriesBody,
)
from brainray.serving.uploads import Upload, too_many_files

Render = Literal["map", "overlay"]
Result = TypeVar("Result")
Members = dict[str, Any]
"""Members of a body."""

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
        self,
        uploads: Sequence[Upload],
        *,
        render: Render | None = None,
        frame: int | None = None,
        needs_one_slice: bool = False,
    ) -> list[ExplainedBody]:
        """Answer every file, in order, with an answer for each slice if it has several.

        An unreadable file gets the answer `rejected`. A request beyond the limits raises a Problem.
        With ``render`` an answer has the heat map of its most probable class. ``needs_one_slice``
        refuses files with several slices, unless ``frame`` chooses one.
        """
        batcher = self.predictions if render is None else self.explanations
        batcher.check_capacity(min(len(uploads), self._max_decoded))
        decode = partial(decode_slice, self._predictor.preprocessing, render is not None)
        finish = partial(self._predict, batcher, render)
        files = await self._process(uploads, decode, finish, frame, needs_one_slice=needs_one_slice)
        return [build_answer(file, slices) for file, slices in files]

    async def render(
        self, uploads: Sequence[Upload], frame: int | None = None
    ) -> list[PictureBody]:
        """Render every slice of every file as a picture, or one slice of each."""
        num_bytes = 0

        async def finish(info: SliceInfo, png: bytes) -> Members:
            nonlocal num_bytes
            num_bytes += len(png)
            if num_bytes > self.limits.body_bytes:
                raise Problem(
                    "too_many_slices",
                    f"The pictures have more than {self.limits.body_bytes:,} bytes. Send fewer "
                    "files, or request one slice with ?frame=N.",
                )
            return {"frame": info.frame, "png": base64.b64encode(png).decode()}

        def decode(file: ScanFile, index: int) -> bytes:
            return render_grey(show_slice(file, index))

        files = await self._process(uploads, decode, finish, frame, needs_one_slice=False)
        names = PictureBody.model_fields.keys()
        return [
            PictureBody(upload=upload, **{name: one[name] for name in names & one.keys()})
            for upload, (_, slices) in enumerate(files)
            for one in slices
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

    async def _predict(
        self, batcher: Batcher, render: Render | None, info: SliceInfo, opened: OpenedSlice
    ) -> Members:
        scan = opened.scan
        found = await batcher.predict(scan.image)
        probs, reason = found.probs[0], found.reasons[0]
        answer = build_slice(info, scan.frame.shape, self.classes, probs, reason, opened.grey_range)
        if render is None or answer["status"] == "rejected":
            return answer
        assert found.class_maps is not None
        top = int(probs.argmax())
        class_map = found.class_maps[0, top]
        if render == "overlay":
            drawing = partial(render_overlay, class_map, scan.samples, scan.frame, STRIDE_PX)
        else:
            drawing = partial(render_map, class_map, scan.frame, STRIDE_PX)
        png = base64.b64encode(await self._run_in_decoder(drawing)).decode()
        return answer | {"explained_class": self.classes[top], "heat_map_png": png}

    async def _process(
        self,
        uploads: Sequence[Upload],
        decode: Callable[[ScanFile, int], Any],
        finish: Callable[[SliceInfo, Any], Awaitable[Members]],
        frame: int | None,
        *,
        needs_one_slice: bool,
    ) -> list[tuple[Members, list[Members]]]:
        """Process all files at the same time; the first failure cancels the others.

        ``decode`` runs in a decoder thread; ``finish`` makes the result of what it returns. Each
        file gets its own members, and the results of the requested slices, one if it is rejected.
        """
        slots = asyncio.Semaphore(self._max_decoded)  # from decoding to result: bounds memory
        num_slices = 0

        async def finish_slice(info: SliceInfo, decoded: Any) -> Members:  # noqa: ANN401
            try:
                if isinstance(decoded, RejectedImage):
                    return build_rejection(info, decoded)
                return await finish(info, decoded)
            finally:
                slots.release()

        async def process_file(upload: Upload) -> tuple[Members, list[Members]]:
            nonlocal num_slices
            is_picture = recognise_format(upload.content) == "picture"  # opening decodes nothing
            async with nullcontext() if is_picture else self._open_files:
                digest, file = await self._run_in_decoder(
                    open_upload, upload.content, self.limits, self._id_key
                )
                members: Members = {"name": upload.name, "content_sha256": digest}
                if isinstance(file, RejectedImage):
                    return members, [build_rejection(SliceInfo(), file)]
                indices = choose_slices(file, frame, needs_one_slice=needs_one_slice)
                num_slices += len(indices)
                if num_slices > self.limits.slices:
                    raise too_many_slices(self.limits.slices)
                started = []
                for index in indices:
                    await slots.acquire()  # finish_slice releases it
                    try:
                        decoded = await self._run_in_decoder(decode, file, index)
                    except RejectedImage as rejection:
                        decoded = rejection
                    finishing = finish_slice(file.slices[index], decoded)
                    started.append(tasks.create_task(finishing))
                info = file.slices[indices[0]]
                members |= {"series": info.series, "sop_instance": info.sop_instance}
                del file  # a large file need not stay in memory while its slices wait for the model
            return members, [await one for one in started]

        if len(uploads) > self.limits.files:
            raise too_many_files(self.limits.files)
        try:
            async with self._limit_time(), asyncio.TaskGroup() as tasks:
                files = [tasks.create_task(process_file(upload)) for upload in uploads]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [file.result() for file in files]

    async def _run_in_decoder(self, function: Callable[..., Result], *arguments: object) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, function, *arguments)


def choose_slices(file: ScanFile, frame: int | None, *, needs_one_slice: bool) -> range:
    """Return the indices of the requested slices, or raise a Problem if there are none."""
    count = len(file.slices)
    if frame is not None:
        if frame >= count:
            detail = f"frame: Expected a number from 0 to {count - 1}, got {frame}."
            raise Problem("slice_not_found", detail)
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


def decode_slice(
    preprocessing: Preprocessing, is_shown: bool, file: ScanFile, index: int
) -> OpenedSlice:
    """Decode one slice to the network's input.

    Its samples, which may be large, are dropped, or replaced by the grey levels for display.
    """
    opened = open_slice(file, index, preprocessing)
    if is_shown and file.format == "picture":  # displayed as stored
        return opened
    samples = show_slice(file, index) if is_shown else NO_SAMPLES
    return replace(opened, scan=replace(opened.scan, samples=samples))


# ---- bodies --------------------------------------------------------------------------------------


def build_answer(file: Members, slices: list[Members]) -> ExplainedBody:
    """Build the answer to a file, with one for each slice if several were requested."""
    several = {"status": "slices", "slices": slices}
    return ExplainedBody(**file, **(slices[0] if len(slices) == 1 else several))


def build_slice(
    info: SliceInfo,
    shape: tuple[int, ...],
    classes: Sequence[str],
    probs: NDArray[np.float32],
    reason: str | None,
    grey_range: GreyRange | None = None,
) -> Members:
    """Build the answer to a slice of (height, width) pixels that was predicted.

    ``probs`` has shape (K,), in class order. ``reason`` is a key of
    :data:`brainray.model.calibration.NO_CLASS_REASONS` if no class is given.
    """
    status, top = find_status(reason), int(probs.argmax())
    # The shortest decimal that reads back as the float32: 0.9, not 0.8999999762.
    shown = [float(str(prob)) for prob in probs]
    is_rejected = status == "rejected"
    return _describe(info) | {
        "grey_range": grey_range,
        "status": status,
        "reason": reason,
        "detail": None if reason is None else REASONS[reason],
        "predicted_class": classes[top] if status == "classified" else None,
        "confidence": None if is_rejected else shown[top],
        "probs": None if is_rejected else dict(zip(classes, shown, strict=True)),
        "width_px": shape[1],
        "height_px": shape[0],
    }


def build_rejection(info: SliceInfo, rejection: RejectedImage) -> Members:
    """Build the answer to a slice that is rejected before the network sees it."""
    rejected = {"status": "rejected", "reason": rejection.reason, "detail": rejection.message}
    return _describe(info) | rejected


def _describe(info: SliceInfo) -> Members:
    position, orientation = info.position_mm, info.orientation
    if position is None or not abs(position) <= MAX_POSITION_MM:
        position = None
    if orientation is None or not all(abs(cosine) <= MAX_COSINE for cosine in orientation):
        orientation = None
    return {
        "frame": info.frame,
        "plane": info.plane,
        "position_mm": position,
        "orientation": None if orientation is None else list(orientation),
        "flags": list(info.flags),
    }


def summarise_answers(answers: Sequence[AnswerBody], classes: Sequence[str]) -> list[SeriesBody]:
    """Summarise the slices of each series, in the order in which the series first occur.

    Answers without a series, such as pictures, are skipped.
    """
    rows: dict[str, list[Members]] = defaultdict(list)
    for upload, answer in enumerate(answers):
        if answer.series is None:
            continue
        for one in answer.slices or (answer,):
            probs = one.probs or dict.fromkeys(classes)
            row = {
                **one.model_dump(include={"reason", "frame", "plane", "position_mm", "flags"}),
                **{f"prob_{name}": probs[name] for name in classes},
                "scan_uri": name_slice(f"{upload:09d}", one.frame),  # sorts as the files came
                "sop_instance": answer.sop_instance,
                "orientation": one.orientation,
            }
            rows[answer.series].append(row)
    bodies = []
    for series, slices in rows.items():
        summary = summarise_series(slices, classes) | {"series": series}
        names = [split_name(uri) for uri in summary["key_slices"]]
        summary["key_slices"] = [{"upload": int(file), "frame": frame} for file, frame in names]
        members = {name: summary[name] for name in SeriesBody.model_fields}
        bodies.append(SeriesBody(**members))
    return bodies
