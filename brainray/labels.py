"""The classes of the brain-tumour data set, and a check of class lists."""

from collections.abc import Sequence

from brainray.errors import ConfigError

BRAIN_TUMOUR_CLASSES = ("glioma", "meningioma", "notumor", "pituitary")
"""Class names in class order, as the Kaggle data set spells its folders."""


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Check class names in class order, and return them as a tuple.

    Parameters
    ----------
    classes : sequence of str
        Class names in class order.

    Raises
    ------
    ConfigError
        Fewer than two classes, or a name that is empty, repeated, or cannot be the name of a
        folder or a column.
    """
    names = tuple(classes)
    if len(names) < 2:
        raise ConfigError(f"Expected at least two classes, got {list(names)}. Pass --classes A B …")
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError(f"Class names must differ. Repeated: {', '.join(doubled)}.")
    bad = [name for name in names if not name.strip() or "/" in name or name.startswith(".")]
    if bad:
        raise ConfigError(
            f"Invalid class names (empty, hidden, or with a slash): {bad}. Rename the folders."
        )
    return names
