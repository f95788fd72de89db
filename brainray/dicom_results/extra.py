"""The libraries of the extra `dicom`, which are imported where they are used."""

import importlib
import logging
import warnings
from types import ModuleType
from typing import Any

from brainray.errors import ConfigError


def import_extra(name: str) -> ModuleType:
    """Import a library of the extra `dicom`.

    Raises
    ------
    ConfigError
        It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"DICOM results need the library {name.partition('.')[0]}, which is not installed. "
            "Install the extra: pip install 'brainray[dicom]'."
        ) from error


def import_highdicom() -> Any:  # noqa: ANN401 - it may be absent where types are checked
    """Import highdicom, without its log and its warnings: both quote patients' names.

    Raises
    ------
    ConfigError
        It is not installed.
    """
    logging.getLogger("highdicom").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"highdicom(\.|$)")
    return import_extra("highdicom")
