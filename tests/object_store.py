"""A bucket on this machine: moto's S3, behind what counts requests and fails some of them."""

import io
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pyarrow as pa
import pyarrow.parquet as pq
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from pyarrow import fs
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "scans"
CUT = "cut"
"""A fault: the connection ends without an answer. Others are answers: (status, code)."""
LOST = "lost"
"""A fault: what was asked for is done, then the connection ends without an answer."""

STATUS = "tests.status"
"""In the environment of a request, once it is answered: the status."""
BODY = "tests.body"
"""In the environment of a write that :class:`StalledWrites` has looked at: what it writes."""

Environ = dict[str, Any]
Fault = str | tuple[int, str] | None


class ObjectStore:
    """One server; ``url`` is what AWS_ENDPOINT_URL gives to those that use it."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        """Method and path of every request."""
        self.headers: list[Environ] = []
        """Their WSGI environments; with :data:`STATUS` where there was an answer."""
        self.fail: Callable[[Environ], Fault] = lambda _: None
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._one_at_a_time = threading.Lock()
        self.server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:  # noqa: ANN401
        query = environ["QUERY_STRING"]
        place = environ["PATH_INFO"] + (f"?{query}" if query else "")
        self.requests.append(f"{environ['REQUEST_METHOD']} {place}")
        self.headers.append(environ)
        fault = self.fail(environ)
        if fault in (None, LOST):
            # moto 5.2 looks at the condition of a write first, and writes then: not as one step.
            with self._one_at_a_time:
                answer: Iterable[bytes] = self._moto(environ, _note_status(environ, start_response))
            if fault is None:
                return answer
        if fault in (CUT, LOST):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        assert isinstance(fault, tuple)
        status, code = fault
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>m</Message></Error>"
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        start_response(f"{status} {code}", headers)
        return [body.encode()]

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find its way here, as AWS's own tools want it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def put(self, key: str, content: bytes) -> None:
        """Write an object."""
        with self.open().open_output_stream(f"{BUCKET}/{key}") as stream:
            stream.write(content)

    def get(self, key: str) -> bytes:
        """Read an object."""
        with self.open().open_input_file(f"{BUCKET}/{key}") as stream:
            return bytes(stream.read())

    def read_predictions(self, output: str) -> list[dict[str, Any]]:
        """Read the rows that a bulk run has written below an output."""
        keys = [key for key in self.list_keys() if key.startswith(f"{output}/predictions/")]
        tables = [pq.read_table(pa.BufferReader(self.get(key))) for key in keys]
        return [row for table in tables for row in table.to_pylist()]

    def put_folder(self, folder: Path, prefix: str) -> None:
        """Write the files below a folder."""
        for file in folder.rglob("*.*"):
            self.put(f"{prefix}/{file.relative_to(folder)}", file.read_bytes())

    def fail_first(self, count: int, fault: Fault) -> None:
        """Fail so many requests from now on."""
        left = iter([fault] * count)
        self.fail = lambda _: next(left, None)

    def forget(self) -> None:
        """Forget the requests so far, and fail none."""
        self.fail = lambda _: None
        self.requests.clear()
        self.headers.clear()

    def list_keys(self) -> list[str]:
        """Return the keys of all objects, sorted."""
        every = fs.FileSelector(BUCKET, recursive=True)
        return sorted(
            info.path.removeprefix(f"{BUCKET}/")
            for info in self.open().get_file_info(every)
            if info.type == fs.FileType.File
        )

    def open(self) -> fs.S3FileSystem:
        """Open the server as an administrator does, past everything of brainray's."""
        return fs.S3FileSystem(
            access_key="admin",
            secret_key="secret",
            region="us-east-1",
            endpoint_override=self.url,
            allow_bucket_creation=True,
            request_timeout=60.0,
        )


def _note_status(environ: Environ, start_response: Any) -> Any:  # noqa: ANN401 - as WSGI has it
    def start(status: str, *rest: object) -> object:
        environ[STATUS] = int(status.split()[0])
        return start_response(status, *rest)

    return start


class StalledWrites:
    """Holds back the writes of some keys, as a network does, until they are let go.

    Give it to ``ObjectStore.fail``. What is held back has arrived: its client may go away.
    """

    def __init__(self, concerns: Callable[[Environ], bool]) -> None:
        self._concerns = concerns
        self._let_go = threading.Event()
        self.stalled: list[Environ] = []
        """Requests that are, or were, held back."""
        self.is_open = False
        """Whether others of the same kind pass."""

    def __call__(self, environ: Environ) -> Fault:
        size = int(environ.get("CONTENT_LENGTH") or 0)  # pyarrow gives none; it writes in chunks
        if environ["REQUEST_METHOD"] != "PUT" or self.is_open or not size:
            return None
        body = environ["wsgi.input"].read(size)
        environ["wsgi.input"] = io.BytesIO(body)
        environ[BODY] = body
        if self._concerns(environ):
            self.stalled.append(environ)
            self._let_go.wait(600)
        return None

    def let_go(self) -> list[int]:
        """Let them go, and return what each was answered."""
        self.is_open = True
        self._let_go.set()
        deadline = time.monotonic() + 60
        while not all(STATUS in environ for environ in self.stalled):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return [environ[STATUS] for environ in self.stalled]


class Quiet(WSGIRequestHandler):
    def log(self, *_: object, **__: object) -> None:
        """Say nothing."""


@contextmanager
def serve_objects() -> Iterator[ObjectStore]:
    """Serve one empty bucket on loopback."""
    store = ObjectStore()
    poll_s = 0.01  # for which a shutdown waits
    thread = threading.Thread(target=store.server.serve_forever, args=(poll_s,), daemon=True)
    thread.start()
    # What moto holds belongs to the process, not to a server.
    urlopen(Request(f"{store.url}/moto-api/reset", method="POST"), timeout=60).close()
    store.open().create_dir(BUCKET)
    try:
        yield store
    finally:
        store.server.shutdown()
        thread.join()
        store.server.server_close()
