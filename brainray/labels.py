"""The classes of the brain-tumour data set, and how a class list is checked."""

from collections.abc import Sequence

from brainray.errors import ConfigError

BRAIN_TUMOUR_CLASSES = ("glioma", "meningioma", "notumor", "pituitary")
"""Class names in class order, as the Kaggle data set spells its folders."""


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the class order as a tuple, or say what is wrong with it.

    Parameters
    ----------
    classes : sequence of str
        Class names in class order.

    Raises
    ------
    ConfigError
        Fewer than two classes, an empty name, a name given twice, or one that could not
        be a folder or a column name.
    """
    names = tuple(classes)
    if len(names) < 2:
        raise ConfigError(f"Expected at least two classes, got {list(names)}. Pass --classes A B …")
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError(f"Class names must differ; given more than once: {', '.join(doubled)}.")
    bad = [name for name in names if not name.strip() or "/" in name or name.startswith(".")]
    if bad:
        raise ConfigError(f"Not usable as class names (empty, hidden, or with a slash): {bad}.")
    return names
