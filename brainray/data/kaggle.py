"""Fetch the public data set from Kaggle, or check a folder that has it.

kagglehub resumes broken downloads and compares the archive's MD5. The images of every class are
counted before the folder gets its name. Then the SHA-256 of every file is written there, in the
format of ``sha256sum --check``. The SHA-256 of that list identifies the whole data set and must be
that of ``--sha256``, where given.
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from brainray.errors import DataError, StorageError
from brainray.io import storage

SUMS_FILE = "SHA256SUMS"
MAX_NAMED = 3
"""Most files named in an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KaggleSet:
    """A version of a public data set on Kaggle."""

    handle: str
    """Owner and name."""
    version: int
    licence: str
    url: str
    """Page to see and download it by hand."""
    counts: Mapping[str, int]
    """Images below each ``split/class`` folder."""


BRAIN_TUMOUR_MRI = KaggleSet(
    handle="masoudnickparvar/brain-tumor-mri-dataset",
    version=1,
    licence="CC0 1.0, public domain",
    url="https://www.kaggle.com/datasets/masoudnickparvar/brain-tumor-mri-dataset",
    counts={
        "Training/glioma": 1321,
        "Training/meningioma": 1339,
        "Training/notumor": 1595,
        "Training/pituitary": 1457,
        "Testing/glioma": 300,
        "Testing/meningioma": 306,
        "Testing/notumor": 405,
        "Testing/pituitary": 300,
    },
)
"""The usual data set of 7,023 slices, with the counts of its page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchJob:
    """Fetch the public brain-tumour MRI set from Kaggle, or check a fetched one."""

    data_path: str = "data/brain-tumor-mri"
    """Local folder for Training/ and Testing/."""
    sha256: str | None = None
    """Expected SHA-256 of the list of all files, as an earlier fetch printed it."""


def fetch_kaggle_set(
    job: FetchJob, log: Callable[[str], None], kaggle_set: KaggleSet = BRAIN_TUMOUR_MRI
) -> str:
    """Fetch a data set into a new folder, whole or not at all; or check an existing folder.

    Return the SHA-256 of the list of all files.

    Raises
    ------
    StorageError
        Kaggle cannot be reached or refuses. Parts are kept for the next attempt.
    DataError
        The files are not those of the data set, or were changed. Nothing is deleted.
    """
    folder = Path(job.data_path).expanduser().absolute()
    log(f"{kaggle_set.handle}, version {kaggle_set.version}. Licence: {kaggle_set.licence}.")
    if folder.exists():
        sums = _check_sums(folder, kaggle_set)
    else:
        partial = folder.parent / f".{folder.name}.partial"
        found = _download(kaggle_set, partial)
        sums = _check_sums(found, kaggle_set)
        found.rename(folder)
        shutil.rmtree(partial)
    digest = sha256(sums).hexdigest()
    if job.sha256 is not None and digest != job.sha256.lower():
        raise DataError(
            f"Expected SHA-256 {job.sha256} of {SUMS_FILE} in '{folder}', got {digest}. Compare "
            "the list with that of the other copy."
        )
    log(f"{sum(kaggle_set.counts.values()):,} images in {folder}, each as in {SUMS_FILE}.")
    log(f"SHA-256 of the list: {digest}")
    return digest


def _check_sums(folder: Path, kaggle_set: KaggleSet) -> bytes:
    """Count every class, and check every file against the folder's list; write it if absent.

    Return the list: the SHA-256 of every file, sorted by path, as ``sha256sum`` writes it.
    """
    files: list[Path] = []
    wrong = []
    for name, expected in kaggle_set.counts.items():
        entries = (folder / name).iterdir() if (folder / name).is_dir() else []
        of_class = [entry for entry in entries if entry.is_file() and entry.name[0] != "."]
        if len(of_class) != expected:
            wrong.append(f"{name} {len(of_class):,} of {expected:,}")
        files += of_class
    if wrong:
        raise DataError(
            f"'{folder}' is not version {kaggle_set.version} of {kaggle_set.handle}: "
            f"{', '.join(wrong)}. {_explain_by_hand(kaggle_set, folder)}"
        )
    paths = sorted((file.relative_to(folder).as_posix(), file) for file in files)
    lines = [f"{sha256(file.read_bytes()).hexdigest()}  {path}\n" for path, file in paths]
    found, sums_file = "".join(lines).encode(), folder / SUMS_FILE
    if not sums_file.exists():
        storage.write_bytes(str(sums_file), found)
    elif (listed := sums_file.read_bytes()) != found:
        differing = set(listed.splitlines()) ^ set(found.splitlines())
        names = sorted({line.partition(b"  ")[2].decode(errors="replace") for line in differing})
        shown = ", ".join(names[:MAX_NAMED]) + (" …" if len(names) > MAX_NAMED else "")
        raise DataError(
            f"{len(names)} files in '{folder}' differ from {SUMS_FILE}: {shown}. Move the folder "
            f"away to fetch it again, or delete {SUMS_FILE} if the changes are intended."
        )
    return found


def _download(kaggle_set: KaggleSet, partial: Path) -> Path:
    """Download and unpack by kagglehub, which resumes an unfinished archive."""
    os.environ["KAGGLEHUB_CACHE"] = str(partial)
    import kagglehub  # reads its environment when it is imported, and takes a second
    from kagglehub.exceptions import DataCorruptionError

    logging.getLogger("kagglehub").setLevel(logging.ERROR)
    by_hand = _explain_by_hand(kaggle_set, partial.with_name(partial.name[1 : -len(".partial")]))
    try:
        return Path(
            kagglehub.dataset_download(f"{kaggle_set.handle}/versions/{kaggle_set.version}")
        )
    except DataCorruptionError as error:
        raise StorageError(
            "The archive's MD5 is not that of Kaggle's storage. It was deleted. Run the same "
            "command to fetch it again."
        ) from error
    except OSError as error:  # includes exceptions of requests
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise StorageError(
                f"Kaggle refuses ({status}). Correct or remove the credentials (KAGGLE_API_TOKEN, "
                f"or ~/.kaggle); the set needs none. {by_hand}"
            ) from error
        if status is not None:
            raise StorageError(f"Kaggle answers with status {status}. {by_hand}") from error
        raise StorageError(
            f"The download failed ({type(error).__name__}). Run the same command to resume it. "
            f"{by_hand}"
        ) from error


def _explain_by_hand(kaggle_set: KaggleSet, folder: Path) -> str:
    return (
        f"By hand: download {kaggle_set.url}, unpack it so that '{folder / 'Training'}' and "
        f"'{folder / 'Testing'}' have a folder for each class, and run the same command to check."
    )
