"""The token of local Ray clusters: every entry point protects its file before it starts Ray."""

import stat
from pathlib import Path

import pytest
import ray

from brainray.cluster import connect_ray
from brainray.raytoken import protect_token_file
from brainray.serving.local import start_ray
from brainray.serving.options import ServeJob, ServiceConfig
from brainray.serving.predictor import ModelOptions

SERVICE = ServeJob(service=ServiceConfig(model=ModelOptions(classifier_uri="c")))


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of the token file, which does not exist yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / ".ray" / "auth_token"


def get_mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_created_for_this_user_only(token: Path) -> None:
    protect_token_file()
    created = token.read_text()
    assert len(bytes.fromhex(created)) == 32
    assert get_mode(token) == 0o600
    assert get_mode(token.parent) == 0o700
    protect_token_file()
    assert token.read_text() == created
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


def test_other_users_lose_access_to_an_existing_token(token: Path) -> None:
    token.parent.mkdir()
    token.write_text("a" * 64)
    token.chmod(0o644)
    protect_token_file()
    assert get_mode(token) == 0o600
    assert token.read_text() == "a" * 64


def test_no_token_is_created_if_the_environment_has_one(
    token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    protect_token_file()
    assert not token.exists()


def test_ray_reads_the_token_from_this_file(token: Path) -> None:
    from ray._private.authentication.authentication_token_setup import _get_default_token_path

    assert _get_default_token_path() == token


@pytest.mark.parametrize("entry_point", ["jobs", "service"])
def test_the_token_is_protected_before_ray_starts(
    token: Path, monkeypatch: pytest.MonkeyPatch, entry_point: str
) -> None:
    modes = []
    for name in ("RAY_TRAIN_ENABLE_PRINT_PATCH", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "")  # restored after the test
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: modes.append((get_mode(token), options)))
    if entry_point == "jobs":
        connect_ray()
    else:
        start_ray(SERVICE, verbose=False)
    ((mode, options),) = modes
    assert mode == 0o600
    assert options["address"] == "local"
    assert options["include_dashboard"] is False
