"""A PACS as a source of scans and a destination of objects, by DICOMweb."""

import logging
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from brainray.data.read import read_scan
from brainray.data.scans import UNCHANGED_NS, list_scans
from brainray.errors import ConfigError, DataError, DicomWebError, RejectedImage
from brainray.inference import bulk as bulk_module
from brainray.inference.bulk import ClassifyJob, classify
from brainray.inference.engine import EngineOptions
from brainray.io import dicomweb as client_module
from brainray.io.dicomweb import (
    CERTIFICATE_VARIABLE,
    MAX_ATTEMPTS,
    TOKEN_VARIABLE,
    DicomWebClient,
    list_resources,
    open_client,
    parse_uri,
    read_instance,
)
from tests.certificate import make_certificate
from tests.dicom_files import RAMP, compress, make_compressed, make_mr
from tests.fakes import prepare_fake_engine
from tests.identities import UID as TOKEN_UID
from tests.identities import find_tokens, find_tokens_in_folder, make_objects
from tests.pacs import FakePacs, describe_failed, describe_stored, run_orthanc, serve_fake_pacs

STUDY = "1.2.826.7"
PATIENT = "QZPATIENTID"


def make_slice(number: int, study: str = STUDY, series: str = "1", **elements: Any) -> bytes:  # noqa: ANN401
    return make_mr(
        np.full((64, 64), 300, np.uint16) + RAMP,
        StudyInstanceUID=study,
        SeriesInstanceUID=f"{study}.{series}",
        SOPInstanceUID=f"{study}.{series}.{number}",
        ImagePositionPatient=[0, 0, 5 * number],
        **elements,
    )


@pytest.fixture(autouse=True)
def new_clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clear the cache of clients, whose tokens come from the environment; retry without pauses."""
    monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 0.0)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.delenv(CERTIFICATE_VARIABLE, raising=False)
    open_client.cache_clear()
    yield
    open_client.cache_clear()


@pytest.fixture
def pacs() -> Iterator[FakePacs]:
    """Serve a PACS with a study of two series, four slices and three."""
    slices = [make_slice(number) for number in range(4)]
    others = [make_slice(number, series="2") for number in range(3)]
    with serve_fake_pacs(*slices, *others) as served:
        yield served


def check_anonymous(error: BaseException) -> None:
    """Check that an error and its causes name neither the study nor the patient."""
    seen: BaseException | None = error
    while seen is not None:
        assert STUDY not in repr(seen)
        assert PATIENT not in repr(seen)
        seen = seen.__cause__ or seen.__context__


# ---- URIs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "dicomweb+https://h/studies",
        "dicomweb+http://h:80/a/b/studies?PatientID=7&StudyDate=20260101-20261231",
        "dicomweb+https://h/x/studies/1.2",
        "dicomweb+https://h/x/studies/1.2?Modality=MR",
        "dicomweb+https://h/x/studies/1.2/series/1.3/instances/1.4",
    ],
)
def test_a_uri_keeps_its_parts(uri: str) -> None:
    assert parse_uri(uri).to_uri() == uri
    assert parse_uri(f"{uri}/" if "?" not in uri else uri).to_uri() == uri


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (f"dicomweb+https://h/x?PatientID={PATIENT}", "Expected scans in a PACS as"),
        (f"dicomweb+ftp://h/studies?PatientID={PATIENT}", "Expected scans in a PACS as"),
        (f"dicomweb+https://h/studies/1.2?PatientID={PATIENT}&limit=5", "'limit' cannot be given"),
        (f"dicomweb+https://me:pw@h/studies?PatientID={PATIENT}", "must not hold credentials"),
    ],
)
def test_an_error_of_a_wrong_uri_does_not_quote_it(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse_uri(uri)
    assert PATIENT not in str(raised.value)
    assert "pw" not in str(raised.value)


# ---- searching -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_results", [1, 2, 3, 1000])
def test_every_page_is_requested_for_any_page_size(max_results: int, pacs: FakePacs) -> None:
    pacs.max_results = max_results
    found = list_scans([f"{pacs.uri}?PatientID=patient-7"])
    uids = [uri.rpartition("/")[2] for uri in found["uri"].to_pylist()]
    assert sorted(uids) == sorted(pacs.files)
    assert set(found["modified_ns"].to_pylist()) == {UNCHANGED_NS}
    assert found["reason"].null_count == 7


def test_keys_of_series_are_sent_in_searches_for_series_only(pacs: FakePacs) -> None:
    pacs.add(make_slice(9, series="3", Modality="SR"))
    uri = f"{pacs.uri}?PatientID=patient-7&Modality=MR"
    assert list_scans([uri]).num_rows == 7
    studies = [request for request in pacs.requests if request.path == "studies"]
    assert {"PatientID"} <= set(studies[0].keys)
    assert all("Modality" not in request.keys for request in studies)
    assert list_scans([f"{pacs.uri}?PatientID=somebody-else"]).num_rows == 0
    assert list_scans([f"{pacs.uri}/{STUDY}/series/{STUDY}.2"]).num_rows == 3
    assert list_scans([f"{pacs.uri}/{STUDY}/series/{STUDY}.2/instances/1.5"]).num_rows == 1


def test_missing_results_of_a_service_without_pages_are_an_error(pacs: FakePacs) -> None:
    pacs.ignores_offset = True
    assert list_scans([pacs.uri]).num_rows == 7
    pacs.max_results, pacs.warns = 2, True
    with pytest.raises(DicomWebError, match="more results than it gives"):
        list_scans([f"{pacs.uri}/{STUDY}/series/{STUDY}.1"])


def test_a_study_that_fails_is_one_rejected_scan(pacs: FakePacs) -> None:
    pacs.add(make_slice(0, study="1.2.826.8"))
    pacs.broken_paths = (f"{STUDY}/series",)
    found = list_scans([pacs.uri]).to_pylist()
    assert sorted((row["uri"].rpartition("/")[2], row["reason"]) for row in found) == [
        (STUDY, "unreadable"),
        ("1.2.826.8.1.0", None),
    ]


def test_a_list_that_names_a_pacs_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"dicomweb+https://h/studies/{STUDY}\n")
    with pytest.raises(DataError, match="names scans in a PACS") as raised:
        list_scans([str(tmp_path / "list.txt")])
    assert STUDY not in str(raised.value)


# ---- failures ------------------------------------------------------------------------------------


def test_temporary_failures_are_retried(pacs: FakePacs) -> None:
    pacs.statuses = [503, 0, 429, 500]
    assert len(list_resources(pacs.uri).studies) == 1
    assert len(pacs.requests) == 4 + 2
    (first, *_), content = list_scans([pacs.uri])["uri"].to_pylist(), pacs.files[f"{STUDY}.1.0"]
    pacs.statuses = [0, 0]
    assert read_instance(first) == content, "an answer broke off twice"


@pytest.mark.parametrize(
    ("statuses", "message"),
    [
        ([503] * MAX_ATTEMPTS, f"HTTP status 503, after {MAX_ATTEMPTS} attempts"),
        ([0] * MAX_ATTEMPTS, f"an answer broke off, after {MAX_ATTEMPTS} attempts"),
        ([401], r"access is denied \(HTTP status 401\)"),
        ([404], "it has no such address"),
        ([302], "it answers with another address"),
        ([400], r"refuses the request \(HTTP status 400\)"),
    ],
)
def test_a_failure_names_the_service_and_no_patient(
    statuses: list[int], message: str, pacs: FakePacs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    pacs.statuses = list(statuses)
    with pytest.raises(DicomWebError, match=message) as raised:
        list_scans([f"{pacs.uri}?PatientID={PATIENT}&StudyInstanceUID={STUDY}"])
    assert pacs.root in str(raised.value)
    check_anonymous(raised.value)
    assert len(pacs.requests) == len(statuses)
    assert STUDY not in caplog.text
    assert PATIENT not in caplog.text


def test_an_unreachable_service_and_an_invalid_answer_are_errors(
    monkeypatch: pytest.MonkeyPatch, pacs: FakePacs
) -> None:
    monkeypatch.setattr(client_module, "CONNECT_S", 0.2)
    with pytest.raises(DicomWebError, match="it cannot be reached, after") as raised:
        list_scans([f"dicomweb+http://127.0.0.1:9/studies?PatientID={PATIENT}"])
    check_anonymous(raised.value)
    monkeypatch.setattr(pacs, "search", lambda *_: [{"0020000D": {"Value": ["../x"]}}])
    with pytest.raises(DicomWebError, match="an answer that is not DICOMweb") as raised:
        list_scans([pacs.uri])
    check_anonymous(raised.value)


# ---- instances -----------------------------------------------------------------------------------


@pytest.mark.parametrize("as_one_part", [False, True])
def test_the_bytes_of_an_instance_equal_those_in_the_pacs(
    as_one_part: bool, pacs: FakePacs
) -> None:
    pacs.as_one_part = as_one_part
    for uri in list_scans([pacs.uri])["uri"].to_pylist():
        content = pacs.files[uri.rpartition("/")[2]]
        assert read_scan(uri, -1, -1) == content
        assert read_scan(uri, -1, -1, max_bytes=len(content)) == content
        assert read_scan(uri, -1, -1, max_bytes=100) == content[:101]


def test_an_instance_that_the_pacs_does_not_send_is_rejected(pacs: FakePacs) -> None:
    uri = list_scans([pacs.uri])["uri"].to_pylist()[0]
    for statuses, reason in (([404], "missing"), ([410], "missing"), ([403], "unreadable")):
        pacs.statuses = statuses
        with pytest.raises(RejectedImage) as raised:
            read_scan(uri, -1, -1)
        assert raised.value.reason == reason
        check_anonymous(raised.value)


# ---- credentials ---------------------------------------------------------------------------------


def test_credentials_are_sent_to_the_service(
    pacs: FakePacs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password pw\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    list_scans([pacs.uri])
    assert pacs.requests[-1].headers["Authorization"].startswith("Basic ")
    open_client.cache_clear()
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    list_scans([pacs.uri])
    assert pacs.requests[-1].headers["Authorization"] == "Bearer secret"
    monkeypatch.setenv("OTHER", "another")
    open_client(pacs.root, token_env="OTHER").has("1.2", "1.3")
    assert pacs.requests[-1].headers["Authorization"] == "Bearer another"


def test_unusable_credentials_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"token in \$NOT_SET, which is not set"):
        open_client("https://h/x", token_env="NOT_SET")
    with pytest.raises(ConfigError, match="No client certificate at '/nowhere"):
        open_client("https://h/x", certificate_path="/nowhere.pem")
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    with pytest.raises(ConfigError, match="would go to http://h/x unencrypted"):
        open_client("http://h/x")
    with pytest.raises(ConfigError, match="Expected the address of a DICOMweb service"):
        open_client("h/x")


def test_certificates_are_checked_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = make_certificate(tmp_path)
    (tmp_path / "client.pem").write_bytes(certificate.read_bytes() + key.read_bytes())
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(certificate))
    tls.load_cert_chain(certificate, key)
    tls.verify_mode = ssl.CERT_REQUIRED
    client = str(tmp_path / "client.pem")
    with serve_fake_pacs(make_slice(0), tls=tls) as pacs:
        with pytest.raises(DicomWebError, match=r"\$REQUESTS_CA_BUNDLE"):
            open_client(pacs.root, certificate_path=client).has(STUDY, "1.2")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert open_client(pacs.root, certificate_path=client).has(STUDY, f"{STUDY}.1.0")
        with pytest.raises(DicomWebError):
            open_client(pacs.root).has(STUDY, f"{STUDY}.1.0")
        monkeypatch.setenv(CERTIFICATE_VARIABLE, client)
        open_client.cache_clear()
        assert list_scans([pacs.uri]).num_rows == 1


# ---- storing -------------------------------------------------------------------------------------


@pytest.fixture
def store(pacs: FakePacs) -> DicomWebClient:
    return open_client(pacs.root)


def make_objects_to_store(count: int) -> dict[str, bytes]:
    return {f"{STUDY}.9.{number}": make_slice(number, series="9") for number in range(count)}


def test_objects_are_stored_once(
    pacs: FakePacs, store: DicomWebClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = make_objects_to_store(5)
    size_bytes = len(objects[f"{STUDY}.9.0"])
    monkeypatch.setattr(client_module, "MAX_REQUEST_BYTES", 2 * size_bytes + 1)
    assert not store.has(STUDY, f"{STUDY}.9.0")
    for _ in range(2):
        assert store.store(STUDY, objects) == {}
    assert {uid: pacs.files[uid] for uid in objects} == objects
    assert sum(request.method == "POST" for request in pacs.requests) == 2 * 3
    assert store.has(STUDY, f"{STUDY}.9.0")
    assert not store.has("1.2.3", f"{STUDY}.9.0"), "it is in another study"
    assert store.store(STUDY, {}) == {}


def test_objects_that_were_not_stored_are_returned(pacs: FakePacs, store: DicomWebClient) -> None:
    objects = make_objects_to_store(2)
    first, second = objects

    def store_with_answer(status: int, document: dict[str, Any] | None) -> list[str | None]:
        pacs.stow_answer = lambda _: (status, document)
        failures = store.store(STUDY, objects)
        return [failures.get(uid) for uid in objects]

    not_listed = "it answered with HTTP status 200, and does not have it"
    assert store_with_answer(200, {}) == [not_listed, not_listed]
    assert store_with_answer(200, None) == [not_listed, not_listed]
    empty = {"00081198": {"vr": "SQ", "Value": []}}
    assert store_with_answer(200, describe_stored([first, second]) | empty) == [None, None]
    mixed = describe_stored([first]) | describe_failed([second], 0xA700)
    assert store_with_answer(202, mixed) == [None, "out of resources (failure reason 0xA700)"]
    assert store_with_answer(409, describe_failed([first, second], 0xA9F0))[0] == (
        "the object does not match its class (failure reason 0xA9F0)"
    )
    assert store_with_answer(409, describe_failed([first, second], 0x0999))[1] == (
        "for a reason of its own (failure reason 0x0999)"
    )
    pacs.add(objects[first])
    assert store_with_answer(409, describe_failed([first, second], 0x0111))[0] is None, (
        "it is stored"
    )


def test_a_request_that_fails_as_a_whole_is_an_error(pacs: FakePacs, store: DicomWebClient) -> None:
    objects = make_objects_to_store(1)
    pacs.statuses = [503, 200]
    assert store.store(STUDY, objects) == {}
    pacs.statuses = [413]
    with pytest.raises(DicomWebError, match="HTTP status 413") as raised:
        store.store(STUDY, objects)
    check_anonymous(raised.value)


# ---- the bulk job --------------------------------------------------------------------------------


@pytest.mark.usefixtures("local_ray")
def test_a_bulk_job_over_a_pacs_fetches_each_instance_once_and_names_no_patient(
    tiny_classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(bulk_module, "prepare_engine", prepare_fake_engine)
    objects = make_objects()  # pydicom warns of the malformed ones, which are not served here
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    valid = [content for name, content in objects.items() if name.startswith("valid")]
    with serve_fake_pacs(*valid[:7], objects["localizer"]) as pacs:
        printed: list[str] = []
        job = ClassifyJob(
            scans_uri=(f"{pacs.uri}?PatientID={PATIENT}&Modality=MR",),
            classifier_uri=str(tiny_classifier),
            output_uri=str(tmp_path / "out"),
            engine=EngineOptions(backend="torch", precision="fp32"),
        )
        first = classify(job, log=printed.append)
        assert first["run"]["num_new"] == 8
        assert pacs.count("/instances/") == 8
        assert classify(job, log=printed.append)["run"]["num_new"] == 0
        assert pacs.count("/instances/") == 8, "nothing is fetched again"
        pacs.add(valid[7])
        pacs.broken_paths = (f"/instances/{TOKEN_UID}.2.7",)
        assert classify(job, log=printed.append)["run"]["num_new"] == 1
        pacs.broken_paths = ()
        assert classify(job, log=printed.append)["run"]["num_new"] == 1, "a failure is retried"
        rows = pq.read_table(tmp_path / "out" / "predictions").to_pylist()
        assert sorted(str(row["reason"]) for row in rows).count("unreadable") == 1
        instances = [row["sop_instance"] for row in rows if row["sop_instance"]]
        assert len(instances) == len(set(instances)) == 8
        assert {row["scan_uri"][:9] for row in rows} == {"redacted:"}
        pacs.statuses = [401]
        with pytest.raises(DicomWebError) as raised:
            classify(job, log=printed.append)
        assert find_tokens(repr(raised.value)) == []
    assert find_tokens_in_folder(tmp_path / "out") == {}
    assert find_tokens("\n".join(printed) + caplog.text) == []


# ---- Orthanc -------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_orthanc_returns_the_stored_objects(tmp_path: Path) -> None:
    client_library = pytest.importorskip("dicomweb_client.api")
    jpeg_2000_lossless = "1.2.840.10008.1.2.4.90"
    compressed = make_compressed(
        compress(RAMP[None], jpeg_2000_lossless),
        jpeg_2000_lossless,
        StudyInstanceUID=STUDY,
        SeriesInstanceUID=f"{STUDY}.1",
        SOPInstanceUID=f"{STUDY}.1.99",
    )
    slices = [make_slice(number) for number in range(8)]
    with run_orthanc(tmp_path / "orthanc") as orthanc:
        pacs = open_client(orthanc.root)
        objects = {f"{STUDY}.1.{number}": content for number, content in enumerate(slices)}
        for _ in range(2):
            assert pacs.store(STUDY, objects | {f"{STUDY}.1.99": compressed}) == {}
        assert len(orthanc.get("instances")) == 9
        (failure,) = pacs.store("1.2.3", {f"{STUDY}.1.0": slices[0]}).values()
        assert "failure reason 0x" in failure, "it is of another study"
        uri = f"dicomweb+{orthanc.root}/studies?PatientID=patient-7&Modality=MR"
        found = list_scans([uri])["uri"].to_pylist()
        contents = {read_scan(one, -1, -1) for one in found}
        assert contents == {*slices, compressed}
        assert pacs.has(STUDY, f"{STUDY}.1.99")
        assert not pacs.has(STUDY, f"{STUDY}.1.98")
        library = client_library.DICOMwebClient(orthanc.root)
        assert len(library.search_for_instances(STUDY)) == 9
        first = library.retrieve_instance(STUDY, f"{STUDY}.1", f"{STUDY}.1.0")
        assert first.PixelData == (np.full((64, 64), 300, np.uint16) + RAMP).tobytes()
        orthanc.kill()
        orthanc.start()
        assert list_scans([uri]).num_rows == 9
