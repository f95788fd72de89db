"""The key that hashes the identifiers of an output, and messages without paths."""

import os
import stat
from pathlib import Path

import pytest

from brainray.errors import ConfigError, DataError
from brainray.inference.bulk import classify
from brainray.inference.labels import FOLDER, Labels
from brainray.inference.options import ClassifyJob
from brainray.io.identifiers import (
    CHECK_FILE,
    KEY_FILE,
    REDACTED,
    Identifiers,
    hide_paths,
    open_identifiers,
    read_key,
)

KEY = bytes(range(16))


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    (tmp_path / "key").write_bytes(KEY)
    return str(tmp_path / "key")


def test_an_output_has_one_random_key_that_only_its_owner_can_read(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        first = open_identifiers(str(tmp_path / "a"))
    finally:
        os.umask(before)
    file = tmp_path / "a" / KEY_FILE
    assert file.read_bytes() == first.key
    assert len(first.key) == 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert open_identifiers(str(tmp_path / "a")) == first
    assert open_identifiers(str(tmp_path / "b")).key != first.key
    assert str(first.key) not in repr(first)


def test_a_given_key_is_not_stored(tmp_path: Path, key_file: str) -> None:
    output = tmp_path / "out"
    assert open_identifiers(str(output), key_file).key == KEY
    assert {file.name for file in output.iterdir()} == {CHECK_FILE}
    assert KEY not in (output / CHECK_FILE).read_bytes()
    assert KEY.hex() not in (output / CHECK_FILE).read_text()


def test_a_short_or_missing_key_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(15))
    for name, found in (("short", 15), ("absent", 0)):
        with pytest.raises(ConfigError, match=f"at least 16 bytes in '.*{name}', got {found}"):
            read_key(str(tmp_path / name))


def test_a_later_run_with_another_key_is_rejected(tmp_path: Path, key_file: str) -> None:
    (tmp_path / "other").write_bytes(bytes(16))
    given, made = str(tmp_path / "given"), str(tmp_path / "made")
    open_identifiers(given, key_file)
    open_identifiers(made)
    for output, key in ((given, str(tmp_path / "other")), (made, key_file)):
        with pytest.raises(ConfigError, match="hashed with another key"):
            open_identifiers(output, key)
    with pytest.raises(ConfigError, match="a key outside of it"):
        open_identifiers(given)
    assert not (tmp_path / "given" / KEY_FILE).exists(), (
        "hashes with a second key would not match the first ones"
    )


def test_a_later_run_with_another_redact_paths_is_rejected(tmp_path: Path) -> None:
    for before, remedy in ((False, "Leave out"), (True, "Give")):
        output = str(tmp_path / f"{before}")
        open_identifiers(output, redact_paths=before)
        with pytest.raises(ConfigError, match=f"{remedy} --redact-paths"):
            open_identifiers(output, redact_paths=not before)
        assert open_identifiers(output, redact_paths=before).redact_paths is before


def test_the_hash_of_a_path_depends_on_every_character() -> None:
    redacting = Identifiers(KEY, redact_paths=True)
    names = ["/in/a", "/in/a ", "/in/a\0", "/in/b", "/in/a#row=1"]
    hashes = {redacting.name(name) for name in names}
    assert len(hashes) == len(names)
    assert all(name.startswith(REDACTED) and len(name) == 9 + 32 for name in hashes)
    assert redacting.name("/in/a") != Identifiers(bytes(16), redact_paths=True).name("/in/a")
    assert Identifiers(KEY).name("/in/a") == "/in/a"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No file at '/data/Doe, John's/1.dcm'. Check it.", "No file at 'redacted'. Check it."),
        ("No scans at /data/Doe/x: nothing", "No scans at redacted"),
        ("Cannot read 's3://b/Doe/x.parquet' as Parquet", "Cannot read 'redacted' as Parquet"),
        ("Bad /globs/Doe.dcm", "Bad redacted"),
        ("3 of 4 were rejected (2 corrupt).", "3 of 4 were rejected (2 corrupt)."),
    ],
)
def test_paths_are_removed_from_messages(text: str, expected: str) -> None:
    assert (
        hide_paths(text, ["/data/Doe", "s3://b/Doe", "/data/Doe, John's", "/globs/*/x"]) == expected
    )


def test_labels_are_found_by_the_hash_of_a_file_and_of_a_slice() -> None:
    classes = ("glioma", "notumor")
    redacting = Identifiers(KEY, redact_paths=True)
    labels = Labels(classes, {"/in/a": "glioma", "/in/b#frame=3": "notumor"})
    assert [labels.find(uri) for uri in ("/in/a#frame=3", "/in/b#frame=3", "/in/b#frame=4")] == [
        "glioma",
        "notumor",
        None,
    ]
    assert labels.rename(redacting.name).find(f"{redacting.name('/in/a')}#frame=3") == "glioma"
    assert labels.rename(Identifiers(KEY).name) == labels
    folders = Labels(classes)
    assert folders.find("/in/glioma/a.nii#frame=1") == "glioma"
    assert folders.rename(Identifiers(KEY).name) == folders
    with pytest.raises(ConfigError, match="--labels folder"):
        folders.rename(redacting.name)
    assert FOLDER == "folder"


def test_an_error_of_a_redacted_run_contains_no_path(tmp_path: Path, tiny_classifier: Path) -> None:
    for name in ("Doe.txt", "Doe", "Doe/*/x.dcm"):
        job = ClassifyJob(
            scans_uri=(str(tmp_path / name),),
            classifier_uri=str(tiny_classifier),
            output_uri=str(tmp_path / "out"),
            redact_paths=True,
        )
        with pytest.raises(DataError) as caught:
            classify(job)
        assert "Doe" not in str(caught.value)
        assert caught.value.__context__ is caught.value.__cause__ is None
