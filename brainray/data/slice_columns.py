"""Metadata of slices as columns of tables."""

from typing import Any

import pyarrow as pa

from brainray.images.slices import GreyRange, SliceInfo

SLICE_FIELDS = (
    pa.field("frame", pa.int32()),  # within the file, from 0; null where it has one slice
    pa.field("patient", pa.string()),  # keyed hash of the identifier, as of the three below
    pa.field("study", pa.string()),
    pa.field("series", pa.string()),
    pa.field("sop_instance", pa.string()),
    pa.field("plane", pa.string()),  # axial, coronal or sagittal; null where it is not known
    pa.field("position_mm", pa.float64()),  # along the slice's normal
    pa.field("orientation", pa.list_(pa.float64())),  # cosines of a row, then of a column
    pa.field("flags", pa.list_(pa.string())),  # what is unknown or unusual
    pa.field("grey_range", pa.string()),  # brainray.images.slices.GreyRange; null if rejected
)
"""Columns of DICOM and NIfTI slices; all but ``grey_range`` are null for pictures."""


def describe_slice(info: SliceInfo, grey_range: GreyRange | None) -> dict[str, Any]:
    """Return the values of :data:`SLICE_FIELDS` for a slice; None where it was not decoded."""
    values = {column.name: getattr(info, column.name) for column in SLICE_FIELDS[:-1]}
    return values | {"flags": info.flags or None, "grey_range": grey_range}
