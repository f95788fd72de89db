"""Thousands of generated requests against the service's own OpenAPI description."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.service import start_service


@pytest.mark.slow
def test_schemathesis_finds_no_failure(tiny_classifier: Path, tmp_path: Path) -> None:
    token = "a-token-for-schemathesis"
    file = tmp_path / "token"
    file.write_text(token)
    file.chmod(0o600)
    service = start_service(tiny_classifier, tmp_path, "--api-token-file", file)
    try:
        program = Path(sys.executable).with_name("schemathesis")
        found = subprocess.run(
            [
                *(program, "run", f"{service.url}/openapi.json", "--checks", "all", "--no-color"),
                *("--header", f"Authorization: Bearer {token}", "--max-examples", "600"),
                *("--seed", "1", "--continue-on-failure"),
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            timeout=900,
        )
        assert found.returncode == 0, found.stdout[-6000:]
        lines = service.read_log()
        assert len(lines) >= 2000, "too few requests for a result"
        assert not [line for line in lines if line["status"] >= 500]
    finally:
        service.stop()
