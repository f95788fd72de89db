"""Downloading the public data set, from a fake server for Kaggle and its storage."""

import base64
import hashlib
import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from kagglesdk import kaggle_env

from brainray import cli
from brainray.data import kaggle
from brainray.data.kaggle import SUMS_FILE, FetchJob, KaggleSet, fetch_kaggle_set
from brainray.errors import DataError, StorageError

SET = KaggleSet(
    handle="someone/some-scans",
    version=3,
    licence="CC0 1.0, public domain",
    url="https://example.org/some-scans",
    counts={"Training/a": 3, "Training/b": 2, "Testing/a": 1, "Testing/b": 1},
)

REPEATS = 30_000
"""Makes each file some hundred kilobytes long, so that a download can break in the middle."""


def pack(counts: dict[str, int]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for folder, count in counts.items():
            for number in range(count):
                file.writestr(f"{folder}/{number}.jpg", f"{folder} {number} ".encode() * REPEATS)
    return archive.getvalue()


@dataclass
class FakeKaggle:
    """Kaggle's server; it redirects to a storage that supports ranges and sends an MD5."""

    archive: bytes = field(default_factory=lambda: pack(dict(SET.counts)))
    md5_of: bytes | None = None
    status: int = 302
    cut_at: int | None = None
    """Number of bytes of a body after which the connection breaks, once."""
    ranges: list[str | None] = field(default_factory=list)
    """Requested range of each download."""
    api_requests: list[bytes] = field(default_factory=list)
    """Body of each request to the API."""

    def answer_api(self, handler: BaseHTTPRequestHandler) -> None:
        self.api_requests.append(handler.rfile.read(int(handler.headers["Content-Length"])))
        handler.send_response(self.status)
        if self.status == 302:
            handler.send_header("Location", "/storage/archive.zip")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def answer_storage(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        body = self.archive[start:]
        md5 = hashlib.md5(self.archive if self.md5_of is None else self.md5_of).digest()
        handler.send_response(206 if wanted else 200)
        handler.send_header("Accept-Ranges", "bytes")
        handler.send_header("X-Goog-Hash", f"crc32c=AAAAAA==,md5={base64.b64encode(md5).decode()}")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        cut, self.cut_at = self.cut_at, None
        handler.wfile.write(body[:cut])
        if cut is not None:
            handler.close_connection = True


@pytest.fixture
def fake_kaggle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeKaggle]:
    fake = FakeKaggle()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            fake.answer_api(self)

        def do_GET(self) -> None:
            fake.answer_storage(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    poll_s = 0.01  # shutdown() waits this long
    threading.Thread(target=server.serve_forever, args=(poll_s,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, endpoint)
    # The original inspects every frame of the stack, for 0.3 s.
    monkeypatch.setattr("kagglehub.clients.get_user_agent", lambda: "kagglehub")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # without the credentials of the user
    monkeypatch.delenv("KAGGLE_API_TOKEN", raising=False)
    monkeypatch.setenv("KAGGLEHUB_CACHE", "")  # a fetch changes it; restored after the test
    yield fake
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(tmp_path: Path) -> Callable[..., tuple[str, list[str]]]:
    def run(sha256: str | None = None, kaggle_set: KaggleSet = SET) -> tuple[str, list[str]]:
        lines: list[str] = []
        job = FetchJob(data_path=str(tmp_path / "scans"), sha256=sha256)
        return fetch_kaggle_set(job, lines.append, kaggle_set), lines

    return run


def list_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_fetch_writes_every_file_and_a_list_for_sha256sum(
    fake_kaggle: FakeKaggle, fetch: Callable[..., tuple[str, list[str]]], tmp_path: Path
) -> None:
    digest, lines = fetch()
    folder = tmp_path / "scans"
    assert list_names(folder) == [SUMS_FILE, "Testing", "Training"]
    assert (folder / "Training/a/2.jpg").read_bytes() == b"Training/a 2 " * REPEATS
    listed = (folder / SUMS_FILE).read_bytes()
    assert hashlib.sha256(listed).hexdigest() == digest
    for line in listed.decode().splitlines():
        expected, _, path = line.partition("  ")
        assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == expected
    assert len(listed.splitlines()) == 7
    assert "CC0" in lines[0]
    assert "7 images" in lines[1]
    assert digest in lines[2]
    assert list_names(tmp_path) == ["scans"], "the download left something behind"
    assert b'"someone"' in fake_kaggle.api_requests[0]
    assert b'"some-scans"' in fake_kaggle.api_requests[0]
    assert b"3" in fake_kaggle.api_requests[0]


def test_a_broken_download_is_resumed(
    fake_kaggle: FakeKaggle, fetch: Callable[..., tuple[str, list[str]]], tmp_path: Path
) -> None:
    fake_kaggle.cut_at = 3 * 2**19
    with pytest.raises(StorageError, match="same command to resume it"):
        fetch()
    assert not (tmp_path / "scans").exists()
    fetch()
    assert fake_kaggle.ranges[-1] == f"bytes={2**20}-", "kagglehub writes whole MiB"
    assert (tmp_path / "scans/Testing/b/0.jpg").read_bytes() == b"Testing/b 0 " * REPEATS


def test_fetched_files_are_verified_and_not_downloaded_again(
    fake_kaggle: FakeKaggle, fetch: Callable[..., tuple[str, list[str]]], tmp_path: Path
) -> None:
    digest, _ = fetch()
    assert fetch(sha256=digest.upper())[0] == digest
    assert len(fake_kaggle.ranges) == 1
    (tmp_path / "scans/Training/b/1.jpg").write_bytes(b"another scan")
    with pytest.raises(DataError, match=r"1 files .* Training/b/1\.jpg"):
        fetch()
    (tmp_path / "scans/Training/b/1.jpg").unlink()
    with pytest.raises(DataError, match=r"Training/b 1 of 2"):
        fetch()
    assert (tmp_path / "scans/Training/b/0.jpg").exists()


def test_an_unexpected_digest_is_rejected(
    fake_kaggle: FakeKaggle,  # noqa: ARG001 - runs the server
    fetch: Callable[..., tuple[str, list[str]]],
) -> None:
    with pytest.raises(DataError, match=r"Expected SHA-256 .*, got "):
        fetch(sha256="0" * 64)


def test_files_added_by_hand_are_counted_and_listed(
    fake_kaggle: FakeKaggle, fetch: Callable[..., tuple[str, list[str]]], tmp_path: Path
) -> None:
    fake_kaggle.status = 503  # nothing is downloaded
    with zipfile.ZipFile(io.BytesIO(pack(dict(SET.counts)))) as archive:
        archive.extractall(tmp_path / "scans")
    digest, _ = fetch()
    assert fetch(sha256=digest)[0] == digest
    (tmp_path / "scans" / SUMS_FILE).unlink()
    (tmp_path / "scans/Testing/a/0.jpg").unlink()
    with pytest.raises(DataError, match=r"Testing/a 0 of 1.*By hand: download https://example"):
        fetch()


def test_an_archive_with_another_md5_is_deleted(
    fake_kaggle: FakeKaggle, fetch: Callable[..., tuple[str, list[str]]], tmp_path: Path
) -> None:
    fake_kaggle.md5_of = b"something else"
    with pytest.raises(StorageError, match="MD5"):
        fetch()
    assert not list(tmp_path.rglob("*.archive"))
    fake_kaggle.md5_of = None
    fetch()


def test_an_archive_of_another_data_set_is_not_unpacked_to_data_path(
    fake_kaggle: FakeKaggle, fetch: Callable[..., tuple[str, list[str]]], tmp_path: Path
) -> None:
    fake_kaggle.archive = pack({**SET.counts, "Training/a": 9})
    with pytest.raises(DataError, match="Training/a 9 of 3"):
        fetch()
    assert not (tmp_path / "scans").exists()


@pytest.mark.parametrize(
    ("status", "output"), [(403, "credentials"), (404, "status 404"), (503, "status 503")]
)
def test_an_http_error_says_how_to_download_by_hand(
    status: int, output: str, fake_kaggle: FakeKaggle, fetch: Callable[..., tuple[str, list[str]]]
) -> None:
    fake_kaggle.status = status
    with pytest.raises(StorageError, match=f"{output}.*By hand: download"):
        fetch()


def test_without_a_network_the_command_says_where_to_put_the_files(
    fake_kaggle: FakeKaggle,  # noqa: ARG001 - sets the environment
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, nowhere)
    with pytest.raises(SystemExit) as end:
        cli.main(["data", "fetch", "--data-path", str(tmp_path / "scans")])
    output = capsys.readouterr()
    assert end.value.code == 2
    assert "Licence: CC0" in output.out
    assert kaggle.BRAIN_TUMOUR_MRI.url in output.err
    assert str(tmp_path / "scans" / "Training") in output.err
    assert output.err.count("\n") == 1


def test_the_public_data_set_has_the_counts_of_its_page() -> None:
    counts = kaggle.BRAIN_TUMOUR_MRI.counts
    assert sum(n for name, n in counts.items() if name.startswith("Training/")) == 5712
    assert sum(n for name, n in counts.items() if name.startswith("Testing/")) == 1311


@pytest.mark.parametrize("words", [(), ("--help",), ("push",)])
def test_the_data_command_prints_its_subcommands(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["data", *words])
    output = capsys.readouterr()
    assert "brainray data fetch" in output.out + output.err
    assert end.value.code == (0 if words == ("--help",) else 2)
