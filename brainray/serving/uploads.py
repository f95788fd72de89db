"""The scans of a request: its body, or the files of a form."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from brainray.serving.middleware import CLOSE
from brainray.serving.options import ServiceLimits
from brainray.serving.problem import Problem

FILES_FIELD = "files"
MULTIPART, OCTETS = "multipart/form-data", "application/octet-stream"
FILE_TYPES = (OCTETS, "application/dicom", "application/gzip", "application/x-gzip")
"""Types of a body that is the scan itself, beside image/*. Its bytes say what it is."""
MAX_NAME_CHARACTERS = 255


@dataclass(frozen=True, slots=True)
class Upload:
    """One scan as it came."""

    name: str | None
    content: bytes


class _FormParser(MultiPartParser):
    spool_max_size = sys.maxsize
    """Files stay in memory: scans of patients are not written to a disk."""


async def read_body(request: Request, limits: ServiceLimits) -> bytes:
    """Read a whole body, in bounded time.

    Raises
    ------
    Problem
        ``body_too_slow``, or what :class:`~brainray.serving.middleware.RequestLimits` refuses.
    """
    try:
        async with limit_time(limits.body_s, "body_too_slow", "The body did not arrive"):
            return await request.body()
    except Problem as problem:
        problem.headers.update(CLOSE)
        raise


async def read_uploads(request: Request, limits: ServiceLimits) -> tuple[list[Upload], bool]:
    """Read the scans of a request, and whether the body itself is the scan.

    Raises
    ------
    Problem
        ``unsupported_media_type``, ``invalid_request``, ``no_files``, ``too_many_files``, or what
        :func:`read_body` raises.
    """
    kind = request.headers.get("content-type", OCTETS).partition(";")[0].strip().lower()
    if kind == MULTIPART:
        await read_body(request, limits)  # the parser reads it from memory, all at once
        return await parse_form(request, limits.files), False
    if kind.startswith("image/") or kind in FILE_TYPES:
        return [Upload(None, await read_body(request, limits))], True
    raise Problem(
        "unsupported_media_type",
        f"Expected {MULTIPART}, image/* or one of {', '.join(FILE_TYPES)} as Content-Type.",
    )


async def parse_form(request: Request, most: int) -> list[Upload]:
    """Return the files of a form's field ``files``.

    Parameters
    ----------
    request : Request
        Whose body was read.
    most : int
        Files of one request.

    Raises
    ------
    Problem
        ``invalid_request``: it is no form; ``no_files``; ``too_many_files``.
    """
    try:
        form = await _FormParser(request.headers, request.stream(), max_files=most).parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise too_many_files(most) from None
        raise Problem(
            "invalid_request", f"The body is no multipart form: {error.message}"
        ) from None
    if not (await request.body()).rstrip().endswith(b"--"):  # the parser drops what was cut off
        raise Problem("invalid_request", "The multipart form ends before its last boundary.")
    uploads = [
        Upload(clean_name(file.filename or ""), await file.read())
        for file in form.getlist(FILES_FIELD)
        if isinstance(file, UploadFile)
        if file.filename or file.size  # else a browser's form in which no file was chosen
    ]
    await form.close()
    if not uploads:
        raise Problem(
            "no_files", f"Expected one or more parts named `{FILES_FIELD}`, found none with a file."
        )
    return uploads


def clean_name(name: str) -> str:
    """Return the last part of a file's name, as text that can be shown."""
    text = name.replace("\\", "/").rpartition("/")[2]
    return "".join(c if c.isprintable() else "\ufffd" for c in text)[:MAX_NAME_CHARACTERS]


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
