"""Receiving scans by C-STORE: atomic writes, access control, no identifiers, kills at any time."""

import errno
import io
import logging
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from brainray.data.scans import list_scans
from brainray.dicom_results import inbox as inbox_module
from brainray.errors import ConfigError
from brainray.images.dicom import hash_identifier
from tests.certificate import make_certificate
from tests.conftest import REPOSITORY
from tests.dicom_files import RAMP, compress, make_compressed, make_mr
from tests.identities import UID as TOKEN_UID
from tests.identities import find_tokens, plant_tokens
from tests.identities import write as write_tokens
from tests.pacs import echo, find_free_port, send

pytest.importorskip("pynetdicom")

from brainray.dicom_results.receiver import ReceiveJob, open_receiver

KEY = b"0123456789abcdef"
STUDY = "1.2.826.9"
LONG_S = 60.0
"""Longer than any test has to wait."""


def make_slice(number: int, study: str = STUDY, **elements: Any) -> bytes:  # noqa: ANN401
    return make_mr(
        **{
            "StudyInstanceUID": study,
            "SeriesInstanceUID": f"{study}.1",
            "SOPInstanceUID": f"{study}.1.{number}",
            "ImagePositionPatient": [0, 0, 5 * number],
        }
        | elements
    )


@dataclass
class Running:
    """A receiver that runs in this process."""

    inbox: Path
    port: int
    printed: list[str]

    def list_finished(self) -> list[Path]:
        """List the files that a bulk job would classify."""
        found = list_scans([str(self.inbox)])["uri"].to_pylist()
        return [Path(uri).relative_to(self.inbox) for uri in found]

    def wait_for_files(self, count: int) -> list[Path]:
        deadline = time.monotonic() + LONG_S
        while len(self.list_finished()) < count:
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.05)
        return self.list_finished()

    def list_receiving(self) -> list[Path]:
        return [file for file in (self.inbox / ".receiving").rglob("*") if file.is_file()]


@contextmanager
def run(folder: Path, **options: Any) -> Iterator[Running]:  # noqa: ANN401
    (folder / "key").write_bytes(KEY)
    chosen = {"calling_ae_titles": ("PACS",), "port": 0, "quiet_s": LONG_S} | options
    job = ReceiveJob(inbox_path=folder / "inbox", id_key_file=str(folder / "key"), **chosen)
    printed: list[str] = []
    with open_receiver(job, printed.append) as port:
        yield Running(job.inbox_path, port, printed)


# ---- storing -------------------------------------------------------------------------------------


def test_objects_are_stored_unchanged_under_hashed_names(tmp_path: Path) -> None:
    jpeg_2000 = "1.2.840.10008.1.2.4.90"
    identity = {"StudyInstanceUID": STUDY, "SeriesInstanceUID": f"{STUDY}.1"}
    sent = {
        "1.1": make_mr(**identity, SOPInstanceUID="1.1"),
        "1.2": make_mr(syntax=ImplicitVRLittleEndian, **identity, SOPInstanceUID="1.2"),
        "1.3": make_mr(syntax=ExplicitVRBigEndian, **identity, SOPInstanceUID="1.3"),
        "1.4": make_compressed(
            compress(RAMP[None], jpeg_2000), jpeg_2000, **identity, SOPInstanceUID="1.4"
        ),
    }
    with run(tmp_path, quiet_s=0.5) as receiver:
        assert send(receiver.port, *sent.values()) == [0] * 4
        found = receiver.wait_for_files(4)
    study = hash_identifier(STUDY, KEY)
    assert {str(path) for path in found} == {
        f"{study}/0001/{hash_identifier(uid, KEY)}.dcm" for uid in sent
    }
    for uid, content in sent.items():
        path = receiver.inbox / study / "0001" / f"{hash_identifier(uid, KEY)}.dcm"
        stored, original = pydicom.dcmread(path), pydicom.dcmread(io.BytesIO(content))
        assert stored == original
        assert stored.file_meta.TransferSyntaxUID == original.file_meta.TransferSyntaxUID
        assert stored.file_meta.MediaStorageSOPInstanceUID == uid
        first = bytes.fromhex("00080008" if uid == "1.3" else "08000800")  # Image Type
        assert path.read_bytes().endswith(content[content.index(first) :])
        assert path.stat().st_mode & 0o007 == 0, "other users cannot read it"


def test_a_quiet_study_is_listed_and_later_objects_are_another_round(
    tmp_path: Path,
) -> None:
    with run(tmp_path, quiet_s=1.0) as receiver:
        assert send(receiver.port, *map(make_slice, range(3))) == [0] * 3
        assert receiver.list_finished() == []
        assert len(receiver.list_receiving()) == 3
        first = receiver.wait_for_files(3)
        assert {path.parts[1] for path in first} == {"0001"}
        assert send(receiver.port, *map(make_slice, range(4))) == [0] * 4
        second = receiver.wait_for_files(4)
        assert [path.parts[1] for path in second if path not in first] == ["0002"]
        changed = make_slice(0, ImageComments="corrected")
        assert send(receiver.port, changed) == [0]
        third = receiver.wait_for_files(5)
        (new,) = set(third) - set(second)
        assert new.parts[1] == "0003"
        assert pydicom.dcmread(receiver.inbox / new).ImageComments == "corrected"
        assert send(receiver.port, make_slice(0), changed, make_slice(0, study="1.5")) == [0] * 3
        assert len(receiver.wait_for_files(6)) == 6
        assert receiver.list_receiving() == []
    assert sum(line.startswith("finished") for line in receiver.printed) == 4


def test_a_clock_that_was_set_back_does_not_delay_a_study(tmp_path: Path) -> None:
    with run(tmp_path, quiet_s=LONG_S) as receiver:
        send(receiver.port, make_slice(0))
        (folder,) = [path.parent for path in receiver.list_receiving()]
        os.utime(folder, (time.time() + 1e6, time.time() + 1e6))
    with run(tmp_path, quiet_s=LONG_S) as receiver:
        receiver.wait_for_files(1)


# ---- access and limits ---------------------------------------------------------------------------


def test_only_known_calling_and_called_ae_titles_are_accepted(tmp_path: Path) -> None:
    with run(tmp_path, calling_ae_titles=("PACS", "MR1")) as receiver:
        assert echo(receiver.port) == 0
        assert echo(receiver.port, calling="MR1") == 0
        assert echo(receiver.port, calling="OTHER") is None
        assert send(receiver.port, make_slice(0), calling="OTHER") is None
        assert send(receiver.port, make_slice(0), called="ANYBODY") is None
        assert receiver.list_receiving() == []
        assert (
            sum("refused     an association of 'OTHER'" in line for line in receiver.printed) == 2
        )
    with run(tmp_path, calling_ae_titles=(), any_caller=True) as receiver:
        assert send(receiver.port, make_slice(0), calling="OTHER") == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give --any-caller|give --any-caller"),
        ({"any_caller": True, "quiet_s": 0.0}, "positive quiet_s, got 0"),
        ({"any_caller": True, "tls_cert": "x"}, "--tls-cert and --tls-key together"),
        ({"any_caller": True, "tls_client_ca": "x"}, "--tls-cert and --tls-key together"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        ReceiveJob(inbox_path=tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ae_title": "SEVENTEEN_LETTERS"}, "AE titles of 1 to 16"),
        ({"host": "192.0.2.1"}, "Cannot listen on 192.0.2.1"),
        ({"tls_cert": "/nowhere", "tls_key": "/nowhere"}, "Cannot use --tls-cert"),
    ],
)
def test_unusable_options_are_an_error_at_the_start(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message), run(tmp_path, **options):
        pass


def test_an_inbox_has_only_one_receiver_and_one_key(tmp_path: Path) -> None:
    with run(tmp_path), pytest.raises(ConfigError, match="Another receiver"), run(tmp_path):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "inbox").rename(tmp_path / "other" / "inbox")
    (tmp_path / "other" / "key").write_bytes(KEY[::-1])
    job = ReceiveJob(
        inbox_path=tmp_path / "other" / "inbox",
        id_key_file=str(tmp_path / "other" / "key"),
        any_caller=True,
        port=0,
    )
    with pytest.raises(ConfigError, match="another key"), open_receiver(job, lambda _: None):
        pass


def test_objects_other_than_mr_images_are_accepted_only_on_request(tmp_path: Path) -> None:
    ct = make_slice(0, SOPClassUID="1.2.840.10008.5.1.4.1.1.2", Modality="CT")
    with run(tmp_path) as receiver:
        assert send(receiver.port, ct) is None
    with run(tmp_path, all_classes=True) as receiver:
        assert send(receiver.port, ct) == [0]


def test_an_object_without_its_uids_is_refused(tmp_path: Path) -> None:
    with run(tmp_path) as receiver:
        assert send(receiver.port, make_slice(0, StudyInstanceUID=None)) == [0xC000]
        assert send(receiver.port, make_slice(0, StudyInstanceUID="")) == [0xC000]
        assert receiver.list_receiving() == []
        assert send(receiver.port, make_slice(0)) == [0]


def test_an_object_that_is_too_large_ends_only_its_own_association(tmp_path: Path) -> None:
    large = make_slice(1, pixels=np.zeros((600, 600), np.uint16))
    with run(tmp_path, max_object_bytes=100_000) as receiver:
        assert send(receiver.port, make_slice(0), large, make_slice(2))[:2] == [0, -1]  # type: ignore[index]
        many = [make_slice(number) for number in range(3, 20)]
        assert send(receiver.port, *many) == [0] * 17, "the limit is for one object"
        assert len(receiver.list_receiving()) == 18
        assert sum("larger than --max-object-bytes" in line for line in receiver.printed) == 1


def test_objects_are_refused_on_a_full_disk_and_leave_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run(tmp_path, min_free_bytes=2**60) as receiver:
        assert send(receiver.port, make_slice(0)) == [0xA700]
        assert "--min-free-bytes" in receiver.printed[0]
    with run(tmp_path, min_free_bytes=0) as receiver:

        def fail(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        assert send(receiver.port, make_slice(0)) == [0xA700]
        assert receiver.list_receiving() == []
        monkeypatch.undo()
        assert send(receiver.port, make_slice(0)) == [0]


def test_associations_are_limited(tmp_path: Path) -> None:
    from pynetdicom import AE

    entity = AE("PACS")
    entity.add_requested_context("1.2.840.10008.1.1")
    with run(tmp_path, max_associations=2) as receiver:
        address = ("127.0.0.1", receiver.port)
        established = [entity.associate(*address, ae_title="BRAINRAY") for _ in range(2)]
        assert all(one.is_established for one in established)
        assert echo(receiver.port) is None
        for one in established:
            one.release()
        deadline = time.monotonic() + LONG_S
        while echo(receiver.port) != 0:  # the two may not be closed yet
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_an_idle_peer_or_a_partial_request_blocks_no_other_peer(tmp_path: Path) -> None:
    with run(tmp_path) as receiver:
        address = ("127.0.0.1", receiver.port)
        with socket.create_connection(address), socket.create_connection(address) as partial:
            partial.sendall(b"\x01\x00\x00\x00\x01\x00half a request")
            assert echo(receiver.port) == 0
            assert send(receiver.port, make_slice(0)) == [0]
    with ExitStack() as peers:
        with run(tmp_path) as receiver:
            partial = peers.enter_context(socket.create_connection(("127.0.0.1", receiver.port)))
            partial.sendall(b"\x01\x00")
            time.sleep(0.5)
            ended = time.monotonic()
        assert time.monotonic() - ended < 5, "shutdown does not wait for peers"


def test_tls_with_certificates_of_both_sides(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    client = ssl.create_default_context(cafile=str(certificate))
    options = {"tls_cert": str(certificate), "tls_key": str(key)}
    with run(tmp_path, **options) as receiver:
        idle = socket.create_connection(("127.0.0.1", receiver.port))
        assert send(receiver.port, make_slice(0), tls=client) == [0]
        assert send(receiver.port, make_slice(0)) is None, "without TLS"
        idle.close()
    with run(tmp_path, tls_client_ca=str(certificate), **options) as receiver:
        assert send(receiver.port, make_slice(1), tls=client) in (None, [-1])
        client.load_cert_chain(certificate, key)
        assert send(receiver.port, make_slice(2), tls=client) == [0]
        assert len(receiver.list_receiving()) == 2


# ---- identifiers ---------------------------------------------------------------------------------


def test_no_log_line_and_no_file_name_identifies_a_patient(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    planted = write_tokens(plant_tokens())
    other = write_tokens(plant_tokens(StudyInstanceUID=None, SOPInstanceUID=f"{TOKEN_UID}.9"))
    with run(tmp_path, quiet_s=0.5) as receiver:
        assert send(receiver.port, planted, other) == [0, 0xC000]
        receiver.wait_for_files(1)
        large = write_tokens(plant_tokens(SOPInstanceUID=f"{TOKEN_UID}.7"))
    with run(tmp_path, max_object_bytes=1000) as small:
        assert send(small.port, large) == [-1]
    records = [record for record in caplog.records if "pynetdicom" in record.name]
    assert records == []
    assert find_tokens("\n".join([*receiver.printed, *small.printed]) + caplog.text) == []
    assert find_tokens("".join(capfd.readouterr())) == []
    assert find_tokens("\n".join(str(path) for path in receiver.inbox.rglob("*"))) == []


# ---- kills ---------------------------------------------------------------------------------------


def start(inbox: Path, port: int, quiet_s: float) -> subprocess.Popen[str]:
    """Start `brainray receive`, and wait until it listens."""
    words = ["--inbox-path", inbox, "--port", port, "--quiet-s", quiet_s, "--min-free-bytes", 0]
    words += ["--calling-ae-titles", "PACS"]
    process = subprocess.Popen(
        [sys.executable, "-m", "brainray", "receive", *map(str, words)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("listening"), line + process.stdout.read()
    return process


@pytest.mark.heavy
def test_sigterm_stops_a_receiver_and_the_next_one_continues(tmp_path: Path) -> None:
    port = find_free_port()
    process = start(tmp_path / "inbox", port, LONG_S)
    assert send(port, make_slice(0)) == [0]
    with socket.create_connection(("127.0.0.1", port)):
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
    assert (process.returncode, output.splitlines()[-1]) == (0, "stopped")
    process = start(tmp_path / "inbox", port, 0.5)
    deadline = time.monotonic() + LONG_S
    while not list_scans([str(tmp_path / "inbox")]).num_rows:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_ten_kills_lose_no_acknowledged_object_and_duplicate_none(tmp_path: Path) -> None:
    inbox, port = tmp_path / "inbox", find_free_port()
    studies = [f"{STUDY}.{number % 7}" for number in range(140)]
    slices = [make_slice(number, study=study) for number, study in enumerate(studies)]
    uids = [f"{study}.1.{number}" for number, study in enumerate(studies)]

    def read_uids() -> list[str]:
        files = list_scans([str(inbox)])["uri"].to_pylist()
        return [str(pydicom.dcmread(file).SOPInstanceUID) for file in files]

    acknowledged: set[int] = set()
    rng = random.Random()
    for _ in range(10):
        process = start(inbox, port, 0.3)
        timer = threading.Timer(rng.uniform(0.05, 2.0), process.kill)
        timer.start()
        chosen = rng.sample(range(140), 60)
        statuses = send(port, *(slices[number] for number in chosen)) or []
        acknowledged |= {chosen[at] for at, status in enumerate(statuses) if status == 0}
        timer.join()
        process.communicate()
        for file in list_scans([str(inbox)])["uri"].to_pylist():
            pydicom.dcmread(file).pixel_array  # noqa: B018 - raises if the file is incomplete
    process = start(inbox, port, 0.3)
    assert acknowledged
    deadline = time.monotonic() + LONG_S
    while not {uids[number] for number in acknowledged} <= set(read_uids()):
        assert time.monotonic() < deadline, "an acknowledged object is lost"
        time.sleep(0.1)
    assert send(port, *slices) == [0] * 140
    while list_scans([str(inbox)]).num_rows < 140:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    process.kill()
    process.communicate()
    assert sorted(read_uids()) == sorted(uids)
    assert list((inbox / ".receiving" / ".partial").iterdir()) == []


def test_partial_files_of_a_killed_receiver_are_never_listed(tmp_path: Path) -> None:
    with run(tmp_path) as receiver:
        send(receiver.port, make_slice(0))
        partial = receiver.inbox / ".receiving" / inbox_module.PARTIAL_FOLDER / ".x.partial"
        partial.write_bytes(b"half")
    with run(tmp_path, quiet_s=0.3) as receiver:
        assert len(receiver.wait_for_files(1)) == 1
        assert not partial.exists()
