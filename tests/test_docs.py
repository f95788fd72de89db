"""The guides: linked files, headings and options exist, and console blocks run."""

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainray import cli
from tests.conftest import REPOSITORY
from tests.dicom_files import make_mr
from tests.service import start_service

GUIDES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```", re.M | re.S
)
ENDS_OF_COMMANDS = {"|", "||", "&&", ";", ">", "<", "do", "done"}
ADDRESS = "127.0.0.1:8000"


@dataclass(frozen=True)
class Block:
    """A fenced block of a guide."""

    name: str
    """Guide and line."""
    text: str
    reason: str | None
    """Why it is not run."""


def list_blocks(kind: str) -> list[Block]:
    return [
        Block(
            f"{guide.relative_to(REPOSITORY)}:{text.count(chr(10), 0, found.start()) + 1}",
            found["text"],
            found["reason"],
        )
        for guide in GUIDES
        for text in [guide.read_text()]
        for found in BLOCK.finditer(text)
        if found["kind"] == kind
    ]


CONSOLE_BLOCKS = list_blocks("console")
RUN_BLOCKS = [block for block in CONSOLE_BLOCKS if block.reason is None]


def drop_code(guide: Path) -> str:
    """Return a guide's prose: its text without fenced blocks and spans of code."""
    return re.sub(r"```.*?^```|`[^`\n]*`", "", guide.read_text(), flags=re.M | re.S)


def slugify(heading: str) -> str:
    """Return the anchor that GitHub and MyST give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def list_anchors(guide: Path) -> set[str]:
    text = re.sub(r"```.*?^```", "", guide.read_text(), flags=re.M | re.S)
    return {slugify(heading) for heading in re.findall(r"^#+ (.+)$", text, flags=re.M)}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_links_point_to_existing_files_and_headings(guide: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", drop_code(guide))
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", path):
            continue
        target = guide.parent / path if path else guide
        if not target.exists() or (anchor and anchor not in list_anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_named_files_exist(guide: Path) -> None:
    named = re.findall(
        r"`((?:\.ci|benchmarks|brainray|deploy|docs|jobs|tests)/[\w./-]+)`(?! \(new\))",
        guide.read_text(),
    )
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


@cache
def list_options(command: str) -> frozenset[str]:
    """List the options that `brainray COMMAND --help` or `python jobs/COMMAND.py --help` names."""
    helped = io.StringIO()
    with contextlib.redirect_stdout(helped), contextlib.suppress(SystemExit):
        if command.startswith("jobs/"):
            arguments, sys.argv = sys.argv, [command, "--help"]
            try:
                runpy.run_path(str(REPOSITORY / command), run_name="__main__")
            finally:
                sys.argv = arguments
        else:
            cli.main([*command.split(), "--help"])
    return frozenset(re.findall(r"--[a-z][\w.-]*", helped.getvalue()))


def list_commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Find commands of brainray in a console block, each with its options."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for at, word in enumerate(words):
            is_job = re.fullmatch(r"jobs/\w+\.py", word) is not None
            if not is_job and word != "brainray":
                continue
            rest = words[at + 1 :]
            ends = [i for i, other in enumerate(rest) if other in ENDS_OF_COMMANDS]
            rest = rest[: ends[0]] if ends else rest
            command = word
            if not is_job:
                command = " ".join(rest[: 2 if rest[:1] == ["data"] else 1])
            yield command, [other.partition("=")[0] for other in rest if other.startswith("--")]


@pytest.mark.parametrize("block", CONSOLE_BLOCKS, ids=lambda block: block.name)
def test_options_exist(block: Block) -> None:
    if "earlier commit" in (block.reason or ""):
        pytest.skip("the options of earlier commits may be gone")
    for command, options in list_commands(block.text):
        known = list_options(command)
        if command == "classify":
            known |= list_options("classify FILE")
        unknown = [option for option in options if option not in known and option != "--help"]
        assert unknown == [], command


def test_every_console_block_is_found() -> None:
    fences = sum(guide.read_text().count("```console") for guide in GUIDES)
    assert len(CONSOLE_BLOCKS) == fences > len(RUN_BLOCKS) > 0


# ---- console blocks, run -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(
    tmp_path_factory: pytest.TempPathFactory, phantom_folder: Path, tiny_classifier: Path
) -> Path:
    """Make a folder with all files that the console blocks name."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("jobs", "deploy"):
        (folder / name).symlink_to(REPOSITORY / name)
    shutil.copytree(phantom_folder, folder / "DATA")
    shutil.copytree(phantom_folder / "Testing" / "glioma", folder / "SCANS")
    shutil.copytree(tiny_classifier, folder / "OUT" / "classifier")
    shutil.copy(next((folder / "SCANS").iterdir()), folder / "scan.jpg")
    (folder / "slice.dcm").write_bytes(make_mr())
    grid = np.linspace(-1, 1, 64)
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(grid, grid, grid[::5], indexing="ij")))
    head = np.where(radius < 0.8, 200 - 100 * radius, 0).astype(np.int16)
    nib.save(nib.Nifti1Image(head, np.diag([2.0, 2.0, 10.0, 1.0])), folder / "brain.nii.gz")
    (folder / ".curlrc").write_text("fail\nsilent\nshow-error\n")
    return folder


@pytest.fixture(scope="module")
def service_address(tiny_classifier: Path, workspace: Path) -> Iterator[str]:
    service = start_service(tiny_classifier, workspace)
    yield service.url.removeprefix("http://")
    service.stop()


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN_BLOCKS, ids=lambda block: block.name)
def test_console_block_runs(
    block: Block, workspace: Path, joined: dict[str, str], request: pytest.FixtureRequest
) -> None:
    text = block.text
    if ADDRESS in text:
        text = text.replace(ADDRESS, request.getfixturevalue("service_address"))
    scripts = Path(sys.executable).parent
    environment = joined | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "CURL_HOME": str(workspace),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=workspace,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")


@pytest.mark.slow
def test_python_example_of_the_reference_runs(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = (block for block in list_blocks("python") if block.name.startswith("docs/api.md"))
    monkeypatch.chdir(workspace)
    exec(compile(block.text, block.name, "exec"), {})
    assert "glioma" in capsys.readouterr().out
