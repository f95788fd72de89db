"""Output locks: one run holds an output, despite faults, and its state passes to the next run."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from werkzeug.serving import make_server

from brainray.errors import ConfigError, LockLostError, StorageError
from brainray.io import conditional, storage
from brainray.io import lock as lock_module
from brainray.io.lock import OutputLock, hold_output
from tests.object_store import (
    BUCKET,
    CUT,
    LOST,
    Environ,
    Fault,
    ObjectStore,
    Quiet,
    serve_objects,
)

NUM_THREADS = 8
LONG_S = 1000.0

HOLDER = """
import sys
from brainray.errors import LockLostError
from brainray.io import lock

lock.LEASE_LIFE_S, lock.LEASE_RENEWAL_S = float(sys.argv[2]), float(sys.argv[3])
with lock.hold_output(sys.argv[1]) as held:
    held.update({"wave": "first"})
    print("held", flush=True)
    sys.stdin.readline()
    for act in (lambda: held.update({"wave": "late"}), held.check):
        try:
            act()
            print("done", flush=True)
        except LockLostError as error:
            print(f"lost: {error}", flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with serve_objects() as store:
        yield store


@pytest.fixture
def store(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """Set the AWS variables for an empty bucket."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.forget()
    server.open().delete_dir_contents(BUCKET)
    server.forget()
    return server


@pytest.fixture(params=["disk", "bucket"])
def output_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URI of an output on each kind of storage."""
    if request.param == "disk":
        return str(tmp_path / "out")
    request.getfixturevalue("store")
    return OUT


OUT = f"s3://{BUCKET}/out"
LEASE = f"/{BUCKET}/out/.lock"


def read_lease_bytes() -> bytes:
    """Read the lease in one request: it may be renewed between two."""
    return conditional.read_object(f"{OUT}/.lock")[0]


def read_lease() -> dict[str, Any]:
    return dict(json.loads(read_lease_bytes()))


def is_write(environ: Environ) -> bool:
    return bool(environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"] == LEASE)


def expire_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every lease count as expired."""
    monkeypatch.setattr(lock_module, "LEASE_LIFE_S", 0.0)


def keep_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "LEASE_LIFE_S", LONG_S)


def start_holder(output_uri: str, life_s: float, renewal_s: float) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, output_uri, str(life_s), str(renewal_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


# ---------------------------------------------------------------------------------- disk and bucket


def test_a_second_run_is_refused_and_a_later_run_gets_the_state(output_uri: str) -> None:
    with hold_output(output_uri) as first:
        assert first.state == {}
        with (
            pytest.raises(ConfigError, match=f"Another run is writing.*process {os.getpid()} on"),
            hold_output(output_uri),
        ):
            pass
        first.update({"wave": 1, "parts": ["a", "b"]})
        first.update({"wave": 2})
        assert first.state == {"wave": 2}
    with hold_output(output_uri) as second:
        assert second.state == {"wave": 2}
    with hold_output(output_uri) as third:
        assert third.state == {"wave": 2}, "a run without updates keeps the state"
    for former in (first, second):
        with pytest.raises(LockLostError, match=r"has released"):
            former.update({"wave": 3})
        with pytest.raises(LockLostError):
            former.check()
    with hold_output(output_uri) as fourth:
        assert fourth.state == {"wave": 2}


def test_changing_an_object_after_an_update_does_not_change_the_state(
    output_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "LEASE_RENEWAL_S", 0.01)
    with hold_output(output_uri) as held:
        given = {"parts": ["a"]}
        held.update(given)
        given["parts"].append("b")
        held.state["parts"].append("c")
        time.sleep(0.1)
        with pytest.raises(ValueError, match="JSON"):
            held.update({"score": float("nan")})
    with hold_output(output_uri) as after:
        assert after.state == {"parts": ["a"]}


def test_an_output_that_cannot_be_written_is_rejected(tmp_path: Path, store: ObjectStore) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="Cannot write"), hold_output(str(tmp_path / "file")):
        pass
    (tmp_path / "out" / ".lock").mkdir(parents=True)
    with pytest.raises(StorageError, match="Cannot open"), hold_output(str(tmp_path / "out")):
        pass
    with pytest.raises(StorageError, match="no such bucket"), hold_output("s3://no-such-bucket/o"):
        pass
    store.put("out/.lock", b"[]")
    with pytest.raises(StorageError, match="is not a lock of brainray"), hold_output(OUT):
        pass
    assert read_lease_bytes() == b"[]"


# --------------------------------------------------------------------------------------------- disk


def test_a_killed_process_releases_its_output_and_keeps_its_state(tmp_path: Path) -> None:
    process = start_holder(str(tmp_path), LONG_S, LONG_S)
    with (
        pytest.raises(ConfigError, match=f"process {process.pid} on"),
        hold_output(str(tmp_path)),
    ):
        pass
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(ConfigError), hold_output(str(tmp_path)):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with hold_output(str(tmp_path)) as held:
        assert held.state == {"wave": "first"}
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".state.json"}


# ------------------------------------------------------------------------------ acquiring the lease


@pytest.mark.parametrize("found", ["nothing", "expired", "released"])
def test_one_of_several_concurrent_runs_gets_the_lease(store: ObjectStore, found: str) -> None:
    if found != "nothing":
        with hold_output(OUT) as before:
            before.update({"wave": 1})
        if found == "expired":
            left = read_lease() | {"released": False}
            left["renewed_unix_s"] -= lock_module.LEASE_LIFE_S + 1
            store.put("out/.lock", json.dumps(left).encode())
    barrier = threading.Barrier(NUM_THREADS)
    refused = threading.Semaphore(0)

    def hold() -> dict[str, Any] | None:
        barrier.wait()
        try:
            with hold_output(OUT) as held:
                for _ in range(NUM_THREADS - 1):
                    assert refused.acquire(timeout=10), "another thread holds it as well"
                held.update(held.state | {"holder": threading.get_ident()})
                return held.state
        except ConfigError:
            refused.release()
            return None

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        states = [future.result() for future in [pool.submit(hold) for _ in range(NUM_THREADS)]]
    (state,) = filter(None, states)
    assert read_lease()["state"] == state
    assert state.get("wave") == (None if found == "nothing" else 1)


def test_a_run_is_refused_a_fresh_lease_and_takes_over_an_expired_one(
    store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    """The leases are as of earlier releases, without ``state`` and ``released``."""
    other = {"host": "far", "pid": 7, "id": "other"}
    fresh = other | {"renewed_unix_s": time.time() - lock_module.LEASE_LIFE_S + 10}
    store.put("out/.lock", json.dumps(fresh).encode())
    with pytest.raises(ConfigError, match=r"\(process 7 on far\)"), hold_output(OUT):
        pass
    assert json.loads(read_lease_bytes()) == fresh
    stale = other | {"renewed_unix_s": time.time() - lock_module.LEASE_LIFE_S - 1}
    store.put("out/.lock", json.dumps(stale).encode())
    with hold_output(OUT) as held:
        assert held.state == {}
        assert "from process 7 on far" in caplog.text
        held.check()
    assert read_lease()["released"] is True


def test_all_writes_of_a_lease_are_conditional_and_it_is_not_deleted(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "LEASE_RENEWAL_S", 0.05)
    for wave in (1, 2):
        with hold_output(OUT) as held:
            held.update({"wave": wave})
            time.sleep(0.15)
    of_lease = [environ for environ in store.headers if environ["PATH_INFO"] == LEASE]
    writes = [environ for environ in of_lease if is_write(environ)]
    assert len(writes) > 2 * 3
    assert all({"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"} & environ.keys() for environ in writes)
    assert {environ["REQUEST_METHOD"] for environ in of_lease} == {"GET", "HEAD", "PUT"}


@pytest.mark.parametrize("ignored", ["HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"])
def test_a_service_that_ignores_conditions_is_rejected(store: ObjectStore, ignored: str) -> None:
    def ignore(environ: Environ) -> Fault:
        environ.pop(ignored, None)
        return None

    store.fail = ignore
    with pytest.raises(StorageError, match="does not support conditional writes"), hold_output(OUT):
        pass


# --------------------------------------------------------------------------------- renewal and loss


def test_a_lease_is_renewed_after_a_fault(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "LEASE_RENEWAL_S", 0.05)
    with hold_output(OUT) as held:
        began, before = time.monotonic(), read_lease()["renewed_unix_s"]
        store.fail = lambda _: (403, "AccessDenied")
        seen = len(store.requests)
        deadline = time.monotonic() + 10
        while len(store.requests) < seen + 2:
            assert time.monotonic() < deadline, "no attempt to renew the lease"
            time.sleep(0.01)
        store.forget()
        while read_lease()["renewed_unix_s"] <= before:
            assert time.monotonic() < deadline, "the lease was not renewed after the fault"
            time.sleep(0.05)
        time.sleep(0.4)
        monkeypatch.setattr(lock_module, "LEASE_LIFE_S", time.monotonic() - began)
        held.check()  # it was renewed since it began
        held.update({"wave": 1})
        with pytest.raises(ConfigError), hold_output(OUT):
            pass


def test_a_lease_that_cannot_be_renewed_is_lost_when_it_expires(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "LEASE_RENEWAL_S", 0.05)
    with hold_output(OUT) as held:
        held.update({"wave": 1})
        monkeypatch.setattr(lock_module, "LEASE_LIFE_S", 0.4)
        store.fail = lambda environ: (403, "AccessDenied") if is_write(environ) else None
        started = time.monotonic()
        with pytest.raises(LockLostError, match="could not renew"):
            check_for(held, 10)
        assert time.monotonic() - started >= 0.3
        assert isinstance(held, lock_module._Lease)
        with held._writing:  # no renewal is under way any more
            store.forget()
        keep_leases(monkeypatch)
        with pytest.raises(LockLostError):
            held.update({"wave": 2})
        time.sleep(0.2)
        with pytest.raises(LockLostError):
            held.check()
        assert not any(request.startswith("PUT") for request in store.requests)
    with hold_output(OUT) as after:  # no other run had taken it over, so it was released
        assert after.state == {"wave": 1}


def check_for(held: OutputLock, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        held.check()
        time.sleep(0.01)


@pytest.mark.usefixtures("store")
def test_a_holder_that_was_replaced_raises_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep_leases(monkeypatch)
    with hold_output(OUT) as first:
        first.update({"wave": 1})
        with take_over(monkeypatch) as second:
            assert second.state == {"wave": 1}
            second.update({"wave": 2})
            before = read_lease_bytes()
            first.check()  # it has not read the lease again
            assert isinstance(first, lock_module._Lease)
            first.renew()
            with pytest.raises(LockLostError, match=f"was taken over by process {os.getpid()}"):
                first.check()
            with pytest.raises(LockLostError):
                first.update({"wave": "late"})
            assert read_lease_bytes() == before

            with take_over(monkeypatch) as third:
                before = read_lease_bytes()
                with pytest.raises(LockLostError, match="was taken over"):
                    second.update({"wave": "late"})
                assert read_lease_bytes() == before
                third.update(third.state | {"third": True})
    assert read_lease()["state"] == {"wave": 2, "third": True}


@pytest.mark.usefixtures("store")
def test_a_former_holder_does_not_release_the_lease_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep_leases(monkeypatch)
    with ExitStack() as former:
        former.enter_context(hold_output(OUT)).update({"wave": 1})
        with take_over(monkeypatch) as held:
            before = read_lease_bytes()
            former.close()
            assert read_lease_bytes() == before
            with pytest.raises(ConfigError), hold_output(OUT):
                pass
            held.update({"wave": 2})
    assert read_lease()["released"] is True


def test_a_deleted_lock_is_lost(store: ObjectStore) -> None:
    with hold_output(OUT) as held:
        storage.delete_file(f"{OUT}/.lock")
        with pytest.raises(LockLostError, match="deleted"):
            held.update({"wave": 1})
    assert store.list_keys() == []


@contextmanager
def take_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[OutputLock]:
    """Take over the output: its lease counts as expired until it is acquired."""
    expire_leases(monkeypatch)
    with hold_output(OUT) as lock:
        keep_leases(monkeypatch)
        yield lock


# ----------------------------------------------------------- suspended processes and stalled writes


@pytest.mark.parametrize("knows", ["by its clock", "by asking"])
def test_a_process_suspended_beyond_its_lease_writes_nothing(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, knows: str
) -> None:
    life_s, renewal_s = (0.5, 0.1) if knows == "by its clock" else (LONG_S, LONG_S)
    former = start_holder(OUT, life_s, renewal_s)
    try:
        os.kill(former.pid, signal.SIGSTOP)
        if knows == "by its clock":
            time.sleep(life_s + 0.1)
        with take_over(monkeypatch) as held:
            assert held.state == {"wave": "first"}
            held.update({"wave": "second"})
            before = read_lease_bytes()
            store.forget()
            os.kill(former.pid, signal.SIGCONT)
            printed, _ = former.communicate("go on\n", timeout=30)
            update, check = printed.splitlines()
            assert update.startswith("lost: ")
            assert check.startswith("lost: ")
            if knows == "by asking":
                assert f"taken over by process {os.getpid()}" in update
                assert sum(map(is_write, store.headers)) >= 1
            assert read_lease_bytes() == before
            held.update({"wave": "third"})
        assert read_lease()["state"] == {"wave": "third"}
    finally:
        former.kill()
        former.wait()


def stall_a_write(store: ObjectStore) -> tuple[threading.Event, threading.Event]:
    """Stall the next write of the lease in the server; return the events arrived and go_on."""
    arrived, go_on, stalled = threading.Event(), threading.Event(), iter([True])

    def stall(environ: Environ) -> Fault:
        if is_write(environ) and next(stalled, False):
            arrived.set()
            assert go_on.wait(20)
        return None

    store.fail = stall
    return arrived, go_on


@pytest.mark.parametrize("action", ["update", "renewal", "release"])
def test_a_write_in_progress_during_a_takeover_has_no_effect(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    keep_leases(monkeypatch)
    with ExitStack() as former, ThreadPoolExecutor(1) as pool:
        lock = former.enter_context(hold_output(OUT))
        assert isinstance(lock, lock_module._Lease)
        lock.update({"wave": "first"})
        actions: dict[str, Callable[[], object]] = {
            "update": lambda: lock.update({"wave": "late"}),
            "renewal": lock.renew,
            "release": former.close,
        }
        arrived, go_on = stall_a_write(store)
        pending = pool.submit(actions[action])
        assert arrived.wait(10)
        with take_over(monkeypatch) as held:
            held.update(held.state | {"second": True})
            before = read_lease_bytes()
            go_on.set()
            if action == "update":
                with pytest.raises(LockLostError, match="was taken over"):
                    pending.result(10)
            else:
                pending.result(10)
            with pytest.raises(LockLostError):
                lock.check()
            assert read_lease_bytes() == before
        assert read_lease()["state"] == {"wave": "first", "second": True}


def test_a_renewal_in_progress_does_not_undo_an_update(store: ObjectStore) -> None:
    with hold_output(OUT) as held, ThreadPoolExecutor(2) as pool:
        assert isinstance(held, lock_module._Lease)
        held.update({"wave": 1})
        arrived, go_on = stall_a_write(store)
        renewing = pool.submit(held.renew)
        assert arrived.wait(10)
        updating = pool.submit(held.update, {"wave": 2})
        time.sleep(0.3)  # enough for an update that does not wait
        go_on.set()
        renewing.result(10)
        updating.result(10)
        assert read_lease()["state"] == {"wave": 2}
        held.check()


def test_a_lost_response_does_not_lose_the_lock(store: ObjectStore) -> None:
    """Obstore retries, and the condition fails because its first write was done."""
    faults: list[Fault] = []
    store.fail = lambda environ: faults.pop() if faults and is_write(environ) else None
    faults.append(LOST)
    with hold_output(OUT) as held:
        assert not faults
        for fault in (LOST, CUT):
            faults.append(fault)
            held.update({"after": fault})
            assert not faults
            assert read_lease()["state"] == {"after": fault}
        held.check()
        faults.append(LOST)
    assert not faults
    assert read_lease()["released"] is True
    with hold_output(OUT) as after:
        assert after.state == {"after": CUT}


def test_the_holder_keeps_the_lock_if_no_response_arrives(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditional, "MAX_ATTEMPTS", 1)
    conditional._open_s3.cache_clear()
    with hold_output(OUT) as held:
        held.update({"wave": 1})
        store.fail_first(1, LOST)
        with pytest.raises(StorageError, match="Cannot write"):
            held.update({"wave": 2})
        held.check()
        assert held.state == {"wave": 1}
        held.update({"wave": 3})
    assert read_lease()["state"] == {"wave": 3}
    conditional._open_s3.cache_clear()


# ---------------------------------------------------------------------------------- creating a file


@pytest.fixture(params=["disk", "disk without links", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URI of a folder on each kind of storage."""
    if request.param == "bucket":
        request.getfixturevalue("store")
        return OUT

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if request.param == "disk without links":
        monkeypatch.setattr(os, "link", refuse)
    return str(tmp_path / "out")


def test_a_file_is_created_once(folder: str) -> None:
    uri = storage.join(folder, "a", "b c.parquet")
    assert conditional.create_bytes(uri, b"first") is True
    assert conditional.create_bytes(uri, b"second") is False
    assert conditional.create_bytes(uri, b"first") is False
    assert storage.read_bytes(uri) == b"first"
    assert [file.relative_path for file in storage.list_files(folder)] == ["a/b c.parquet"]


@pytest.mark.parametrize("same", [False, True])
def test_one_of_several_concurrent_writers_creates_a_file(folder: str, *, same: bool) -> None:
    barrier = threading.Barrier(NUM_THREADS)

    def create(number: int) -> list[bool]:
        created = []
        for name in ("x", "y", "z"):
            barrier.wait()
            content = b"same" if same else f"{number}".encode() * 10_000
            created.append(conditional.create_bytes(storage.join(folder, name), content))
        return created

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        created = list(pool.map(create, range(NUM_THREADS)))
    for name, of_name in zip(("x", "y", "z"), zip(*created, strict=True), strict=True):
        assert sum(of_name) == 1
        expected = b"same" if same else f"{of_name.index(True)}".encode() * 10_000
        assert storage.read_bytes(storage.join(folder, name)) == expected
    assert len(storage.list_files(folder)) == 3


def test_the_error_for_a_file_that_cannot_be_created_names_it(
    tmp_path: Path, store: ObjectStore
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=f"Cannot write '{tmp_path}/file/x'"):
        conditional.create_bytes(f"{tmp_path}/file/x", b"")
    with pytest.raises(StorageError, match="no such bucket"):
        conditional.create_bytes("s3://no-such-bucket/x", b"")
    store.fail = lambda _: (403, "AccessDenied")
    with pytest.raises(StorageError, match=r"access is denied\. Give credentials") as caught:
        conditional.create_bytes(f"{OUT}/x", b"")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", [LOST, CUT, (503, "SlowDown"), (409, "Conflict")], ids=str)
def test_a_file_is_created_despite_a_fault(store: ObjectStore, fault: Fault) -> None:
    store.fail_first(1, fault)
    assert conditional.create_bytes(f"{OUT}/x", b"content") is True
    assert store.get("out/x") == b"content"


def test_a_file_is_created_after_a_request_timed_out(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditional, "TIMEOUT_S", 0.5)
    conditional._open_s3.cache_clear()
    silent, ended = iter([True]), threading.Event()

    def stall(environ: Environ) -> Fault:
        if environ["REQUEST_METHOD"] == "PUT" and next(silent, False):
            ended.wait(10)
        return None

    store.fail = stall
    try:
        assert conditional.create_bytes(f"{OUT}/x", b"content") is True
        assert sum(environ["REQUEST_METHOD"] == "PUT" for environ in store.headers) == 2
    finally:
        ended.set()
        conditional._open_s3.cache_clear()


# ----------------------------------------------------------------------------- Google Cloud Storage


def test_google_cloud_storage_uses_generations_as_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fake service that numbers generations, and gives all objects the same ETag."""
    objects: dict[str, tuple[int, bytes, dict[str, str]]] = {}

    def serve(environ: Environ, start_response: Any) -> list[bytes]:  # noqa: ANN401
        key = environ["PATH_INFO"]
        generation, content, about = objects.get(key, (0, b"", {}))
        status = "200 OK"
        if environ["REQUEST_METHOD"] == "PUT":
            wanted = environ["HTTP_X_GOOG_IF_GENERATION_MATCH"]
            sent = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            if int(wanted) == generation:
                names = [name for name in environ if name.startswith("HTTP_X_GOOG_META_")]
                about = {name[5:].replace("_", "-").lower(): environ[name] for name in names}
                generation, content = generation + 1, b""
                objects[key] = generation, sent, about
            else:
                status, content = "412 Precondition Failed", b""
        elif not generation:
            status = "404 Not Found"
        headers = [
            ("ETag", '"same"'),
            ("x-goog-generation", f"{generation}"),
            ("Last-Modified", "Sat, 28 Nov 2026 12:00:00 GMT"),
            ("Content-Length", f"{len(content)}"),
            *about.items(),
        ]
        start_response(status, headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [content]

    monkeypatch.setattr(storage, "check_writable", lambda _: None)  # the fake lacks its requests
    service = make_server("127.0.0.1", 0, serve, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=service.serve_forever, daemon=True)
    thread.start()
    out = f"gs://anonymous@bucket/out?scheme=http&endpoint_override=127.0.0.1:{service.server_port}"
    try:
        keep_leases(monkeypatch)
        with ExitStack() as former:
            lock = former.enter_context(hold_output(out))
            lock.update({"wave": 1})
            with pytest.raises(ConfigError), hold_output(out):
                pass
            expire_leases(monkeypatch)
            with hold_output(out) as held:
                keep_leases(monkeypatch)
                held.update(held.state | {"second": True})
                with pytest.raises(LockLostError, match="was taken over"):
                    lock.update({"wave": "late"})
                former.close()
                held.check()
        lease = json.loads(objects["/bucket/out/.lock"][1])
        assert (lease["state"], lease["released"]) == ({"wave": 1, "second": True}, True)
        uri = storage.join(out, "x")
        assert [conditional.create_bytes(uri, b"1"), conditional.create_bytes(uri, b"2")] == [
            True,
            False,
        ]
        assert objects["/bucket/out/x"][1] == b"1"
    finally:
        service.shutdown()
        thread.join()
        service.server_close()
