"""The Open Inference Protocol, version 2 [1]_, with its binary data extension [2]_.

The input ``image`` holds encoded images: in JSON each as base64; in binary data each as it is,
after its length in four little-endian bytes. Outputs have one row for each image, in order.

References
----------
.. [1] github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md
.. [2] github.com/triton-inference-server/server, docs/protocol/extension_binary_data.md
"""

import base64
import binascii
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from brainray.serving.pipeline import Pipeline
from brainray.serving.problem import Problem
from brainray.serving.schemas import (
    AnswerBody,
    BaseRequest,
    BinaryRequest,
    InferenceRequest,
    read_json,
)
from brainray.serving.uploads import Upload, too_many_files

MODEL_NAME = "brainray"
LENGTH_HEADER = "inference-header-content-length"
EXTENSIONS = ["binary_tensor_data"]
OUTPUTS = {"probs": "FP32", "predicted_class": "BYTES", "status": "BYTES", "reason": "BYTES"}
"""Name to datatype. The probabilities of a rejected image are 0, and texts it lacks are empty."""


@dataclass(frozen=True, slots=True)
class Inference:
    """A request that was understood."""

    id: str | None
    uploads: list[Upload]
    wanted: dict[str, bool]
    """Name of each output wanted, and whether as binary data."""


def read_inference(body: bytes, header_length: str | None, *, most: int) -> Inference:
    """Read a request.

    Parameters
    ----------
    header_length : str, optional
        The header ``Inference-Header-Content-Length``: bytes of JSON before the binary data.
    most : int
        Images of one request.

    Raises
    ------
    Problem
        ``invalid_request``, ``too_many_files``.
    """
    header, binary = _split(body, header_length)
    request: BaseRequest
    if binary:
        request = packed = read_json(BinaryRequest, header)
        images = _unpack(binary, packed.inputs[0].parameters.binary_data_size)
    else:
        request = plain = read_json(InferenceRequest, header)
        if "binary_data_size" in (plain.inputs[0].parameters or {}):
            raise _invalid("There are no binary data, and binary_data_size promises some.")
        images = [_decode(text) for text in plain.inputs[0].data]
    if len(images) > most:
        raise too_many_files(most)
    default = bool((request.parameters or {}).get("binary_data_output", False))
    wanted: dict[str, bool] = {
        output.name: bool((output.parameters or {}).get("binary_data", default))
        for output in request.outputs or ()
    }
    if request.outputs is None:
        wanted = dict.fromkeys(OUTPUTS, default)
    return Inference(request.id, [Upload(None, image) for image in images], wanted)


def render_inference(
    inference: Inference, pipeline: Pipeline, answers: Sequence[AnswerBody]
) -> tuple[bytes, int | None]:
    """Write an answer.

    Returns
    -------
    bytes
        The body.
    int or None
        Bytes of JSON before binary data; None without binary data.
    """
    count, classes = len(answers), pipeline.classes
    none = dict.fromkeys(classes, 0.0)
    probs = np.array([list((a.probs or none).values()) for a in answers], "<f4")
    tensors: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for name, is_binary in inference.wanted.items():
        texts = [] if name == "probs" else [getattr(a, name) or "" for a in answers]
        shape = [count, len(classes)] if name == "probs" else [count]
        tensor: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name], "shape": shape}
        if is_binary:
            binary.append(probs.tobytes() if name == "probs" else _pack(t.encode() for t in texts))
            tensor["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            tensor["data"] = probs.ravel() if name == "probs" else texts
        tensors.append(tensor)
    document = {
        "model_name": MODEL_NAME,
        "model_version": pipeline.classifier_id,
        **({} if inference.id is None else {"id": inference.id}),
        "outputs": tensors,
        "parameters": {"classes": ",".join(classes)},
    }
    header = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return header + b"".join(binary), len(header) if binary else None


def describe_model(pipeline: Pipeline) -> dict[str, Any]:
    """Return the model's metadata."""
    num_classes = len(pipeline.classes)
    return {
        "name": MODEL_NAME,
        "versions": [pipeline.classifier_id],
        "platform": "brainray",
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": name, "datatype": kind, "shape": [-1, num_classes][: 1 + (name == "probs")]}
            for name, kind in OUTPUTS.items()
        ],
        "parameters": {"classes": ",".join(pipeline.classes)},
    }


def _split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    if header_length is None:
        return body, b""
    if not header_length.isascii() or not header_length.isdigit():
        raise _invalid(f"{LENGTH_HEADER} is not a number.")
    length = int(header_length)
    if length > len(body):
        raise _invalid(f"{LENGTH_HEADER} is {length}, more than the body's {len(body)} bytes.")
    return body[:length], body[length:]


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _invalid("An element of `image` is not base64.") from None


def _unpack(binary: bytes, size: int) -> list[bytes]:
    if size != len(binary):
        raise _invalid(f"binary_data_size is {size}, with {len(binary)} bytes of binary data.")
    images, start = [], 0
    while start < len(binary):
        if start + 4 > len(binary):
            raise _invalid("The binary data end within a length.")
        (length,) = struct.unpack_from("<I", binary, start)
        start += 4 + length
        if start > len(binary):
            raise _invalid("The binary data end within an image.")
        images.append(binary[start - length : start])
    return images


def _pack(texts: Iterable[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def _invalid(detail: str) -> Problem:
    return Problem("invalid_request", detail)
