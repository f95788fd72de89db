"""Bodies of requests: read with a limit and a time, and parted into files."""

import asyncio
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from brainray.serving.asgi import Receive
from brainray.serving.handler import Upload
from brainray.serving.problem import Problem, too_busy

FILES_FIELD = "files"
MULTIPART = "multipart/form-data"
MAX_NAME_CHARACTERS = 255
CLOSE = {"connection": "close"}
"""The rest of such a body is not read, so nothing else can follow on the connection."""


class ClientLeft(Exception):  # noqa: N818 - nothing is wrong, and nobody is there to hear
    """The client went away before its request was whole."""


class Buffers:
    """Counts the bytes of bodies that are held at a time.

    Parameters
    ----------
    most : int
        Bytes.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.held = 0

    def take(self, count: int) -> None:
        """Count bytes that come.

        Raises
        ------
        Problem
            ``too_busy``.
        """
        if self.held + count > self._most:
            problem = too_busy(
                f"{self.held:,} bytes of requests are held, of at most {self._most:,}. "
                "Try again later."
            )
            problem.headers.update(CLOSE)
            raise problem
        self.held += count

    def give_back(self, count: int) -> None:
        """Count bytes that are held no longer."""
        self.held -= count


async def read_body(
    receive: Receive, *, declared: int | None, most: int, seconds: float, buffers: Buffers
) -> bytes:
    """Read a whole body; who calls gives its bytes back to ``buffers``.

    Parameters
    ----------
    declared : int, optional
        What Content-Length says.
    most : int
        Largest body, in bytes.
    seconds : float
        Time for it to arrive.

    Raises
    ------
    Problem
        ``body_too_large`` as soon as that is known, ``body_too_slow`` or ``too_busy``.
    ClientLeft
        It stopped in between.
    """
    if declared is not None and declared > most:
        raise _too_large(most)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise ClientLeft
                part = message.get("body", b"")
                if size + len(part) > most:
                    raise _too_large(most)
                buffers.take(len(part))
                size += len(part)
                parts.append(part)
                if not message.get("more_body", False):
                    return parts[0] if len(parts) == 1 else b"".join(parts)
    except BaseException as error:
        buffers.give_back(size)
        if isinstance(error, TimeoutError):
            raise Problem(
                "body_too_slow",
                f"{size:,} bytes came in {seconds:g} s. Send the body faster.",
                dict(CLOSE),
            ) from None
        raise


def _too_large(most: int) -> Problem:
    return Problem(
        "body_too_large",
        f"A request body may have {most:,} bytes. Send fewer or smaller files.",
        dict(CLOSE),
    )


def part_uploads(body: bytes, content_type: str, *, most: int) -> list[Upload]:
    """Part a multipart body into its files.

    Parameters
    ----------
    content_type : str
        The header, with its boundary.
    most : int
        Files of one request.

    Raises
    ------
    Problem
        ``invalid_request``: it is no multipart; ``no_files``; ``too_many_files``.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise Problem("invalid_request", "The multipart Content-Type names no boundary.")
    collector = _Collector(most)
    try:
        parser = MultipartParser(boundary, collector.callbacks)
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Problem("invalid_request", f"The body is no multipart form: {error}.") from None
    if not collector.is_ended:
        raise Problem("invalid_request", "The multipart form ends before its last boundary.")
    if not collector.uploads:
        raise Problem(
            "no_files", f"Expected one or more parts named `{FILES_FIELD}`, found none with a file."
        )
    return collector.uploads


class _Collector:
    """Collects the parts named `files` while the form is parsed."""

    def __init__(self, most: int) -> None:
        self.uploads: list[Upload] = []
        self.is_ended = False
        self._most = most
        self._headers: dict[bytes, bytes] = {}
        self._field, self._value = b"", b""
        self._parts: list[bytes] = []
        self.callbacks: Any = {
            "on_part_begin": self._begin,
            "on_header_field": self._add_field,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._headers, self._parts = {}, []

    def _add_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field, self._value = b"", b""

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._parts.append(data[start:end])

    def _end_part(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"filename")
        if options.get(b"name") != FILES_FIELD.encode() or name is None:
            return
        content = b"".join(self._parts)
        if not name and not content:  # a browser's form in which no file was chosen
            return
        if len(self.uploads) == self._most:
            raise Problem(
                "too_many_files",
                f"The request has more than {self._most} files. "
                "Send the others in further requests.",
            )
        self.uploads.append(Upload(_clean_name(name), content))

    def _end(self) -> None:
        self.is_ended = True


def _clean_name(name: bytes) -> str:
    """Return the last part of a file's name, as text that can be shown."""
    text = name.decode("utf-8", errors="replace").replace("\\", "/").rpartition("/")[2]
    return "".join(c if c.isprintable() else "\ufffd" for c in text)[:MAX_NAME_CHARACTERS]
