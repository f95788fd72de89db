"""The Open Inference Protocol, version 2 [1]_, with its binary data extension [2]_.

The input ``image`` holds encoded images: in JSON each as base64; in binary data each as it is,
after its length in four little-endian bytes. Outputs are row for row what became of them.

References
----------
.. [1] github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md
.. [2] github.com/triton-inference-server/server, docs/protocol/extension_binary_data.md
"""

import base64
import binascii
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from pydantic import ValidationError

from brainray.serving.answer import Answer
from brainray.serving.handler import Answers, Upload
from brainray.serving.problem import Problem
from brainray.serving.schemas import InferenceRequest

MODEL_NAME = "brainray"
INPUT_NAME = "image"
LENGTH_HEADER = "inference-header-content-length"
EXTENSIONS = ("binary_tensor_data",)

OUTPUTS: dict[str, tuple[str, Callable[[Answer], str]]] = {
    "probs": ("FP32", lambda _: ""),
    "predicted_class": ("BYTES", lambda answer: answer.predicted_class or ""),
    "status": ("BYTES", lambda answer: answer.status),
    "reason": ("BYTES", lambda answer: answer.reason or ""),
}
"""Name to datatype and, for text, what it says; the probabilities of a rejected image are 0."""


@dataclass(frozen=True, slots=True)
class Inference:
    """A request, understood."""

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
    document, binary = _split(body, header_length)
    tensor = _find_input(document)
    if binary is None or "binary_data_size" not in (tensor.get("parameters") or {}):
        request = _validate(document)
        images = [_decode(text) for text in request.inputs[0].data]
    else:
        images = list(_read_bytes_tensor(binary, tensor["parameters"]["binary_data_size"]))
        request = _validate({**document, "inputs": [{**tensor, "data": [""]}]})
    if len(images) > most:
        raise Problem(
            "too_many_files",
            f"The request has {len(images)} images; at most {most} are taken. "
            "Send the others in further requests.",
        )
    default = bool((request.parameters or {}).get("binary_data_output", False))
    if request.outputs is None:
        wanted = dict.fromkeys(OUTPUTS, default)
    else:
        wanted = {
            output.name: bool((output.parameters or {}).get("binary_data", default))
            for output in request.outputs
        }
    return Inference(request.id, [Upload(None, image) for image in images], wanted)


def render_inference(inference: Inference, answered: Answers) -> tuple[bytes, int | None]:
    """Write an answer.

    Returns
    -------
    bytes
        The body.
    int or None
        Bytes of JSON before binary data; None without binary data.
    """
    count, classes = len(answered.answers), answered.meaning.classes
    probs = np.zeros((count, len(classes)), np.float32)
    for row, answer in enumerate(answered.answers):
        if answer.probs is not None:
            probs[row] = list(answer.probs.values())
    tensors: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for name, is_binary in inference.wanted.items():
        datatype, describe = OUTPUTS[name]
        texts = [describe(answer) for answer in answered.answers]
        tensor: dict[str, Any] = {
            "name": name,
            "datatype": datatype,
            "shape": [count, len(classes)] if name == "probs" else [count],
        }
        if is_binary:
            content = probs.astype("<f4").tobytes() if name == "probs" else _pack_texts(texts)
            tensor["parameters"] = {"binary_data_size": len(content)}
            binary.append(content)
        else:
            tensor["data"] = probs.ravel() if name == "probs" else texts
        tensors.append(tensor)
    document: dict[str, Any] = {
        "model_name": MODEL_NAME,
        "model_version": answered.meaning.classifier_id,
        "outputs": tensors,
        "parameters": {"classes": ",".join(classes)},
    }
    if inference.id is not None:
        document["id"] = inference.id
    header = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return header + b"".join(binary), len(header) if binary else None


def describe_model(classifier_id: str, classes: Sequence[str]) -> dict[str, Any]:
    """Return the model's metadata."""
    return {
        "name": MODEL_NAME,
        "versions": [classifier_id],
        "platform": "brainray",
        "inputs": [{"name": INPUT_NAME, "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {
                "name": name,
                "datatype": datatype,
                "shape": [-1, len(classes)] if name == "probs" else [-1],
            }
            for name, (datatype, _) in OUTPUTS.items()
        ],
        "parameters": {"classes": ",".join(classes)},
    }


def _split(body: bytes, header_length: str | None) -> tuple[dict[str, Any], bytes | None]:
    header, binary = body, None
    if header_length is not None:
        if not header_length.isascii() or not header_length.isdigit():
            raise _invalid(f"{LENGTH_HEADER} is not a number.")
        length = int(header_length)
        if length > len(body):
            raise _invalid(f"{LENGTH_HEADER} is {length}, more than the body's {len(body)} bytes.")
        header, binary = body[:length], body[length:]
    try:
        document = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"The body is not JSON: {error}.") from None
    if not isinstance(document, dict):
        raise _invalid("The body is not a JSON object.")
    return document, binary


def _find_input(document: dict[str, Any]) -> dict[str, Any]:
    """Return the only input, or an empty one where validation is to say what is wrong."""
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        return {}
    parameters = inputs[0].get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        return {}
    return inputs[0]


def _validate(document: dict[str, Any]) -> InferenceRequest:
    try:
        return InferenceRequest.model_validate(document, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise _invalid(f"{place}: {first['msg']}.") from None


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _invalid(f"An element of `{INPUT_NAME}` is not base64.") from None


def _read_bytes_tensor(binary: bytes, size: object) -> Sequence[bytes]:
    if not isinstance(size, int) or isinstance(size, bool) or size != len(binary):
        raise _invalid(f"binary_data_size is {size!r}, with {len(binary)} bytes of binary data.")
    images, place = [], 0
    while place < len(binary):
        if place + 4 > len(binary):
            raise _invalid("The binary data end within a length.")
        (length,) = struct.unpack_from("<I", binary, place)
        if place + 4 + length > len(binary):
            raise _invalid("The binary data end within an image.")
        images.append(binary[place + 4 : place + 4 + length])
        place += 4 + length
    if not images:
        raise _invalid("The binary data hold no image.")
    return images


def _pack_texts(texts: Sequence[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)


def _invalid(detail: str) -> Problem:
    return Problem("invalid_request", detail)
