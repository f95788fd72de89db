"""The command line: output and exit status."""

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from brainray import cli, console
from brainray.doctor import examine
from brainray.inference.stats import Progress, RunStats
from brainray.recipes import RECIPES


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_without_a_command_all_commands_are_listed_with_summary_and_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words, expected in (((), 2), (("--help",), 0), (("-h",), 0)):
        status, out, err = run(capsys, *words)
        assert status == expected
        shown = err if expected else out
        for command in cli.COMMANDS.values():
            assert f"  {command.name} " in shown
            assert command.summary in shown
            assert f"   {command.example}\n" in shown
            assert command.example.startswith(f"brainray {command.name}")
        assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["clasify"], "classify"), (["trian", "--help"], "train"), (["data"], "data fetch")],
)
def test_a_mistyped_command_exits_2_and_names_the_right_one(
    capsys: pytest.CaptureFixture[str], words: list[str], meant: str
) -> None:
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert f"Unknown command '{words[0]}'" in err
    assert f"`brainray {meant}`" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_example_is_parsed(name: str) -> None:
    command = cli.COMMANDS[name]
    words = shlex.split(command.example)[1 + len(name.split()) :]
    options, switches = cli.parse_options(command, words)
    assert options is not None
    assert not any(switches.values())


def test_a_completion_script_has_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--tyro-print-completion", "bash")
    assert status == 0
    for word in (*cli.COMMANDS, "--scans-uri", "--num-epochs"):
        assert word in out


def test_a_mistyped_flag_exits_2_and_names_the_right_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, _, err = run(
        capsys, "train", "--data-uri", tmp_path, "--output-uri", tmp_path, "--num-epoch", 3
    )
    assert status == 2
    assert "--num-epochs" in err


def test_an_unknown_recipe_exits_2_and_lists_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, _, err = run(
        capsys, "train", "--data-uri", tmp_path, "--output-uri", tmp_path, "--recipe", "fast"
    )
    assert status == 2
    assert all(name in err for name in RECIPES)


@pytest.mark.parametrize("spelling", [["--recipe", "smoke"], ["--recipe=smoke"]])
def test_a_recipe_gives_the_defaults_that_flags_override(spelling: list[str]) -> None:
    words = ["--data-uri", "d", "--output-uri", "o", *spelling, "--num-epochs", "9"]
    options, _ = cli.parse_options(cli.COMMANDS["train"], words)
    assert options.recipe == "smoke"
    assert options.config.num_epochs == 9
    assert options.config.preprocessing == RECIPES["smoke"]().preprocessing


@pytest.mark.parametrize(
    ("flags", "printed"),
    [
        (["--weights", "none"], "No folder at"),
        (["--weights", "none", "--num-epochs", "0"], "num_epochs must be at least 1"),
        (["--min-workers", "3"], "min_workers must be in"),
    ],
)
def test_a_user_error_exits_2_without_a_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], printed: str
) -> None:
    status, out, err = run(
        capsys,
        "train",
        *("--data-uri", tmp_path / "nowhere"),
        *("--output-uri", tmp_path / "out"),
        *flags,
    )
    assert status == 2
    assert printed in err + out
    assert "Traceback" not in err


def test_missing_weights_stop_the_job_with_three_remedies(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    phantom_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))

    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", fail)
    status, _, err = run(
        capsys, "train", "--data-uri", phantom_folder, "--output-uri", tmp_path / "out"
    )
    assert status == 2
    assert err.count("\n") == 1
    assert all(
        remedy in err for remedy in ("resnet50-11ad3fa6.pth", "--weights-uri", "--weights none")
    )


def test_evaluating_without_a_classifier_or_images_exits_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_classifier: Path
) -> None:
    output = ("--output-uri", tmp_path / "out")
    status, _, err = run(
        capsys, "evaluate", "--data-uri", tmp_path, "--classifier-uri", tmp_path, *output
    )
    assert (status, "No classifier at" in err) == (2, True)
    status, _, err = run(
        capsys, "evaluate", "--data-uri", tmp_path, "--classifier-uri", tiny_classifier, *output
    )
    assert (status, "No images in" in err) == (2, True)


def test_an_output_that_cannot_be_written_exits_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, phantom_folder: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    status, _, err = run(
        capsys,
        *("train", "--weights", "none", "--data-uri", phantom_folder),
        *("--output-uri", tmp_path / "file" / "out"),
    )
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: Cannot")


def test_the_doctor_prints_every_finding(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "doctor")
    names = [finding.name for finding in examine()]
    assert {"Python", "Ray", "CPUs", "GPU", "bf16", "Memory", "ImageNet weights"} <= set(names)
    assert all(name in out for name in names)
    assert status == 0


def test_scores_are_printed_with_the_scores_without_near_duplicates() -> None:
    line = console.describe_scores(
        "test",
        {
            "n": 200,
            "accuracy": 0.95,
            "accuracy_ci95": [0.91, 0.98],
            "macro_f1": 0.94,
            "macro_auroc": 0.99,
            "without_near_duplicates": {"n": 120, "accuracy": 0.9, "accuracy_ci95": [0.85, 0.94]},
            "baseline_1nn": {"accuracy": 0.97},
        },
    )
    for part in ("95.0% [91.0%, 98.0%]", "(120) 90.0% [85.0%, 94.0%]", "thumbnail 97.0%"):
        assert part in line


def test_jobs_run_the_commands() -> None:
    files = sorted((Path(__file__).parents[1] / "jobs").glob("*.py"))
    assert {"classify", "evaluate", "train"} <= {file.stem for file in files}
    for file in files:
        found = re.search(r'main\(\["([a-z-]+)", \*sys.argv\[1:\]\]\)', file.read_text())
        assert found is not None, file.name
        assert found[1] in cli.COMMANDS


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report_progress(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, **options: bool) -> str:
    """Report a bulk run that has done 30 of 200 scans."""
    monkeypatch.setattr(sys, "stderr" if options else "stdout", stream)
    monkeypatch.setattr(console, "LINE_INTERVAL_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress()
    progress.total = 200
    for _ in range(3):
        progress.add(RunStats(num_rows=10), 10, 0, {}, None)
    monkeypatch.setattr(Progress, "warm_s", 10.0)
    with console.ConsoleReporter(**options) as reporter:
        reporter.on_progress(progress)
        reporter.log("a line")
        reporter.report({"n": 3}, ["result"])
    return stream.getvalue()


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = report_progress(monkeypatch, io.StringIO())
    assert shown == "scans 30/200  2.0 images/s  1 min 25 s left\na line\nresult\n"
    shown = report_progress(monkeypatch, Terminal())
    assert "30/200" in shown
    assert "━" in shown, "a bar"
    assert "\x1b[" in shown


def test_with_json_standard_output_has_only_the_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = report_progress(monkeypatch, io.StringIO(), json=True)
    assert "a line" in shown
    assert json.loads(capsys.readouterr().out) == {"n": 3}


@pytest.mark.heavy
def test_a_closed_output_pipe_exits_141_without_an_error() -> None:
    processes = {
        command: subprocess.Popen(
            [sys.executable, "-u", "-m", "brainray", *command.split(), "--help"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for command in ("", "train", "data fetch")
    }  # in parallel: the imports of each take seconds
    for process in processes.values():
        assert process.stdout is not None
        process.stdout.close()
    for command, process in processes.items():
        _, err = process.communicate()
        assert (process.returncode, err) == (141, b""), command
