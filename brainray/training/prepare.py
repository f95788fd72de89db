"""Scan, group and split a data set for a training run."""

from typing import Literal

from brainray.data.labelled import FoundSamples
from brainray.data.splits import assign_splits
from brainray.evaluation.prepared import GroupedData, PreparedData, group_samples, split_samples
from brainray.training.config import TrainConfig

Loader = Literal["auto", "resident", "stream"]


def prepare_training_data(
    found: FoundSamples, config: TrainConfig, loader: Loader = "auto"
) -> PreparedData:
    """Scan, group and split a data set for training.

    Parameters
    ----------
    loader : {"auto", "resident", "stream"}
        Unless it is "stream", pixels are kept in the object store if they fit.

    Raises
    ------
    DataError
        The folder is not a usable labelled data set.
    """
    data = group_training_data(found, config, loader)
    splits = assign_splits(
        data.found.samples["split"].take(data.kept).to_pylist(),
        data.labels[data.kept],
        data.groups,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.seed,
    )
    return split_samples(data, config.classes, splits)


def group_training_data(found: FoundSamples, config: TrainConfig, loader: Loader) -> GroupedData:
    """Scan and group a data set; the parameters are those of :func:`prepare_training_data`."""
    needed = list(dict.fromkeys([config.preprocessing, config.train_preprocessing]))
    return group_samples(
        found,
        config.classes,
        keep=() if loader == "stream" else needed,
        reading=config.reading,
        min_correlation=config.group_correlation,
    )
