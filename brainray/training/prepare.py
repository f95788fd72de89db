"""A data set scanned, grouped and split as a training configuration asks for it."""

from brainray.data.labelled import FoundSamples
from brainray.data.splits import assign_splits
from brainray.evaluation.prepared import GroupedData, PreparedData, group_samples, split_samples
from brainray.training.config import TrainConfig


def prepare_training_data(found: FoundSamples, config: TrainConfig) -> PreparedData:
    """Scan, group and split a data set for training.

    Raises
    ------
    DataError
        The folders, labels or images do not make a data set.
    """
    data = group_training_data(found, config)
    splits = assign_splits(
        found.samples["split"].take(data.kept).to_pylist(),
        data.labels[data.kept],
        data.groups,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.seed,
    )
    return split_samples(data, config.classes, splits)


def group_training_data(found: FoundSamples, config: TrainConfig) -> GroupedData:
    """Scan and group a data set as a run of some configuration asks for it."""
    return group_samples(
        found,
        config.classes,
        keep=config.list_pixel_sizes(),
        limits=config.limits,
        min_correlation=config.group_correlation,
    )
