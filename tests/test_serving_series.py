"""DICOM and NIfTI over HTTP, without Ray: files with several slices, and their series."""

import base64
import gzip
import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from numpy.typing import NDArray
from PIL import Image
from pydicom.data import get_testdata_file

from brainray.images.dicom import open_dicom
from brainray.images.dicom_pixels import render_frame
from brainray.images.slices import open_file, open_slice
from brainray.inference.series import SeriesRule
from brainray.model.classifier import load_classifier
from brainray.phantoms import draw_phantom
from brainray.serving.options import ServiceLimits
from brainray.serving.predictor import Predictor
from brainray.serving.schemas import AnswersBody, ExplainedAnswersBody, PicturesBody
from tests.dicom_files import make_mr
from tests.identities import find_tokens, make_objects
from tests.reference import predict_eager
from tests.service import LocalPredictor, build_test_app, open_predictor
from tests.test_serving_app import INFER, check_problem, send

DICOM = {"content-type": "application/dicom"}
NUM_SLICES = 12
SIDE_PX = 64


@pytest.fixture(scope="module")
def predictor(tiny_classifier: Path) -> Predictor:
    return open_predictor(tiny_classifier)


@pytest.fixture
def model(predictor: Predictor) -> LocalPredictor:
    return LocalPredictor(predictor)


@pytest.fixture(scope="module")
def planes() -> NDArray[np.uint16]:
    """Draw 12-bit slices, shape (NUM_SLICES, SIDE_PX, SIDE_PX)."""
    rng = np.random.default_rng(5)
    names = ("glioma", "notumor")
    drawn = [draw_phantom(names[number % 2], rng) for number in range(NUM_SLICES)]
    shrunk = [np.asarray(Image.fromarray(one).resize((SIDE_PX, SIDE_PX))) for one in drawn]
    return np.stack(shrunk).astype(np.uint16) * 16


@pytest.fixture(scope="module")
def series(planes: NDArray[np.uint16]) -> list[bytes]:
    """Make a series of classic MR files."""
    return [
        make_mr(
            pixels,
            SOPInstanceUID=f"1.2.3.{number}",
            ImagePositionPatient=[-100, -90, 5.0 * number],
            WindowCenter=1500 + 10 * number,
            WindowWidth=2000,
        )
        for number, pixels in enumerate(planes)
    ]


@pytest.fixture(scope="module")
def enhanced() -> bytes:
    """Return an enhanced MR object of pydicom-data, a head in ten frames."""
    return Path(str(get_testdata_file("emri_small.dcm"))).read_bytes()


@pytest.fixture(scope="module")
def volume(planes: NDArray[np.uint16]) -> bytes:
    """Make a volume whose lowest two slices are empty."""
    voxels = np.concatenate([np.zeros_like(planes[:2]), planes]).transpose(2, 1, 0)
    image = nib.Nifti1Image(voxels.astype(np.int16), np.diag([1.0, 1.0, 3.0, 1.0]))
    return gzip.compress(image.to_bytes())


def post_files(app: Any, path: str, *files: bytes) -> Any:  # noqa: ANN401
    form = [("files", (f"{number}.bin", content)) for number, content in enumerate(files)]
    return send(app, "POST", path, files=form)


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["application/dicom", "application/octet-stream", "image/png"])
def test_a_dicom_object_as_the_body_gets_the_prediction_of_the_engine(
    model: LocalPredictor, tiny_classifier: Path, series: list[bytes], kind: str
) -> None:
    headers = {"content-type": kind}
    answer = send(build_test_app(model), "POST", "/v1/classify", content=series[3], headers=headers)
    assert answer.status_code == 200, answer.text
    body = AnswersBody.model_validate(answer.json())
    (one,) = body.answers
    assert (one.status, one.slices, one.frame) == ("classified", None, None)
    assert (one.plane, one.position_mm, one.grey_range) == ("axial", 15.0, "window")
    assert (one.width_px, one.height_px) == (SIDE_PX, SIDE_PX)
    classifier = load_classifier(str(tiny_classifier))
    image = open_slice(open_file(series[3]), 0, classifier.preprocessing).scan.image
    assert one.probs is not None
    expected = predict_eager(classifier, image[None])[0]
    np.testing.assert_allclose(list(one.probs.values()), expected, atol=1e-5)
    (summary,) = body.series
    assert (summary.answer, summary.reason) == ("indeterminate", "too_few_slices")


def test_every_frame_of_an_enhanced_object_is_classified(
    model: LocalPredictor, enhanced: bytes
) -> None:
    answer = send(build_test_app(model), "POST", "/v1/classify", content=enhanced, headers=DICOM)
    assert answer.status_code == 200, answer.text
    body = AnswersBody.model_validate(answer.json())
    (one,) = body.answers
    assert (one.status, one.predicted_class, one.probs) == ("slices", None, None)
    assert one.slices is not None
    assert [found.frame for found in one.slices] == list(range(10))
    assert {found.status for found in one.slices} == {"classified"}
    assert {found.position_mm for found in one.slices} == {None}, "its header gives no positions"
    assert "orientation_unknown" in one.slices[0].flags
    (summary,) = body.series
    assert (summary.series, summary.num_slices, summary.num_used) == (one.series, 10, 10)
    assert sum(model.calls) == 10
    assert len(model.calls) < 10, "slices are predicted together"


@pytest.mark.parametrize("unpack", [gzip.decompress, bytes], ids=["nii", "nii.gz"])
def test_every_slice_of_a_volume_has_its_own_answer(
    model: LocalPredictor, volume: bytes, unpack: Callable[[bytes], bytes]
) -> None:
    headers = {"content-type": "application/gzip"}  # the bytes determine the format, not this
    app = build_test_app(model)
    answer = send(app, "POST", "/v1/classify", content=unpack(volume), headers=headers)
    assert answer.status_code == 200, answer.text
    body = AnswersBody.model_validate(answer.json())
    slices = body.answers[0].slices
    assert slices is not None
    assert [one.reason for one in slices[:3]] == ["little_tissue", "little_tissue", None]
    assert [one.position_mm for one in slices[:3]] == [0, 3, 6]
    (summary,) = body.series
    assert (summary.num_used, summary.skipped) == (NUM_SLICES, {"little_tissue": 2})
    assert all(key.upload == 0 and key.frame in range(2, 14) for key in summary.key_slices)


def test_the_slices_of_a_request_are_summarised_by_series(
    model: LocalPredictor, series: list[bytes], volume: bytes, phantom_folder: Path
) -> None:
    picture = next((phantom_folder / "Testing" / "glioma").iterdir()).read_bytes()
    report = Path(str(get_testdata_file("test-SR.dcm"))).read_bytes()
    other = make_mr(SeriesInstanceUID="1.2.3.99")
    files = [picture, *series[::-1], report, volume, b"text", other, series[0]]
    answer = post_files(build_test_app(model), "/v1/classify", *files)
    assert answer.status_code == 200, answer.text
    body = AnswersBody.model_validate(answer.json())
    assert [one.name for one in body.answers] == [f"{n}.bin" for n in range(len(files))]
    rejected = {n: one.reason for n, one in enumerate(body.answers) if one.status == "rejected"}
    assert rejected == {13: "not_an_image_object", 15: "not_an_image"}
    assert body.answers[0].series is None
    first, second, third = body.series
    assert [first.num_slices, second.num_slices, third.num_slices] == [13, 14, 1]
    assert first.skipped == {"duplicate": 1}
    members = [one for one in body.answers[1:13] if one.series == first.series]
    assert len(members) == NUM_SLICES
    probs = np.array([list((one.probs or {}).values()) for one in members])
    strongest = np.sort(probs, axis=0)[-2:].mean(0)  # a tenth of twelve
    np.testing.assert_allclose(list(first.evidence.values()), strongest, atol=1e-6)
    assert {body.answers[key.upload].series for key in first.key_slices} == {first.series}
    assert {key.upload for key in second.key_slices} == {14}


def test_answers_of_several_requests_are_summarised_by_series(
    model: LocalPredictor, series: list[bytes]
) -> None:
    app = build_test_app(model)
    (whole,) = post_files(app, "/v1/classify", *series).json()["series"]
    parts = [post_files(app, "/v1/classify", *series[start::3]).json() for start in range(3)]
    assert [part["series"][0]["num_used"] for part in parts] == [4, 4, 4]
    answers = [one for part in parts for one in part["answers"]]
    answer = send(app, "POST", "/v1/series", json={"answers": answers})
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["series"]
    for name in ("series", "answer", "reason", "num_used", "skipped", "plane", "flags"):
        assert found[name] == whole[name]
    assert found["evidence"] == pytest.approx(whole["evidence"], abs=1e-5)
    as_floats = [{**one, "frame": 0.0, "width_px": float(one["width_px"])} for one in answers]
    assert send(app, "POST", "/v1/series", json={"answers": as_floats}).status_code == 200
    (reversed_order,) = send(app, "POST", "/v1/series", json={"answers": answers[::-1]}).json()[
        "series"
    ]
    last = len(answers) - 1
    assert [last - key["upload"] for key in reversed_order["key_slices"]] == [
        key["upload"] for key in found["key_slices"]
    ]


def test_only_valid_answers_of_this_service_are_summarised(
    model: LocalPredictor, series: list[bytes]
) -> None:
    app = build_test_app(model)
    (one,) = post_files(app, "/v1/classify", series[0]).json()["answers"]
    for change, code in (
        ({"probs": {"cat": 1.0}}, "invalid_request"),
        ({"probs": {**one["probs"], "glioma": 2.0}}, "invalid_request"),
        ({"position_mm": 1e300}, "invalid_request"),
        ({"series": "Smith"}, "invalid_request"),
        ({"slices": [{"status": "rejected"}] * 5000}, "too_many_slices"),
    ):
        answer = send(app, "POST", "/v1/series", json={"answers": [{**one, **change}]})
        check_problem(answer, {"invalid_request": 400}.get(code, 422), code)


def test_responses_match_the_openapi_document(
    model: LocalPredictor, series: list[bytes], enhanced: bytes
) -> None:
    app = build_test_app(model)
    document = send(app, "GET", "/openapi.json").json()
    answers = post_files(app, "/v1/classify", *series[:2], enhanced, b"no")
    request = {"answers": answers.json()["answers"]}
    for path, answer in (
        ("/v1/classify", answers),
        ("/v1/series", send(app, "POST", "/v1/series", json=request)),
        ("/v1/render", post_files(app, "/v1/render", series[0], b"no")),
    ):
        described = document["paths"][path]["post"]["responses"]["200"]["content"]
        schema = described["application/json"]["schema"] | {"components": document["components"]}
        Draft202012Validator(schema).validate(answer.json())


def test_the_description_of_the_evidence_matches_the_rule(model: LocalPredictor) -> None:
    document = send(build_test_app(model), "GET", "/openapi.json").json()
    members = document["components"]["schemas"]["SeriesBody"]["properties"]
    assert asdict(SeriesRule())["top_fraction"] == 0.1
    assert "tenth" in members["evidence"]["description"]
    assert str(SeriesRule().threshold) in members["longest_run"]["description"]


# ---- limits --------------------------------------------------------------------------------------


def test_too_many_slices_are_refused_before_they_are_decoded(
    model: LocalPredictor, series: list[bytes], enhanced: bytes
) -> None:
    app = build_test_app(model, ServiceLimits(slices=9))
    answer = send(app, "POST", "/v1/classify", content=enhanced, headers=DICOM)
    check_problem(answer, 422, "too_many_slices")
    assert not model.calls
    answer = post_files(app, "/v1/classify", *series[:10])
    check_problem(answer, 422, "too_many_slices")
    assert post_files(app, "/v1/classify", *series[:9]).status_code == 200
    answer = send(app, "POST", "/v1/explain?frame=7", content=enhanced, headers=DICOM)
    assert answer.status_code == 200, "one of the ten slices was requested"


def test_a_request_has_a_bounded_share_of_the_queue(model: LocalPredictor, enhanced: bytes) -> None:
    """More slices than the queue holds are all answered, because few of them wait at a time."""
    app = build_test_app(model, ServiceLimits(queued=4), max_batch_size=2)
    answer = send(app, "POST", "/v1/classify", content=enhanced, headers=DICOM)
    assert answer.status_code == 200, answer.text
    assert sum(model.calls) == 10


def test_more_files_than_may_be_open_are_all_answered(
    model: LocalPredictor, enhanced: bytes, series: list[bytes]
) -> None:
    """Each file has more slices than a request may have decoded at a time."""
    app = build_test_app(model, max_batch_size=1)
    answer = post_files(app, "/v1/classify", *[enhanced] * 6, series[0])
    assert answer.status_code == 200, answer.text
    body = AnswersBody.model_validate(answer.json())
    assert [len(one.slices or ()) for one in body.answers] == [10] * 6 + [0]
    assert body.series[0].skipped == {"duplicate": 50}


def test_impossible_positions_cause_no_internal_error(
    model: LocalPredictor, planes: NDArray[np.uint16]
) -> None:
    far = make_mr(planes[0], ImagePositionPatient=[0, 0, 1e300])
    wide = make_mr(planes[0], ImageOrientationPatient=[1000, 0, 0, 0, 1000, 0])
    voxels = np.repeat(planes[0].T[..., None], 3, axis=2).astype(np.int16)
    image = nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 3.0, 1.0]))
    image.header["pixdim"][1:4] = (1, 1, np.inf)
    answer = post_files(build_test_app(model), "/v1/classify", far, wide, image.to_bytes())
    assert answer.status_code == 200, answer.text
    far_answer, wide_answer, _ = AnswersBody.model_validate(answer.json()).answers
    assert (far_answer.position_mm, wide_answer.orientation) == (None, None)


# ---- pictures ------------------------------------------------------------------------------------


def read_png(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def test_a_slice_is_rendered_through_its_window(
    model: LocalPredictor, series: list[bytes], enhanced: bytes
) -> None:
    app = build_test_app(model)
    headers = DICOM | {"accept": "image/png"}
    for content, query, frame in ((series[4], "", 0), (enhanced, "?frame=6", 6), (enhanced, "", 0)):
        answer = send(app, "POST", f"/v1/render{query}", content=content, headers=headers)
        assert answer.headers["content-type"] == "image/png"
        picture = read_png(answer.content)
        assert picture.mode == "L"
        expected = render_frame(open_dicom(content), frame).pixels
        np.testing.assert_array_equal(np.asarray(picture), expected)
    answer = send(app, "POST", "/v1/render?frame=10", content=enhanced, headers=headers)
    assert "0 to 9" in check_problem(answer, 404, "slice_not_found")["detail"]
    for kind in (headers, DICOM, {}):
        answer = send(app, "POST", "/v1/render", content=b"no", headers=kind)
        assert check_problem(answer, 422, "image_rejected")["reason"] == "not_an_image"


def test_all_slices_of_a_form_are_rendered(
    model: LocalPredictor, series: list[bytes], enhanced: bytes
) -> None:
    answer = post_files(build_test_app(model), "/v1/render", series[0], enhanced, b"no")
    pictures = PicturesBody.model_validate(answer.json()).pictures
    assert [(one.upload, one.frame) for one in pictures] == [
        *((0, None), *((1, frame) for frame in range(10)), (2, None)),
    ]
    shown = read_png(base64.b64decode(pictures[4].png or ""))
    np.testing.assert_array_equal(shown, render_frame(open_dicom(enhanced), 3).pixels)
    assert (pictures[-1].png, pictures[-1].reason) == (None, "not_an_image")


def test_pictures_beyond_the_limit_of_bytes_are_refused(model: LocalPredictor) -> None:
    packed = gzip.compress(make_noisy_volume())
    app = build_test_app(model, ServiceLimits(body_bytes=len(packed) + 1000))
    answer = send(app, "POST", "/v1/render", content=packed, headers=DICOM)
    check_problem(answer, 422, "too_many_slices")


def make_noisy_volume() -> bytes:
    """Make a volume of 4-bit noise; its pictures take twice the bytes of the gzipped file."""
    noise = np.random.default_rng(0).integers(0, 16, (64, 64, 8)).astype(np.int8)
    smooth = (noise.astype(np.int16) * 8).clip(0, 127).astype(np.int8)
    tail = np.repeat(smooth, 8, axis=2)  # gzip finds the copies, a PNG of each slice does not
    return bytes(nib.Nifti1Image(tail.astype(np.int16), np.eye(4)).to_bytes())


def test_one_slice_of_a_file_is_explained(
    model: LocalPredictor, series: list[bytes], enhanced: bytes
) -> None:
    app = build_test_app(model)
    answer = send(app, "POST", "/v1/explain?frame=5", content=enhanced, headers=DICOM)
    body = ExplainedAnswersBody.model_validate(answer.json())
    (one,) = body.answers
    assert (one.frame, one.status, one.slices) == (5, "classified", None)
    picture = read_png(base64.b64decode(one.heat_map_png or ""))
    assert picture.size == (one.width_px, one.height_px)
    classified = send(app, "POST", "/v1/classify", content=enhanced, headers=DICOM).json()
    assert classified["answers"][0]["slices"][5]["probs"] == pytest.approx(one.probs, abs=1e-6)
    answer = send(app, "POST", "/v1/explain", content=enhanced, headers=DICOM)
    assert "frame=N" in check_problem(answer, 422, "several_slices")["detail"]
    answer = post_files(app, "/v1/explain", series[0], series[1])
    assert [one["status"] for one in answer.json()["answers"]] == ["classified"] * 2
    answer = send(app, "POST", "/v1/explain?frame=-1", content=enhanced, headers=DICOM)
    check_problem(answer, 422, "invalid_parameter")


def test_an_overlay_shows_the_windowed_slice(
    model: LocalPredictor, series: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    explain = model.explain

    def explain_without_evidence(images: NDArray[np.uint8]) -> Any:  # noqa: ANN401
        found = explain(images)
        object.__setattr__(found, "class_maps", -np.abs(found.class_maps))
        return found

    monkeypatch.setattr(model, "explain", explain_without_evidence)
    headers = DICOM | {"accept": "image/png"}
    app = build_test_app(model)
    answer = send(app, "POST", "/v1/explain?render=overlay", content=series[2], headers=headers)
    shown = np.asarray(read_png(answer.content).convert("L"))
    np.testing.assert_array_equal(shown, render_frame(open_dicom(series[2])).pixels)


# ---- Open Inference Protocol ---------------------------------------------------------------------


def test_the_protocol_accepts_files_with_one_slice(
    model: LocalPredictor, series: list[bytes], enhanced: bytes
) -> None:
    app = build_test_app(model)

    def infer(*files: bytes) -> Any:  # noqa: ANN401
        data = [base64.b64encode(content).decode() for content in files]
        tensor = {"name": "image", "datatype": "BYTES", "shape": [len(files)], "data": data}
        return send(app, "POST", INFER, json={"inputs": [tensor]})

    answer = infer(*series[:2])
    outputs = {tensor["name"]: tensor["data"] for tensor in answer.json()["outputs"]}
    direct = post_files(app, "/v1/classify", *series[:2]).json()["answers"]
    expected = [prob for one in direct for prob in one["probs"].values()]
    np.testing.assert_allclose(outputs["probs"], expected, atol=1e-6)
    assert "10 slices" in check_problem(infer(enhanced), 422, "several_slices")["detail"]


# ---- identifiers ---------------------------------------------------------------------------------


def test_nothing_that_identifies_a_person_is_sent_or_logged(
    model: LocalPredictor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log"
    app = build_test_app(model, log_path=log)
    files = make_objects()
    responses = []
    for content in files.values():
        for path in ("/v1/classify", "/v1/explain", "/v1/render"):
            answer = send(app, "POST", path, content=content, headers=DICOM)
            assert answer.status_code < 500, answer.text
            responses.append(answer)
    form = [("files", ("a.dcm", content)) for content in list(files.values())[:9]]
    together = send(app, "POST", "/v1/classify", files=form)
    responses.append(send(app, "POST", "/v1/series", json={"answers": together.json()["answers"]}))
    responses += [together, send(app, "GET", "/metrics")]
    assert together.json()["series"], "hashes replace identifiers"
    texts = [answer.text + str(answer.headers) for answer in responses]
    for text in (*texts, log.read_text(), caplog.text):
        assert not find_tokens(text)


def test_hashes_are_equal_only_with_the_same_key(
    model: LocalPredictor, series: list[bytes]
) -> None:
    def find_series(app: Any) -> str:  # noqa: ANN401
        answer = send(app, "POST", "/v1/classify", content=series[0], headers=DICOM)
        return str(answer.json()["answers"][0]["series"])

    app, other = build_test_app(model), build_test_app(model)
    assert find_series(app) == find_series(app)
    assert find_series(app) != find_series(other)
