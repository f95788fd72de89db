"""Bodies of the service's requests and answers, as OpenAPI describes them."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from brainray.images.slices import GreyRange, Plane
from brainray.model.reasons import REASONS, Status
from brainray.serving.problem import PROBLEMS, Problem

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Millimetres = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Cosine = Annotated[float, Field(ge=-1.01, le=1.01, allow_inf_nan=False)]
IdentifierHash = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Read = TypeVar("Read", bound=BaseModel)
MAX_SERIES_SLICES = 4096
"""Slices that are put together to series in one request."""
OutputName = Literal["probs", "predicted_class", "status", "reason"]
BASE64 = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"


class Body(BaseModel):
    """Knows every member of itself."""

    model_config = ConfigDict(extra="forbid")


class SliceBody(Body):
    """The answer to one slice: classified, abstained, or rejected with a reason."""

    frame: int | None = Field(
        default=None, ge=0, description="Number of the slice in its file; null if it has one slice."
    )
    status: Status
    reason: Literal[tuple(REASONS)] | None = Field(  # type: ignore[valid-type]
        default=None, description="Why the slice has no class: a stable code."
    )
    detail: str | None = Field(default=None, description="The same in words, with what to do.")
    predicted_class: str | None = None
    confidence: Fraction | None = Field(
        default=None, description="Of the most probable class, given or withheld."
    )
    probs: dict[str, Fraction] | None = Field(
        default=None, description="Probability of every class; null where it was rejected."
    )
    width_px: int | None = Field(default=None, ge=1)
    height_px: int | None = Field(default=None, ge=1)
    grey_range: GreyRange | None = Field(
        default=None, description="Where the grey range of the network's input came from."
    )
    plane: Plane | None = None
    position_mm: Millimetres | None = Field(
        default=None, description="Along the slice's normal: slices of a series are ordered by it."
    )
    orientation: Annotated[list[Cosine], Field(min_length=6, max_length=6)] | None = Field(
        default=None, description="Direction cosines of a row, then of a column."
    )
    flags: list[Annotated[str, Field(max_length=64)]] = Field(
        default=[], max_length=32, description="What is unknown or unusual, as docs/dicom.md lists."
    )


class AnswerBody(SliceBody):
    """The answer to one scan; that to a file with several slices has an answer for each."""

    name: str | None = Field(description="File name as it came; null where there was none.")
    status: Status | Literal["slices"] = Field(  # type: ignore[assignment]
        description="`slices` where the file has several: see there."
    )
    content_sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of the encoded bytes.")
    series: IdentifierHash | None = Field(
        default=None, description="Keyed hash of the series' identifier; null for pictures."
    )
    sop_instance: IdentifierHash | None = Field(
        default=None, description="Keyed hash of the DICOM object's identifier."
    )
    slices: list[SliceBody] | None = Field(
        default=None, description="In the order of the file, where it has several."
    )


class ExplainedBody(AnswerBody):
    """An answer, and where in the scan the network saw its class."""

    explained_class: str | None = Field(
        default=None, description="Class that the map is of: the most probable one."
    )
    heat_map_png: str | None = Field(default=None, description="PNG, base64.")


class SliceName(Body):
    """A slice of a request."""

    upload: int = Field(ge=0, description="Number of its file in `answers`, from 0.")
    frame: int | None = Field(ge=0, description="Number of the slice in that file, likewise.")


class SeriesBody(Body):
    """What the slices of a series say together, by the rule in docs/dicom.md.

    It is slice evidence: means of probabilities of slices, not calibrated for patients.
    """

    series: IdentifierHash
    answer: str = Field(description="A class, or `indeterminate`.")
    reason: str | None = Field(description="Why it is indeterminate.")
    evidence: dict[str, Fraction] = Field(
        description="Of each class: mean probability of the tenth of the slices that is strongest."
    )
    longest_run: dict[str, int] = Field(
        description="Of each class: neighbouring slices with a probability of 0.5 or more."
    )
    key_slices: list[SliceName] = Field(description="The strongest that are no neighbours.")
    num_slices: int = Field(ge=1)
    num_used: int = Field(ge=0)
    skipped: dict[str, int] = Field(description="Slices that are not used, by reason.")
    plane: Plane | None
    flags: list[str]


class ResponseBody(Body):
    """What every response to scans has."""

    request_id: str
    classifier_id: str
    classes: list[str]
    time_ms: float = Field(ge=0, description="From the headers of the request to its answer.")
    notice: str


class AnswersBody(ResponseBody):
    """The answers of one request: one for each file, in order, all by one classifier."""

    answers: list[AnswerBody]
    series: list[SeriesBody] = Field(description="Each series that the files belong to.")


class ExplainedAnswersBody(ResponseBody):
    """The same, with maps."""

    answers: list[ExplainedBody]


class AnsweredBody(Body):
    """Answers of earlier requests, to put their slices together to series."""

    answers: list[AnswerBody] = Field(min_length=1, max_length=MAX_SERIES_SLICES)


class SeriesAnswersBody(ResponseBody):
    """What the slices of several requests say together."""

    series: list[SeriesBody]


class PictureBody(Body):
    """One slice as a picture, or why there is none."""

    upload: int = Field(ge=0, description="Number of its file in the request, from 0.")
    frame: int | None = Field(ge=0, description="Number of the slice in its file.")
    png: str | None = Field(default=None, description="8-bit grey PNG, base64.")
    reason: Literal[tuple(REASONS)] | None = None  # type: ignore[valid-type]
    detail: str | None = None


class PicturesBody(Body):
    """The slices of one request as pictures."""

    request_id: str
    pictures: list[PictureBody]


class ModelBody(Body):
    """What answers, what it was measured to do, and what it is for."""

    classifier_id: str
    classes: list[str]
    preprocessing: dict[str, Any]
    metrics: dict[str, Any] | None = Field(
        description="Scores with 95 % intervals, as training or evaluation wrote them."
    )
    runtime: dict[str, str]
    intended_use: str
    not_intended_for: str
    model_card: dict[str, Any] | None = Field(
        description="What the training run knew of it; null for a bundle without a card."
    )
    limits: dict[str, float]
    rejection_reasons: dict[str, str]
    notice: str


class HealthBody(Body):
    """A process that answers."""

    status: Literal["ok"]


class ProblemBody(BaseModel):
    """A refusal, as RFC 9457 has it."""

    type: str
    title: str
    status: int = Field(ge=400, le=599)
    detail: str
    code: Literal[tuple(PROBLEMS)] = Field(description="Stable.")  # type: ignore[valid-type]
    request_id: str


class ServerBody(Body):
    """The server, in the terms of the Open Inference Protocol."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(Body):
    """A tensor of the model; -1 is any length."""

    name: str
    datatype: Literal["BYTES", "FP32"]
    shape: list[int]


class ModelMetadata(Body):
    """The model, in the terms of the Open Inference Protocol."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, Any] | None = None


class RequestedOutput(BaseModel):
    """An output that is wanted."""

    name: OutputName
    parameters: dict[str, Any] | None = None


class BaseTensor(BaseModel):
    """The one input, without its images."""

    name: Literal["image"]
    datatype: Literal["BYTES"]
    shape: list[int] = Field(description="[N]; what counts is how many images there are.")
    parameters: dict[str, Any] | None = None


class InputTensor(BaseTensor):
    """Encoded images, each base64."""

    data: list[Annotated[str, Field(pattern=BASE64)]] = Field(
        min_length=1, description="N images: PNG, JPEG, …, base64."
    )


class BinarySize(BaseModel):
    """Where the images of a tensor are: behind the JSON."""

    binary_data_size: int


class BinaryTensor(BaseTensor):
    """Encoded images that follow the JSON as they are."""

    parameters: BinarySize  # type: ignore[assignment]


class BaseRequest(BaseModel):
    """A request, without its input."""

    id: str | None = None
    outputs: list[RequestedOutput] | None = None
    parameters: dict[str, Any] | None = None


class InferenceRequest(BaseRequest):
    """A request of the Open Inference Protocol."""

    inputs: list[InputTensor] = Field(min_length=1, max_length=1)


class BinaryRequest(BaseRequest):
    """A request of the Open Inference Protocol whose images follow the JSON."""

    inputs: list[BinaryTensor] = Field(min_length=1, max_length=1)


class OutputTensor(Body):
    """Numbers, or strings; row for row as the images came."""

    name: OutputName
    datatype: Literal["BYTES", "FP32"]
    shape: list[int]
    data: list[float] | list[str] | None = None
    parameters: dict[str, Any] | None = None


class InferenceResponse(Body):
    """An answer of the Open Inference Protocol."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]
    parameters: dict[str, Any] | None = None


def read_json(kind: type[Read], content: bytes) -> Read:
    """Read a body of JSON.

    Raises
    ------
    Problem
        ``invalid_request``: it is none of that kind.
    """
    try:
        return kind.model_validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        location = ".".join(map(str, first["loc"])) or "The body is not JSON"
        raise Problem("invalid_request", f"{location}: {first['msg']}.") from None
