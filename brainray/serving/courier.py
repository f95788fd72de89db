"""Carries images to the model: at once when it is free, and together when they had to wait."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from brainray.images.preprocess import Preprocessing
from brainray.serving.problem import too_busy

Answer = TypeVar("Answer")
Send = Callable[[Preprocessing, Sequence[NDArray[np.uint8]]], Awaitable[Sequence[Answer]]]
"""Takes images that were made with one preprocessing; returns an answer for each, in order."""


@dataclass(slots=True)
class _Parcel(Generic[Answer]):
    preprocessing: Preprocessing
    image: NDArray[np.uint8]
    answer: "asyncio.Future[Answer]"


class Courier(Generic[Answer]):
    """Bounds what is under way to the model, and what waits for it.

    Nothing ever waits for company: an image that comes when a call may be made is sent at once,
    alone. Only images that had to wait share the next call.

    Parameters
    ----------
    send : callable
        Makes one call.
    max_calls : int
        Calls under way at a time.
    max_images : int
        Images of one call.
    max_waiting : int
        Images that wait; one more is refused.
    """

    def __init__(
        self, send: Send[Answer], *, max_calls: int, max_images: int, max_waiting: int
    ) -> None:
        self._send = send
        self._max_calls, self._max_images = max_calls, max_images
        self._max_waiting = max_waiting
        self._waiting: deque[_Parcel[Answer]] = deque()
        self._calls: set[asyncio.Task[None]] = set()

    @property
    def num_waiting(self) -> int:
        """Images that wait for a call."""
        return len(self._waiting)

    @property
    def num_calls(self) -> int:
        """Calls under way."""
        return len(self._calls)

    def check_room(self, count: int) -> None:
        """Check that so many more images may come.

        Raises
        ------
        Problem
            ``too_busy``.
        """
        free = self._max_calls - len(self._calls)
        if count > self._max_waiting - len(self._waiting) + free * self._max_images:
            raise too_busy(
                f"{len(self._waiting)} scans wait for the model, of at most {self._max_waiting}. "
                "Try again later, with fewer scans at a time."
            )

    async def carry(self, preprocessing: Preprocessing, image: NDArray[np.uint8]) -> Answer:
        """Have one image answered.

        Raises
        ------
        Problem
            ``too_busy``: there is no room to wait.
        """
        self.check_room(1)
        parcel = _Parcel(preprocessing, image, asyncio.get_running_loop().create_future())
        self._waiting.append(parcel)
        self._dispatch()
        answer: Answer = await parcel.answer  # cancelled with the request, and then left out
        return answer

    def _dispatch(self) -> None:
        while self._waiting and len(self._calls) < self._max_calls:
            parcels = self._take()
            if parcels:
                call = asyncio.get_running_loop().create_task(self._call(parcels))
                self._calls.add(call)
                call.add_done_callback(self._end)

    def _take(self) -> list[_Parcel[Answer]]:
        """Take what goes into the next call: of one preprocessing, and still wanted."""
        parcels: list[_Parcel[Answer]] = []
        while self._waiting and len(parcels) < self._max_images:
            if parcels and self._waiting[0].preprocessing != parcels[0].preprocessing:
                break
            parcel = self._waiting.popleft()
            if not parcel.answer.done():
                parcels.append(parcel)
        return parcels

    async def _call(self, parcels: list[_Parcel[Answer]]) -> None:
        try:
            answers = await self._send(
                parcels[0].preprocessing, [parcel.image for parcel in parcels]
            )
            assert len(answers) == len(parcels), "every image has one answer"
        except asyncio.CancelledError:
            for parcel in parcels:
                parcel.answer.cancel()
            raise
        except Exception as error:  # whatever it is, each of those who wait is to know
            for parcel in parcels:
                if not parcel.answer.done():
                    parcel.answer.set_exception(error)
            return
        for parcel, answer in zip(parcels, answers, strict=True):
            if not parcel.answer.done():
                parcel.answer.set_result(answer)

    def _end(self, call: "asyncio.Task[None]") -> None:
        self._calls.discard(call)
        self._dispatch()
