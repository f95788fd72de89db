"""Which classifier answers where none is named."""

import os
from pathlib import Path

DEFAULT_VARIABLE = "BRAINRAY_CLASSIFIER"
SHIPPED_FOLDER = Path(__file__).parents[2] / "models" / "brain-mri-resnet50"
"""What a clone of the repository holds beside the code; an installed wheel has none."""


def find_default_classifier() -> str:
    """Return the classifier bundle that ``$BRAINRAY_CLASSIFIER`` names, else the project's own.

    Whether one is there is found out by who opens it.
    """
    return os.environ.get(DEFAULT_VARIABLE) or str(SHIPPED_FOLDER)
