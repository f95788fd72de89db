"""Bodies of the service's requests and answers, as OpenAPI describes them."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from brainray.images.slices import GreyRange, Plane
from brainray.model.reasons import REASONS, Status
from brainray.serving.problem import PROBLEMS, Problem

MAX_SERIES_SLICES = 4096
"""Slices of one request to ``/v1/series``."""
MAX_POSITION_MM, MAX_COSINE = 1e6, 1.01
"""Larger values in a header are not positions or direction cosines."""
BASE64 = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Millimetres = Annotated[float, Field(ge=-MAX_POSITION_MM, le=MAX_POSITION_MM, allow_inf_nan=False)]
Cosine = Annotated[float, Field(ge=-MAX_COSINE, le=MAX_COSINE, allow_inf_nan=False)]
IdentifierHash = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


def _read_integer(value: Any) -> Any:  # noqa: ANN401 - of a JSON document
    """Take 5.0 for 5: JSON Schema calls it an integer, pydantic's strict mode does not."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_read_integer)]
Index = Annotated[int, Field(ge=0), BeforeValidator(_read_integer)]
Pixels = Annotated[int, Field(ge=1), BeforeValidator(_read_integer)]
OutputName = Literal["probs", "predicted_class", "status", "reason"]
Model = TypeVar("Model", bound=BaseModel)


class Body(BaseModel):
    """A body that refuses unknown members."""

    model_config = ConfigDict(extra="forbid")


# ---- answers -------------------------------------------------------------------------------------


class SliceBody(Body):
    """The answer to one slice: classified, abstained, or rejected with a reason."""

    frame: Index | None = Field(
        default=None, description="Number of the slice in its file; null if it has one slice."
    )
    status: Status
    reason: Literal[tuple(REASONS)] | None = Field(  # type: ignore[valid-type]
        default=None, description="Stable code of why the slice has no class."
    )
    detail: str | None = Field(default=None, description="The reason in a sentence.")
    predicted_class: str | None = None
    confidence: Fraction | None = Field(
        default=None, description="Probability of the most probable class, also where it abstained."
    )
    probs: dict[str, Fraction] | None = Field(
        default=None, description="Probability of each class; null if the slice was rejected."
    )
    width_px: Pixels | None = None
    height_px: Pixels | None = None
    grey_range: GreyRange | None = Field(
        default=None, description="Where the grey range of the network's input came from."
    )
    plane: Plane | None = None
    position_mm: Millimetres | None = Field(
        default=None, description="Position along the slice's normal, which orders a series."
    )
    orientation: Annotated[list[Cosine], Field(min_length=6, max_length=6)] | None = Field(
        default=None, description="Direction cosines of a row, then of a column."
    )
    flags: list[Annotated[str, Field(max_length=64)]] = Field(
        default=[], max_length=32, description="Unknown or unusual properties; see docs/dicom.md."
    )


class AnswerBody(SliceBody):
    """The answer to one file, with an answer for each slice if it has several."""

    name: str | None = Field(description="File name that the client gave.")
    status: Status | Literal["slices"] = Field(  # type: ignore[assignment]
        description="`slices` if the file has several slices."
    )
    content_sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of the encoded bytes.")
    series: IdentifierHash | None = Field(
        default=None, description="Keyed hash of the series' identifier; null for pictures."
    )
    sop_instance: IdentifierHash | None = Field(
        default=None, description="Keyed hash of the DICOM object's identifier."
    )
    slices: list[SliceBody] | None = Field(
        default=None, description="In the order of the file, if it has several slices."
    )


class ExplainedBody(AnswerBody):
    """An answer with a heat map of the evidence for its most probable class."""

    explained_class: str | None = Field(default=None, description="Class of the heat map.")
    heat_map_png: str | None = Field(default=None, description="PNG, base64.")


class PictureBody(Body):
    """One slice as a picture, or the reason why there is none."""

    upload: int = Field(ge=0, description="Number of the file in the request, from 0.")
    frame: int | None = Field(ge=0, description="Number of the slice in its file.")
    png: str | None = Field(default=None, description="8-bit grey PNG, base64.")
    reason: Literal[tuple(REASONS)] | None = None  # type: ignore[valid-type]
    detail: str | None = None


class SliceName(Body):
    """A slice of a request."""

    upload: int = Field(ge=0, description="Number of its file in `answers`, from 0.")
    frame: int | None = Field(ge=0, description="Number of the slice in that file, from 0.")


class SeriesBody(Body):
    """The summary of a series' slices, by the rule in docs/dicom.md.

    It is slice evidence: means of slice probabilities, not calibrated for patients.
    """

    series: IdentifierHash
    answer: str = Field(description="A class, or `indeterminate`.")
    reason: str | None = Field(description="Why it is indeterminate.")
    evidence: dict[str, Fraction] = Field(
        description="For each class: mean probability of the tenth of the slices that is strongest."
    )
    longest_run: dict[str, int] = Field(
        description="For each class: neighbouring slices with a probability of 0.5 or more."
    )
    key_slices: list[SliceName] = Field(
        description="The strongest slices that are not neighbours of each other."
    )
    num_slices: int = Field(ge=1)
    num_used: int = Field(ge=0)
    skipped: dict[str, int] = Field(description="Number of slices not used, by reason.")
    plane: Plane | None
    flags: list[str]


# ---- responses -----------------------------------------------------------------------------------


class ResponseBody(Body):
    """Members of every response to scans."""

    request_id: str
    classifier_id: str
    classes: list[str]
    time_ms: float = Field(ge=0, description="From the request's headers to its answer.")
    notice: str


class AnswersBody(ResponseBody):
    """One answer for each file, in order, all by one classifier."""

    answers: list[AnswerBody]  # of an ExplainedBody only these members are sent
    series: list[SeriesBody] = Field(description="One summary for each series among the files.")


class ExplainedAnswersBody(ResponseBody):
    """One explained answer for each file."""

    answers: list[ExplainedBody]


class SeriesAnswersBody(ResponseBody):
    """One summary for each series among the answers."""

    series: list[SeriesBody]


class PicturesBody(ResponseBody):
    """The slices of a request as pictures."""

    pictures: list[PictureBody]


class ModelBody(Body):
    """The classifier, its scores, its intended use, and the limits of requests."""

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
        description="The training run's model card; null if the bundle has none."
    )
    limits: dict[str, float]
    rejection_reasons: dict[str, str]
    notice: str


class HealthBody(Body):
    """The process answers."""

    status: Literal["ok"]


class ProblemBody(BaseModel):
    """A refusal (RFC 9457)."""

    type: str
    title: str
    status: int = Field(ge=400, le=599)
    detail: str
    code: Literal[tuple(PROBLEMS)] = Field(description="Stable.")  # type: ignore[valid-type]
    request_id: str


# ---- requests ------------------------------------------------------------------------------------


class AnsweredBody(Body):
    """Answers of earlier requests, whose slices are to be summarised by series."""

    answers: list[AnswerBody] = Field(min_length=1, max_length=MAX_SERIES_SLICES)


class InputTensor(BaseModel):
    """Encoded images, as base64 in ``data`` or as binary data after the JSON."""

    name: Literal["image"]
    datatype: Literal["BYTES"]
    shape: list[Integer] = Field(description="[N]; not used: the images are counted.")
    data: list[Annotated[str, Field(pattern=BASE64)]] = Field(
        default=[], min_length=1, description="N images: PNG, JPEG, …, base64."
    )
    parameters: dict[str, Any] | None = None


class RequestedOutput(BaseModel):
    """An output that the client wants."""

    name: OutputName
    parameters: dict[str, Any] | None = None


class InferenceRequest(BaseModel):
    """A request of the Open Inference Protocol."""

    id: str | None = None
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: list[RequestedOutput] | None = None
    parameters: dict[str, Any] | None = None


def read_json(model: type[Model], content: bytes) -> Model:
    """Parse and validate a JSON body."""
    try:
        return model.model_validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        location = ".".join(map(str, first["loc"])) or "The body is not JSON"
        raise Problem("invalid_request", f"{location}: {first['msg']}.") from None
