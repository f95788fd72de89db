"""Bodies of the service's requests and answers, as OpenAPI describes them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from brainray.model.reasons import REASONS, Status
from brainray.serving.problem import PROBLEMS

Fraction = float
OutputName = Literal["probs", "predicted_class", "status", "reason"]
BASE64 = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"


class Body(BaseModel):
    """Knows every member of itself."""

    model_config = ConfigDict(extra="forbid")


class AnswerBody(Body):
    """The answer to one scan: classified, abstained, or rejected with a reason."""

    name: str | None = Field(description="File name as it came; null where there was none.")
    status: Status
    reason: Literal[tuple(REASONS)] | None = Field(  # type: ignore[valid-type]
        default=None, description="Why the scan has no class: a stable code."
    )
    detail: str | None = Field(default=None, description="The same in words, with what to do.")
    predicted_class: str | None = None
    confidence: Fraction | None = Field(
        default=None, ge=0, le=1, description="Of the most probable class, given or withheld."
    )
    probs: dict[str, Fraction] | None = Field(
        default=None, description="Probability of every class; null where it was rejected."
    )
    width_px: int | None = Field(default=None, ge=1)
    height_px: int | None = Field(default=None, ge=1)
    content_sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of the encoded bytes.")


class ExplainedBody(AnswerBody):
    """An answer, and where in the scan the network saw its class."""

    explained_class: str | None = Field(
        default=None, description="Class that the map is of: the most probable one."
    )
    heat_map_png: str | None = Field(default=None, description="PNG, base64.")


class AnswersBody(Body):
    """The answers of one request: one for each file, in order, all by one classifier."""

    request_id: str
    classifier_id: str
    classes: list[str]
    time_ms: float = Field(ge=0, description="From the headers of the request to its answer.")
    notice: str
    answers: list[AnswerBody]


class ExplainedAnswersBody(AnswersBody):
    """The same, with maps."""

    answers: list[ExplainedBody]  # type: ignore[assignment]


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
