"""The doors: what they print, and the status they exit with."""

import subprocess
import sys
from pathlib import Path

import pytest

from brainray import cli, console
from brainray.doctor import examine
from brainray.recipes import RECIPES, TrainOptions


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_without_a_command_it_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (((), 2), (("--help",), 0), (("nonsense",), 2)):
        status, out, err = run(capsys, *words)
        assert status == expected
        said = out if expected == 0 else err
        assert (
            "train | tune | classify | evaluate | serve | audit | compare | calibrate-series"
            in said
        )


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
    options = cli._parse_recipe(TrainOptions, words, "train")
    assert options.recipe == "smoke"
    assert options.config.num_epochs == 9
    assert options.config.preprocessing == RECIPES["smoke"]().preprocessing


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--weights", "none"], "No folder at"),
        (["--weights", "none", "--num-epochs", "0"], "num_epochs must be at least 1"),
        (["--min-workers", "3"], "min_workers must be in"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], said: str
) -> None:
    status, out, err = run(
        capsys,
        "train",
        *("--data-uri", tmp_path / "nowhere"),
        *("--output-uri", tmp_path / "out"),
        *flags,
    )
    assert status == 2
    assert said in err + out
    assert "Traceback" not in err


def test_weights_that_cannot_be_had_stop_the_job_with_three_remedies(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    phantom_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    status, _, err = run(
        capsys, "train", "--data-uri", phantom_folder, "--output-uri", tmp_path / "out"
    )
    assert status == 2
    assert err.count("\n") == 1
    assert all(
        remedy in err for remedy in ("resnet50-11ad3fa6.pth", "--weights-uri", "--weights none")
    )


def test_evaluating_nothing_exits_2(
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
    assert (status, "Cannot" in err) == (2, True)


def test_the_doctor_looks_at_everything(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "doctor")
    names = [finding.name for finding in examine()]
    assert {"Python", "Ray", "CPUs", "GPU", "bf16", "Memory", "ImageNet weights"} <= set(names)
    assert all(name in out for name in names)
    assert status == 0


def test_scores_are_printed_beside_what_they_must_be_read_beside() -> None:
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


def test_jobs_are_the_same_doors() -> None:
    for name in ("train", "tune", "evaluate", "classify", "serve"):
        text = (Path(__file__).parents[1] / "jobs" / f"{name}.py").read_text()
        assert f"run_{name}(sys.argv[1:])" in text
        assert callable(getattr(cli, f"run_{name}"))


@pytest.mark.heavy
def test_output_that_nobody_reads_ends_quietly() -> None:
    processes = {
        command: subprocess.Popen(
            [sys.executable, "-u", "-m", "brainray", *command.split(), "--help"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for command in ("train", "data fetch")
    }  # at the same time: each imports for seconds
    for process in processes.values():
        assert process.stdout is not None
        process.stdout.close()
    for command, process in processes.items():
        _, err = process.communicate()
        assert (process.returncode, err) == (141, b""), command
