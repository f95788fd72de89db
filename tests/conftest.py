"""Fixtures that several test files share, and what each test is marked with."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from hypothesis import settings

from brainray.cluster import connect_ray
from brainray.images.preprocess import Preprocessing
from brainray.model.classifier import save_classifier
from brainray.model.network import build_network
from brainray.phantoms import write_phantom_folder
from tests.training import train_here

settings.register_profile("fast", max_examples=25, deadline=None)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

REPOSITORY = Path(__file__).parents[1]
CLASSES = ("glioma", "meningioma", "notumor", "pituitary")

MARK_OF_FIXTURE = {"local_ray": "ray", "browser": "browser"}
MARK_OF_TEST = {
    "test_answer": "heavy",
    "test_classify_faults": "ray",
    "test_cluster": "ray",
    "test_explain": "heavy",
    "test_faults": "ray",
    "test_files::test_neither_ray_nor_torch_is_loaded": "heavy",
    "test_object_store": "heavy",
    "test_object_store_jobs": "ray",
    "test_dicom_results": "heavy",
    "test_engine": "heavy",
    "test_haproxy": "service",
    "test_serve_faults": "service",
    "test_serve_http": "service",
    "test_serve_schema": "service",
    "test_skew": "service",
}
"""Marks of files and of single tests whose fixtures do not show what they start."""


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with what it starts, and put the files with tests that start Ray first.

    These take minutes. At the end, one of them would keep a process of pytest-xdist busy while the
    other has nothing left to do.
    """
    for item in items:
        assert isinstance(item, pytest.Function)
        file = item.path.stem
        marks = {MARK_OF_FIXTURE.get(name) for name in item.fixturenames}
        marks |= {MARK_OF_TEST.get(place) for place in (file, f"{file}::{item.originalname}")}
        for mark in marks - {None}:
            item.add_marker(str(mark))
    ray_files = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in ray_files)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Start Ray on this machine, for the whole session."""
    connect_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def joined(local_ray: None) -> dict[str, str]:  # noqa: ARG001 - starts that Ray
    """Return the environment of a process that joins this session's Ray instead of starting one."""
    return {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small data set in the Kaggle layout: 4 x 24 to train on, 4 x 8 to test on."""
    root = tmp_path_factory.mktemp("phantoms")
    write_phantom_folder(root, num_train_per_class=24, num_test_per_class=8, seed=3)
    return root


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a classifier with random weights."""
    folder = tmp_path_factory.mktemp("saved") / "classifier"
    save_classifier(
        str(folder),
        build_network(len(CLASSES)).state_dict(),
        classes=CLASSES,
        preprocessing=Preprocessing(size_px=32),
        provenance={},
    )
    return folder


@pytest.fixture(scope="session")
def trained(
    local_ray: None,  # noqa: ARG001 - runs
    phantom_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Train with one worker and nothing going wrong; return the output."""
    return train_here(phantom_folder, tmp_path_factory.mktemp("trained") / "out")


@pytest.fixture(scope="session")
def trained_by_two(
    local_ray: None,  # noqa: ARG001 - runs
    phantom_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Do the same with two workers."""
    output = tmp_path_factory.mktemp("trained-by-two") / "out"
    return train_here(phantom_folder, output, num_workers=2)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real images, or skip."""
    given = os.environ.get("BRAINRAY_DATA")
    folder = Path(given) if given else REPOSITORY.parent / "shared" / "brain-tumor-mri"
    if not (folder / "Testing").is_dir():
        pytest.skip(f"no real images at {folder}; set BRAINRAY_DATA to have this run")
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: small tensors are not worth more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
