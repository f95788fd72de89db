"""Where a result came from: versions of the code and of the libraries below it."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = (
    "ray",
    "torch",
    "torchvision",
    "openvino",
    "pyarrow",
    "numpy",
    "scikit-learn",
    "pillow",
)


def collect_versions() -> dict[str, str]:
    """Return the versions of Python, brainray and the libraries that shape a result."""
    versions = {"python": platform.python_version()}
    for name in ("brainray", *LIBRARIES):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def describe_versions() -> str:
    """Say in one line what a report's numbers were computed with."""
    versions = collect_versions()
    return f"brainray {versions['brainray']}, Ray {versions['ray']}, torch {versions['torch']}"


def describe_cpu() -> str:
    """Say which processor this is, and how many of its CPUs this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    return f"{model}, {len(os.sched_getaffinity(0))} CPUs"


def read_code_revision() -> str:
    """Return the git revision the code runs from, marked when files differ; else "unknown"."""
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()
