"""The files of a request: its body, or the files of a form."""

import sys
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from brainray.serving.options import ServiceLimits
from brainray.serving.problem import CLOSE, Problem, limit_time

FILES_FIELD = "files"
MULTIPART, OCTETS = "multipart/form-data", "application/octet-stream"
FILE_TYPES = (OCTETS, "application/dicom", "application/gzip", "application/x-gzip")
"""Types of a body that is one file, beside ``image/*``. The file's bytes determine its format."""
MAX_NAME_CHARACTERS = 255


@dataclass(frozen=True, slots=True)
class Upload:
    """One file of a request."""

    name: str | None
    content: bytes


class _FormParser(MultiPartParser):
    spool_max_size = sys.maxsize
    """Keeps files in memory: scans of patients are not written to a disk."""


async def read_body(request: Request, limits: ServiceLimits) -> bytes:
    """Read the whole body in bounded time."""
    async with limit_time(limits.body_s, "body_too_slow", "The body did not arrive", CLOSE):
        return await request.body()


async def read_uploads(request: Request, limits: ServiceLimits) -> tuple[list[Upload], bool]:
    """Read the files of a request; return also whether the body itself is the file."""
    kind = request.headers.get("content-type", OCTETS).partition(";")[0].strip().lower()
    if kind == MULTIPART:
        await read_body(request, limits)  # the parser then reads it from memory
        return await _parse_form(request, limits.files), False
    if kind.startswith("image/") or kind in FILE_TYPES:
        return [Upload(None, await read_body(request, limits))], True
    raise Problem(
        "unsupported_media_type",
        f"Expected {MULTIPART}, image/* or one of {', '.join(FILE_TYPES)} as Content-Type.",
    )


async def _parse_form(request: Request, max_files: int) -> list[Upload]:
    try:
        form = await _FormParser(request.headers, request.stream(), max_files=max_files).parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise too_many_files(max_files) from None
        detail = f"The body is not a multipart form: {error.message}"
        raise Problem("invalid_request", detail) from None
    if not (await request.body()).rstrip().endswith(b"--"):  # the parser accepts a cut-off form
        raise Problem("invalid_request", "The multipart form ends before its last boundary.")
    uploads = [
        Upload(_clean_name(file.filename or ""), await file.read())
        for file in form.getlist(FILES_FIELD)
        if isinstance(file, UploadFile)
        if file.filename or file.size  # a browser sends an empty part if no file was chosen
    ]
    await form.close()
    if not uploads:
        detail = f"Expected one or more parts named `{FILES_FIELD}` with a file, found none."
        raise Problem("no_files", detail)
    return uploads


def _clean_name(name: str) -> str:
    """Return the last part of a file's path, without unprintable characters."""
    text = name.replace("\\", "/").rpartition("/")[2]
    return "".join(c if c.isprintable() else "\ufffd" for c in text)[:MAX_NAME_CHARACTERS]


def too_many_files(limit: int) -> Problem:
    """Build the refusal of a request with more files than the limit."""
    return Problem(
        "too_many_files",
        f"The request has more than {limit} files. Send the others in further requests.",
    )
