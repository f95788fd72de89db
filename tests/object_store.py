"""A local S3 bucket: moto's server, with a wrapper that records requests and injects faults."""

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
"""A fault: the connection ends without a response. Other faults are responses: (status, code)."""
LOST = "lost"
"""A fault: the request is carried out, then the connection ends without a response."""

STATUS = "tests.status"
"""Key in the WSGI environment of a request: the status of its response, once there is one."""
BODY = "tests.body"
"""Key in the WSGI environment of a write that :class:`StalledWrites` has read: its body."""

Environ = dict[str, Any]
Fault = str | tuple[int, str] | None


class ObjectStore:
    """A server; its clients get ``url`` as AWS_ENDPOINT_URL."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        """Method and path of every request."""
        self.headers: list[Environ] = []
        """WSGI environment of every request; has :data:`STATUS` if there was a response."""
        self.fail: Callable[[Environ], Fault] = lambda _: None
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._one_at_a_time = threading.Lock()
        self.server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:  # noqa: ANN401
        query = environ["QUERY_STRING"]
        target = environ["PATH_INFO"] + (f"?{query}" if query else "")
        self.requests.append(f"{environ['REQUEST_METHOD']} {target}")
        self.headers.append(environ)
        fault = self.fail(environ)
        if fault in (None, LOST):
            # moto 5.2 checks the condition of a write and then writes: the two are not atomic.
            with self._one_at_a_time:
                start = _note_status(environ, start_response)
                response: Iterable[bytes] = self._moto(environ, start)
            if fault is None:
                return response
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
        """Environment variables for clients of this server, as AWS's own tools read them."""
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
        """Read the rows that bulk runs have written to an output."""
        keys = [key for key in self.list_keys() if key.startswith(f"{output}/predictions/")]
        tables = [pq.read_table(pa.BufferReader(self.get(key))) for key in keys]
        return [row for table in tables for row in table.to_pylist()]

    def put_folder(self, folder: Path, prefix: str) -> None:
        """Upload the files of a folder."""
        for file in folder.rglob("*.*"):
            self.put(f"{prefix}/{file.relative_to(folder)}", file.read_bytes())

    def fail_first(self, count: int, fault: Fault) -> None:
        """Fail the next ``count`` requests."""
        left = iter([fault] * count)
        self.fail = lambda _: next(left, None)

    def forget(self) -> None:
        """Clear the recorded requests, and stop injecting faults."""
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
        """Open the server as an administrator, without brainray's storage code."""
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
    """Delays the writes of some keys, as a network does, until :meth:`let_go` is called.

    Assign it to ``ObjectStore.fail``. A delayed write has arrived: its client may disconnect.
    """

    def __init__(self, matches: Callable[[Environ], bool]) -> None:
        self._matches = matches
        self._released = threading.Event()
        self.stalled: list[Environ] = []
        """Requests that are, or were, delayed."""
        self.is_open = False
        """Whether further writes pass without delay."""

    def __call__(self, environ: Environ) -> Fault:
        size = int(environ.get("CONTENT_LENGTH") or 0)  # pyarrow sends none; it writes in chunks
        if environ["REQUEST_METHOD"] != "PUT" or self.is_open or not size:
            return None
        body = environ["wsgi.input"].read(size)
        environ["wsgi.input"] = io.BytesIO(body)
        environ[BODY] = body
        if self._matches(environ):
            self.stalled.append(environ)
            self._released.wait(600)
        return None

    def let_go(self) -> list[int]:
        """Let the delayed writes continue; return the status of the response to each."""
        self.is_open = True
        self._released.set()
        deadline = time.monotonic() + 60
        while not all(STATUS in environ for environ in self.stalled):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return [environ[STATUS] for environ in self.stalled]


class Quiet(WSGIRequestHandler):
    def log(self, *_: object, **__: object) -> None:
        """Log nothing."""


@contextmanager
def serve_objects() -> Iterator[ObjectStore]:
    """Serve one empty bucket on loopback."""
    store = ObjectStore()
    poll_s = 0.01  # a shutdown waits for this long
    thread = threading.Thread(target=store.server.serve_forever, args=(poll_s,), daemon=True)
    thread.start()
    # moto's state belongs to the process, not to a server.
    urlopen(Request(f"{store.url}/moto-api/reset", method="POST"), timeout=60).close()
    store.open().create_dir(BUCKET)
    try:
        yield store
    finally:
        store.server.shutdown()
        thread.join()
        store.server.server_close()
