"""A bucket on this machine: moto's S3, behind what counts requests and fails some of them."""

import socket
import threading
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

Environ = dict[str, Any]
Fault = str | tuple[int, str] | None


class ObjectStore:
    """One server; ``url`` is what AWS_ENDPOINT_URL gives to those that use it."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        """Method and path of every request."""
        self.headers: list[Environ] = []
        """Their WSGI environments."""
        self.fail: Callable[[Environ], Fault] = lambda _: None
        self._moto = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:  # noqa: ANN401
        query = environ["QUERY_STRING"]
        place = environ["PATH_INFO"] + (f"?{query}" if query else "")
        self.requests.append(f"{environ['REQUEST_METHOD']} {place}")
        self.headers.append(environ)
        fault = self.fail(environ)
        if fault is None:
            answer: Iterable[bytes] = self._moto(environ, start_response)
            return answer
        if fault == CUT:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
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

    def read_answers(self, output: str) -> list[dict[str, Any]]:
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


class _Quiet(WSGIRequestHandler):
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
