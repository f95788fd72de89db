"""The Basic Application Level Confidentiality Profile (PS3.15, table E.1-1), as a table of actions.

The table comes from the library dicom-anonymizer, which has each edition of the standard as data.
Its own functions are not used: they leave elements within sequences as they are, and make UIDs
that no key can make again.
"""

import importlib
from functools import lru_cache
from typing import Literal

from brainray.errors import ConfigError

EDITION = "2026c"
"""Of the standard."""
_TABLE = f"dicomanonymizer.dicom_anonymization_databases.dicomfields_{EDITION}"

Action = Literal["remove", "empty", "replace", "map_uid"]

_ACTIONS: dict[str, Action] = {
    "X_TAGS": "remove",
    "Z_TAGS": "empty",
    "X_Z_TAGS": "empty",
    "D_TAGS": "replace",
    "Z_D_TAGS": "replace",
    "X_D_TAGS": "replace",
    "X_Z_D_TAGS": "replace",
    "U_TAGS": "map_uid",
    "X_Z_U_STAR_TAGS": "map_uid",
}
"""Of the library's lists, which are named after the profile's codes. Where the profile leaves a
choice, the one that keeps an object valid."""


@lru_cache(maxsize=1)
def read_profile() -> dict[int, Action]:
    """Return what the profile does with each element, by its tag.

    Elements that the profile does not list are missing, and so are curves and overlays, whose
    groups repeat.

    Raises
    ------
    ConfigError
        The library is not installed.
    """
    try:
        table = importlib.import_module(_TABLE)
    except ImportError as error:
        raise ConfigError(
            "A de-identified export needs the library dicom-anonymizer, 2.1 or later, which is not "
            "installed. Install the extra: pip install 'brainray[dicom]'."
        ) from error
    return {
        tag[0] << 16 | tag[1]: action
        for name, action in _ACTIONS.items()
        for tag in getattr(table, name)
        if len(tag) == 2
    }
