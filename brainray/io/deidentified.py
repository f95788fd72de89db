"""Mark de-identified exports, so that results with identity are not written into them."""

import json
from typing import Any

from brainray import storage
from brainray.errors import ConfigError
from brainray.io.conditional import create_bytes

MARK_FILE = ".deidentified.json"
"""File in a de-identified export with its settings."""


def refuse_deidentified(folder_uri: str) -> None:
    """Raise if a folder holds a de-identified export.

    Call this before writing paths, keys or DICOM objects that identify patients.

    Raises
    ------
    ConfigError
        The folder holds one.
    StorageError
        The folder cannot be read.
    """
    if storage.exists(storage.join(folder_uri, MARK_FILE)):
        raise ConfigError(
            f"'{folder_uri}' holds a de-identified export, which results with identity must not "
            "be mixed with. Give another --output-uri."
        )


def claim_for_export(
    folder_uri: str, settings: dict[str, Any], fixed: dict[str, Any], *, work_folder: str
) -> dict[str, Any]:
    """Mark an empty folder as a de-identified export, or check that an earlier run did.

    Parameters
    ----------
    folder_uri : str
    settings : dict
        Options of the export; all runs must give the same. None may identify a patient.
    fixed : dict
        Values that the first run chooses for all later runs.
    work_folder : str
        Name of a subfolder that may already exist.

    Returns
    -------
    dict
        ``fixed`` of the first run.

    Raises
    ------
    ConfigError
        The folder holds something else, or an export with other settings.
    StorageError
        It cannot be read or written.
    """
    mark_uri = storage.join(folder_uri, MARK_FILE)
    try:
        earlier = storage.read_json(mark_uri)
    except FileNotFoundError:
        _check_empty(folder_uri, work_folder)
        create_bytes(mark_uri, json.dumps(settings | fixed, indent=2).encode())
        return fixed
    changed = sorted(name for name in settings if earlier.get(name) != settings[name])
    if changed:
        raise ConfigError(
            f"'{folder_uri}' holds a de-identified export that was made with another "
            f"{', '.join(changed)}. Give the options of its first run, or another --output-uri."
        )
    return {name: earlier[name] for name in fixed}


def _check_empty(folder_uri: str, work_folder: str) -> None:
    files, folders = storage.list_folder(folder_uri, folder_uri)
    names = [file.relative_path for file in files] + list(map(storage.get_name, folders))
    if set(names) - {work_folder}:
        raise ConfigError(
            f"Expected an empty folder or a de-identified export at '{folder_uri}', found other "
            "files. Exports are not mixed with results that have identity: give another "
            "--output-uri."
        )
