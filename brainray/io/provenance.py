"""Provenance of a result: versions of the code and of libraries."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = (
    *("ray", "torch", "torchvision", "openvino", "pyarrow", "numpy", "scikit-learn", "pillow"),
)


def collect_versions() -> dict[str, str]:
    """Return the versions of Python, brainray and the libraries that affect results."""
    versions = {"python": platform.python_version()}
    for name in ("brainray", *LIBRARIES):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def describe_versions() -> str:
    """Describe in one line the versions behind a report."""
    versions = collect_versions()
    return f"brainray {versions['brainray']}, Ray {versions['ray']}, torch {versions['torch']}"


def describe_cpu() -> str:
    """Describe the processor, and the number of CPUs of this process."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    return f"{model}, {len(os.sched_getaffinity(0))} CPUs"


def read_code_revision() -> str:
    """Return the git revision of the code, with "-dirty" if files differ; else "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(
            [*command, "--abbrev=12"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()
