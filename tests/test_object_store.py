"""S3: endpoints and credentials as in AWS's tools, faults, and the number of requests."""

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from brainray import cli
from brainray.data.scans import list_scans
from brainray.errors import LockLostError, StorageError
from brainray.inference.store import Wave
from brainray.io import conditional, storage
from tests.object_store import (
    BUCKET,
    CUT,
    LOST,
    Environ,
    Fault,
    ObjectStore,
    StalledWrites,
    serve_objects,
)
from tests.test_store import make_rows, open_store, write

PART_BYTES = 10 * 2**20
"""Larger files are uploaded in parts."""

WRITE_AND_PRINT_REGION = """
import sys
from brainray.io import storage
from brainray.io import conditional
storage.write_bytes(sys.argv[1], b"here")
assert conditional.create_bytes(sys.argv[1] + "-new", b"here")
print(storage.resolve(sys.argv[1])[0].region)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with serve_objects() as store:
        yield store


@pytest.fixture
def store(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """Set the AWS variables for an empty bucket."""
    for name, value in make_environment(server.url).items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    server.forget()
    server.open().delete_dir_contents(BUCKET)
    server.forget()
    clear_service_caches()
    return server


def clear_service_caches() -> None:
    """Clear the caches of open file systems, as in a new process."""
    storage._open_s3.cache_clear()
    conditional._open_s3.cache_clear()


def make_environment(url: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key-1",
        "AWS_SECRET_ACCESS_KEY": "secret-1",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def make_uri(*parts: str) -> str:
    return storage.join(f"s3://{BUCKET}", *parts)


def read_credential(environ: Environ) -> str:
    """Return the credential of a signed request: key/date/region/s3/aws4_request."""
    return str(environ["HTTP_AUTHORIZATION"]).partition("Credential=")[2].partition(",")[0]


# ------------------------------------------------------------------------- endpoint and credentials


@pytest.mark.parametrize("named", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "query"])
def test_an_endpoint_is_read_from_variables_and_from_the_query(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    base = f"s3://{BUCKET}/a"
    if named == "query":
        address = store.url.removeprefix("http://")
        base += f"?endpoint_override={address}&scheme=http&region=ap-south-1"
    else:
        monkeypatch.setenv(named, store.url)
    uri = storage.join(base, "b c", "50%#?.jpg")
    storage.write_bytes(uri, b"content")
    assert storage.read_bytes(uri) == b"content"
    (found,) = storage.list_files(base)
    assert storage.read_bytes(found.uri) == b"content"
    assert (found.relative_path, found.size_bytes) == ("b c/50%#?.jpg", 7)
    assert storage.list_folders(base) == ["b c"]
    assert not conditional.create_bytes(uri, b"other")
    assert conditional.create_bytes(storage.join(base, "b c", "new %#?"), b"new")
    assert store.list_keys() == ["a/b c/50%#?.jpg", "a/b c/new %#?"]
    region = "ap-south-1" if named == "query" else "eu-central-1"
    assert {read_credential(e).split("/")[2] for e in store.headers[:-1]} == {region}


def test_the_endpoint_for_s3_precedes_the_general_one(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", store.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert not storage.exists(make_uri("nothing"))
    assert conditional.create_bytes(make_uri("created"), b"")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    address = store.url.removeprefix("http://")
    here = f"s3://{BUCKET}/here?endpoint_override={address}&scheme=http"
    assert conditional.create_bytes(here, b"")
    assert store.list_keys() == ["created", "here"]


def test_keys_tokens_and_regions_come_from_the_environment(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-1")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    storage.write_bytes(make_uri("x"), b"")
    key, _, region, *_ = read_credential(store.headers[0]).split("/")
    assert (key, region) == ("key-1", "us-west-2")
    assert store.headers[0]["HTTP_X_AMZ_SECURITY_TOKEN"] == "token-1"
    storage.write_bytes(f"s3://key-2:se%2Fcret@{BUCKET}/y", b"")
    assert read_credential(store.headers[1]).startswith("key-2/")
    assert conditional.create_bytes(make_uri("z"), b"")
    key, _, region, *_ = read_credential(store.headers[2]).split("/")
    assert (key, region) == ("key-1", "us-west-2")
    assert store.headers[2]["HTTP_X_AMZ_SECURITY_TOKEN"] == "token-1"
    assert conditional.create_bytes(f"s3://key-2:se%2Fcret@{BUCKET}/zz", b"")
    assert read_credential(store.headers[3]).startswith("key-2/")
    assert "HTTP_X_AMZ_SECURITY_TOKEN" not in store.headers[3], "the token belongs to other keys"
    assert store.list_keys() == ["x", "y", "z", "zz"]


def write_in_process(environment: dict[str, str]) -> str:
    """Write an object in another process, and return the region that it used."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-c", WRITE_AND_PRINT_REGION, make_uri("who")],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_profile_gives_keys_and_region(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = wrong\naws_secret_access_key = wrong\n"
        "[hospital]\naws_access_key_id = key-3\naws_secret_access_key = secret-3\n"
    )
    (tmp_path / "config").write_text("[profile hospital]\nregion = sa-east-1\n")
    region = write_in_process(
        {
            "AWS_ENDPOINT_URL": store.url,
            "AWS_PROFILE": "hospital",
            "AWS_CONFIG_FILE": str(tmp_path / "config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    )
    assert region == "sa-east-1"
    assert len(store.headers) == 2
    for environ in store.headers:
        assert read_credential(environ).split("/")[0::2][:2] == ["key-3", "sa-east-1"]


@pytest.fixture
def credential_process_profile(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> ObjectStore:
    """Use a profile whose keys come from a credential process."""
    given = {"Version": 1, "AccessKeyId": "key-5", "SecretAccessKey": "secret-5"}
    (tmp_path / "keys.json").write_text(json.dumps(given))
    (tmp_path / "config").write_text(
        f"[profile hospital]\ncredential_process = cat {tmp_path}/keys.json\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "hospital")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    return store


def test_a_profile_without_keys_is_resolved_by_boto3(
    credential_process_profile: ObjectStore,
) -> None:
    assert conditional.create_bytes(make_uri("x"), b"")
    assert read_credential(credential_process_profile.headers[0]).startswith("key-5/")


def test_the_keys_of_a_profile_are_read_again_after_a_while(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Temporary keys are renewed in the file of credentials."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setattr(conditional, "KEYS_LIFE_S", 0.1)
    for number in (1, 2):
        (tmp_path / "credentials").write_text(
            f"[default]\naws_access_key_id = temporary-{number}\n"
            f"aws_secret_access_key = s\naws_session_token = token-{number}\n"
        )
        time.sleep(0.2)
        assert conditional.create_bytes(make_uri(f"{number}"), b"")
        assert read_credential(store.headers[-1]).startswith(f"temporary-{number}/")
        assert store.headers[-1]["HTTP_X_AMZ_SECURITY_TOKEN"] == f"token-{number}"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_proxy_is_used_for_a_local_endpoint(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url.replace("127.0.0.1", host))
    storage.write_bytes(make_uri("x"), b"")
    assert conditional.create_bytes(make_uri("y"), b"")


def test_without_credentials_requests_are_not_signed(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    assert conditional.create_bytes(make_uri("x"), b"")
    assert "HTTP_AUTHORIZATION" not in store.headers[0]


def test_a_role_of_the_instance_gives_keys(store: ObjectStore, tmp_path: Path) -> None:
    role = "/latest/meta-data/iam/security-credentials"
    answers = {
        "/latest/api/token": "a token",
        role: "worker",
        f"{role}/worker": json.dumps(
            {
                "Code": "Success",
                "AccessKeyId": "key-4",
                "SecretAccessKey": "secret-4",
                "Token": "token-4",
                "Expiration": "2099-01-01T00:00:00Z",
            }
        ),
    }
    moto = store._moto

    def serve_metadata(environ: Environ, start_response: Any) -> Any:  # noqa: ANN401
        path = environ["PATH_INFO"]
        content = answers.get(path.rstrip("/"))
        if content is None:
            return moto(environ, start_response)
        start_response("200 OK", [("Content-Length", str(len(content)))])
        return [content.encode()]

    store._moto = serve_metadata
    try:
        write_in_process(
            {
                "AWS_ENDPOINT_URL": store.url,
                "AWS_REGION": "us-east-1",
                "AWS_EC2_METADATA_SERVICE_ENDPOINT": store.url,
                "AWS_CONFIG_FILE": str(tmp_path / "none"),
                "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
            }
        )
    finally:
        store._moto = moto
    written = [e for e in store.headers if e["PATH_INFO"].endswith(("/who", "/who-new"))]
    assert len(written) == 2
    for environ in written:
        assert read_credential(environ).startswith("key-4/")
        assert environ["HTTP_X_AMZ_SECURITY_TOKEN"] == "token-4"


def test_without_an_endpoint_the_region_is_that_of_the_bucket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """AWS is asked for it; if AWS is unreachable, the environment sets the region."""
    clear_service_caches()
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REGION", "us-west-1")
    monkeypatch.setattr(storage.fs, "resolve_s3_region", {"far": "ap-east-1"}.__getitem__)
    assert storage.resolve("s3://far/x")[0].region == "ap-east-1"

    def fail(bucket: str) -> str:
        message = "not found" if bucket == "gone" else "curlCode: 6"
        raise OSError(f"Bucket '{bucket}': {message}")

    monkeypatch.setattr(storage.fs, "resolve_s3_region", fail)
    assert storage.resolve("s3://unreachable/x")[0].region == "us-west-1"
    with pytest.raises(StorageError, match="Cannot open 's3://gone/x': there is no such bucket"):
        storage.resolve("s3://gone/x")


def test_the_error_for_an_unknown_option_names_it() -> None:
    with pytest.raises(StorageError, match=r"Unknown option 'regoin'\. Expected one of region"):
        storage.resolve(f"s3://{BUCKET}/x?regoin=eu-west-1")


# ------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("fault", [(503, "SlowDown"), (500, "InternalError"), CUT], ids=str)
def test_failed_requests_are_retried(store: ObjectStore, fault: Fault) -> None:
    large = os.urandom(PART_BYTES + 1)
    store.fail_first(1, fault)
    storage.write_bytes(make_uri("small"), b"small")
    store.fail_first(1, fault)
    storage.write_bytes(make_uri("large"), large)
    assert any("partNumber=2" in request for request in store.requests)
    for check in (
        lambda: storage.read_bytes(make_uri("small")) == b"small",
        lambda: storage.read_bytes(make_uri("large")) == large,
        lambda: (
            [file.relative_path for file in storage.list_files(make_uri())] == ["large", "small"]
        ),
        lambda: storage.exists(make_uri("small")) and not storage.exists(make_uri("none")),
    ):
        store.fail_first(1, fault)
        assert check()
    store.fail_first(1, fault)
    storage.delete_file(make_uri("large"))
    store.forget()
    assert store.list_keys() == ["small"]


def test_an_unreliable_service_loses_no_object(store: ObjectStore) -> None:
    """One request in five fails, with alternating faults; every object is complete in the end."""
    faults: list[Fault] = [(503, "SlowDown"), CUT, (500, "InternalError")]
    contents = {f"{number:02d}": os.urandom(1000 * number) for number in range(12)}
    store.fail = lambda _: faults[len(store.requests) % 3] if len(store.requests) % 5 == 0 else None
    for name, content in contents.items():
        storage.write_bytes(make_uri("in", name), content)
    found = storage.list_files(make_uri("in"))
    assert {file.relative_path: storage.read_bytes(file.uri) for file in found} == contents


def test_a_pickled_file_system_retries_as_often(store: ObjectStore) -> None:
    """Ray Train pickles it for the workers. By default pyarrow gives up after three attempts."""
    filesystem, path = storage.resolve(make_uri("x"))
    content = pickle.dumps(filesystem)
    clear_service_caches()
    unpickled = pickle.loads(content)
    assert unpickled is not filesystem
    assert unpickled is storage.resolve(make_uri("y"))[0]
    store.fail_first(3, (503, "SlowDown"))
    assert unpickled.get_file_info(path).type == fs.FileType.NotFound


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((503, "SlowDown"), "the service still fails after 5 attempts"),
        pytest.param(CUT, "the service did not respond in 5 attempts", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_permanent_fault_gives_a_one_line_error_in_bounded_time(
    store: ObjectStore, fault: Fault, message: str
) -> None:
    store.fail = lambda _: fault
    started = time.monotonic()
    with pytest.raises(StorageError, match=message) as caught:
        storage.write_bytes(make_uri("x"), b"content")
    assert time.monotonic() - started < 60
    assert len(store.requests) == storage.MAX_ATTEMPTS
    assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match=message):
        conditional.create_bytes(make_uri("x"), b"content")
    assert time.monotonic() - started < 90
    assert len(store.requests) == 2 * storage.MAX_ATTEMPTS


@pytest.mark.slow
def test_a_service_that_does_not_respond_gives_an_error_in_bounded_time(store: ObjectStore) -> None:
    store.fail = lambda _: time.sleep(120)
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"did not respond in 5 attempts \(.*too slow"):
        storage.read_bytes(make_uri("x"))
    assert time.monotonic() - started < 60


DENIED = "access is denied. Give credentials with this permission: AWS_ACCESS_KEY_ID"


@pytest.mark.parametrize(
    ("fault", "listing", "reading"),
    [
        ((403, "AccessDenied"), DENIED, DENIED),
        ((403, "SignatureDoesNotMatch"), "the secret key does not match the access key", DENIED),
        ((403, "InvalidAccessKeyId"), "the service does not know the access key", DENIED),
        ((400, "ExpiredToken"), "the credentials have expired", "Check AWS_REGION, and the age"),
        ((301, "PermanentRedirect"), "in another region. Set AWS_REGION", "in another region"),
        ((400, "AuthorizationHeaderMalformed"), "in another region", "Check AWS_REGION"),
        ((404, "NoSuchBucket"), "there is no such bucket. Check its name", "no such bucket"),
    ],
    ids=str,
)
def test_the_error_for_a_refused_request_names_the_remedy(
    store: ObjectStore, fault: Fault, listing: str, reading: str
) -> None:
    """Responses of S3 to HEAD have no body, so wrong keys and missing rights look alike."""
    store.fail = lambda _: fault
    for act, message in (
        (lambda: storage.list_files(make_uri("x")), listing),
        (lambda: storage.write_bytes(make_uri("x"), b"content"), listing),
        (lambda: conditional.create_bytes(make_uri("x"), b"content"), listing),
        (lambda: storage.read_bytes(make_uri("x")), reading),
        (lambda: storage.exists(make_uri("x")), reading),
    ):
        with pytest.raises(StorageError, match="Cannot ") as caught:
            act()
        assert message in str(caught.value)
        assert make_uri("x") in str(caught.value)
    assert "AWS Error" not in str(caught.value)


def test_a_missing_bucket_is_distinguished_from_a_missing_object(store: ObjectStore) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(make_uri("nothing"))
    gone = "s3://no-such-bucket/x"
    for act in (
        lambda: storage.read_bytes(gone),
        lambda: storage.exists(gone),
        lambda: storage.is_folder(gone),
        lambda: storage.find_file(gone),
        lambda: storage.list_files(gone),
        lambda: storage.list_folders(gone),
        lambda: storage.write_bytes(gone, b"content"),
        lambda: storage.check_writable(gone),
        lambda: conditional.create_bytes(gone, b"content"),
    ):
        with pytest.raises(StorageError, match="there is no such bucket"):
            act()
    assert not any(line.startswith("PUT /no-such-bucket ") for line in store.requests)


def test_an_output_without_permission_to_delete_is_not_writable(store: ObjectStore) -> None:
    store.fail = lambda environ: (
        (403, "AccessDenied") if environ["REQUEST_METHOD"] == "DELETE" else None
    )
    with pytest.raises(StorageError, match=r"Cannot delete 's3://scans/out/\.probe.*denied"):
        storage.check_writable(make_uri("out"))


DATA, CLASSIFIER, OUT = make_uri("data"), make_uri("c"), make_uri("out")
JOBS = {
    "train": ["--data-uri", DATA, "--output-uri", OUT, "--weights", "none"],
    "evaluate": [
        *("--data-uri", DATA, "--classifier-uri", CLASSIFIER, "--output-uri", OUT),
    ],
    "classify": [
        *("--scans-uri", DATA, "--classifier-uri", CLASSIFIER, "--output-uri", make_uri("o")),
    ],
    "audit": ["--data-uri", DATA, "--output-uri", OUT],
}


def run(capsys: pytest.CaptureFixture[str], command: str, *changes: str) -> str:
    """Run a job that must exit with status 2, and return its one line of error."""
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *JOBS[command], *changes])
    line = capsys.readouterr().err
    assert ended.value.code == 2
    assert line.count("\n") == 1, line
    return line


@pytest.mark.parametrize("command", JOBS)
def test_a_job_without_credentials_says_so_and_exits_with_2(
    store: ObjectStore,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
) -> None:
    """The SDK then sends requests without a signature, which S3 denies."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    store.fail = lambda environ: (
        (403, "AccessDenied") if "HTTP_AUTHORIZATION" not in environ else (500, "signed")
    )
    assert DENIED in run(capsys, command)


@pytest.mark.parametrize("command", JOBS)
@pytest.mark.usefixtures("store")
def test_a_job_in_a_missing_bucket_says_so_and_exits_with_2(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    option = "--classifier-uri" if command in ("classify", "evaluate") else "--data-uri"
    assert "there is no such bucket" in run(capsys, command, option, "s3://no-such-bucket/x")


# ------------------------------------------------------------------------------ number of requests


def test_a_write_makes_no_folders_and_takes_one_request(store: ObjectStore) -> None:
    storage.write_bytes(make_uri("a", "b", "c"), b"content")
    assert store.requests == [f"PUT /{BUCKET}/a/b/c"]


def test_a_scan_takes_two_requests(store: ObjectStore) -> None:
    names = ("one", "three", "two")
    for name in names:
        storage.write_bytes(make_uri("in", name), name.encode())
    store.forget()
    scans = list_scans([make_uri("in")])
    assert len(store.requests) <= 3
    assert scans["size_bytes"].to_pylist() == [3, 5, 3]
    assert scans["modified_ns"].null_count == 0
    store.forget()
    uris = scans["uri"].to_pylist()
    read = {uri: storage.read_bytes(uri, max_bytes=99) for uri in uris}
    expected = [f"{verb} /{BUCKET}/in/{name}" for name in names for verb in ("HEAD", "GET")]
    assert store.requests == expected
    assert read == {make_uri("in", name): name.encode() for name in names}


def test_check_writable_leaves_no_object(store: ObjectStore) -> None:
    storage.check_writable(make_uri("out"))
    assert store.list_keys() == []


def test_a_listing_takes_a_request_for_each_folder(store: ObjectStore) -> None:
    names = ["a.jpg", "deep/b c.jpg", "deep/er/d.png", ".hidden"]
    for name in names:
        store.put(f"in/{name}", name.encode())
    store.forget()
    found = list_scans([make_uri("in")])
    assert found["uri"].to_pylist() == [make_uri("in", *name.split("/")) for name in names[:3]]
    listings = [line for line in store.requests if "list-type=2" in line]
    assert len(listings) <= 3 + 1, "three folders, and a check that the first exists"
    assert not any(line.startswith("GET") for line in set(store.requests) - set(listings))


@pytest.mark.parametrize("pattern", ["in/**/*.jpg", "in/d*/b c.jpg", "in/d*/b%20c.jpg"])
def test_globs_match_plain_and_percent_encoded_names(store: ObjectStore, pattern: str) -> None:
    for name in ("in/deep/b c.jpg", "in/deep/d.png", "in/.hidden/e.jpg"):
        store.put(name, b"pixels")
    (uri,) = list_scans([f"s3://{BUCKET}/{pattern}"])["uri"].to_pylist()
    assert uri == make_uri("in", "deep", "b c.jpg")


# ------------------------------------------------------------------------ predictions in a bucket


def name_shard(shard: int) -> str:
    return f"out/predictions/classifier_id=aaa/run-0000-{shard:06d}.parquet"


def read_names(store: ObjectStore) -> list[str]:
    return sorted(row["scan_uri"] for row in store.read_predictions("out"))


def test_a_shard_is_written_once_in_one_request(store: ObjectStore) -> None:
    predictions = open_store(make_uri("out"))
    store.forget()
    rows = make_rows("a", "b")
    assert write(predictions, 0, rows) is rows
    assert [line.split()[0] for line in store.requests] == ["PUT"]
    assert store.headers[0]["HTTP_IF_NONE_MATCH"] == "*"
    assert write(predictions, 0, make_rows("c"))["scan_uri"].to_pylist() == ["a", "b"]
    assert read_names(store) == ["a", "b"]
    assert predictions.list_files() == [predictions.name_file("run", 0, 0)]
    assert store.list_keys() == [name_shard(0)]
    assert predictions.read_metadata(predictions.list_files()[0])["classifier_id"] == "aaa"


def test_a_write_whose_response_is_lost_succeeds(store: ObjectStore) -> None:
    predictions = open_store(make_uri("out"))
    store.fail_first(1, LOST)
    rows = make_rows("a")
    assert write(predictions, 0, rows) is rows
    assert read_names(store) == ["a"]


def test_a_stalled_write_fails_after_its_shard_was_closed(store: ObjectStore) -> None:
    predictions = open_store(make_uri("out"))
    write(predictions, 0, make_rows("a"))
    stall = StalledWrites(lambda environ: "000001.parquet" in environ["PATH_INFO"])
    store.fail = stall
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(write, predictions, 1, make_rows("b"))
        while not stall.stalled:
            time.sleep(0.01)
        stall.is_open = True
        assert predictions.close(predictions.describe_wave(Wave("run", 0, 0, 3))) == 2
        assert set(stall.let_go()) == {412}
        with pytest.raises(LockLostError, match="Another run has taken over"):
            late.result()
    assert read_names(store) == ["a"]
    assert store.list_keys() == [name_shard(shard) for shard in range(3)]


def test_either_a_stalled_write_or_the_closing_of_its_shard_succeeds(store: ObjectStore) -> None:
    predictions = open_store(make_uri("out"))
    stall = StalledWrites(lambda environ: "000001.parquet" in environ["PATH_INFO"])
    store.fail = stall
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(write, predictions, 1, make_rows("b"))
        while not stall.stalled:
            time.sleep(0.01)
        closing = pool.submit(predictions.close, predictions.describe_wave(Wave("run", 0, 0, 3)))
        while len(stall.stalled) < 2:  # close() has listed the files without the stalled one
            time.sleep(0.01)
        assert sorted(set(stall.let_go())) == [200, 412]
        closing.result()
        try:
            written = first.result()["scan_uri"].to_pylist()
        except LockLostError:
            written = []
    assert read_names(store) == written
    assert len(store.list_keys()) == 3


# --------------------------------------------------------------------------- Google Cloud Storage


def test_google_cloud_storage_uses_the_same_functions() -> None:
    storage._open_gcs.cache_clear()
    filesystem, path = storage.resolve(
        storage.join("gs://anonymous@bucket/runs?scheme=http", "a b", "50%#?.jpg")
    )
    assert (filesystem.type_name, path) == ("gcs", "bucket/runs/a b/50%#?.jpg")
    assert pickle.loads(pickle.dumps(filesystem)).equals(filesystem)
    assert storage.resolve("gcs://anonymous@bucket/x")[1] == "bucket/x"
    closed = "endpoint_override=127.0.0.1:1&scheme=http&retry_limit_seconds=1"
    with pytest.raises(StorageError, match=r"Cannot read 'gs://.*: .*UNAVAILABLE") as caught:
        storage.read_bytes(f"gs://anonymous@bucket/x?{closed}")
    assert "\n" not in str(caught.value)
    assert "error_info" not in str(caught.value)
