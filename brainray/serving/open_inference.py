"""The Open Inference Protocol, version 2 [1]_, with its binary data extension [2]_.

The input ``image`` holds encoded images: in JSON each as base64; in binary data each after its
length in four little-endian bytes. Outputs have one row for each image, in order.

References
----------
.. [1] github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md
.. [2] github.com/triton-inference-server/server, docs/protocol/extension_binary_data.md
"""

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from brainray.serving.problem import LENGTH, Problem
from brainray.serving.schemas import AnswerBody, InferenceRequest, read_json
from brainray.serving.uploads import Upload

MODEL_NAME = "brainray"
LENGTH_HEADER = "inference-header-content-length"
EXTENSIONS = ["binary_tensor_data"]
OUTPUTS = {"probs": "FP32", "predicted_class": "BYTES", "status": "BYTES", "reason": "BYTES"}
"""Name to datatype. A rejected image has probabilities of 0; missing texts are empty."""


@dataclass(frozen=True, slots=True)
class Inference:
    """A parsed request."""

    id: str | None
    uploads: list[Upload]
    outputs: dict[str, bool]
    """Name of each requested output, and whether it is sent as binary data."""


def read_inference(body: bytes, header_length: str | None) -> Inference:
    """Parse a request; ``header_length`` is the header that binary data need."""
    length = len(body)
    if header_length is not None:
        if not LENGTH.fullmatch(header_length) or int(header_length) > length:
            raise _invalid(f"Expected {LENGTH_HEADER} to be a number up to {length}.")
        length = int(header_length)
    request, binary = read_json(InferenceRequest, body[:length]), body[length:]
    (tensor,) = request.inputs
    size = (tensor.parameters or {}).get("binary_data_size")
    if size is None and not binary:
        images = [base64.b64decode(text) for text in tensor.data]
    elif size == len(binary):
        images = _unpack(binary)
    else:
        raise _invalid(f"binary_data_size is {size}; {len(binary)} bytes follow the JSON.")
    if not images:
        raise _invalid("The input `image` has no images.")
    default = bool((request.parameters or {}).get("binary_data_output", False))
    outputs = dict.fromkeys(OUTPUTS, default)
    if request.outputs is not None:
        outputs = {
            output.name: bool((output.parameters or {}).get("binary_data", default))
            for output in request.outputs
        }
    return Inference(request.id, [Upload(None, image) for image in images], outputs)


def render_inference(
    inference: Inference, answers: Sequence[AnswerBody], classes: Sequence[str], classifier_id: str
) -> tuple[bytes, int | None]:
    """Render the response.

    Returns
    -------
    bytes
        The body.
    int or None
        Bytes of JSON before the binary data; None if there are no binary data.
    """
    zeros = dict.fromkeys(classes, 0.0)
    probs = np.array([list((answer.probs or zeros).values()) for answer in answers], "<f4")
    tensors: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for name, is_binary in inference.outputs.items():
        tensor: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name], "shape": [len(answers)]}
        data: Any
        if name == "probs":
            tensor["shape"] = list(probs.shape)
            data, packed = probs.ravel(), probs.tobytes()
        else:
            data = [getattr(answer, name) or "" for answer in answers]
            packed = _pack(data)
        if is_binary:
            tensor["parameters"] = {"binary_data_size": len(packed)}
            binary.append(packed)
        else:
            tensor["data"] = data
        tensors.append(tensor)
    document = {
        "model_name": MODEL_NAME,
        "model_version": classifier_id,
        **({} if inference.id is None else {"id": inference.id}),
        "outputs": tensors,
        "parameters": {"classes": ",".join(classes)},
    }
    header = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return header + b"".join(binary), len(header) if binary else None


def describe_model(classes: Sequence[str], classifier_id: str) -> dict[str, Any]:
    """Return the model's metadata."""
    shapes = {"probs": [-1, len(classes)]}
    return {
        "name": MODEL_NAME,
        "versions": [classifier_id],
        "platform": "brainray",
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": name, "datatype": datatype, "shape": shapes.get(name, [-1])}
            for name, datatype in OUTPUTS.items()
        ],
        "parameters": {"classes": ",".join(classes)},
    }


def _unpack(binary: bytes) -> list[bytes]:
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


def _pack(texts: Sequence[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(struct.pack("<I", len(one)) + one for one in encoded)


def _invalid(detail: str) -> Problem:
    return Problem("invalid_request", detail)
