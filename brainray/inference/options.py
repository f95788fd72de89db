"""Options of `brainray classify`. Importing them imports neither Ray nor torch."""

from dataclasses import dataclass, field, fields
from typing import Annotated

import tyro

from brainray.errors import ConfigError
from brainray.images.slices import ReadOptions
from brainray.inference.engine import EngineOptions
from brainray.inference.series import SeriesRule
from brainray.model.classifier import find_default_classifier


@dataclass(frozen=True, kw_only=True)
class ClassifyJob:
    """Which scans to classify in bulk, with which classifier, and where to write the results."""

    scans_uri: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """Folder, glob, file, DICOMDIR, Parquet table with `image_bytes`, or a .txt or .csv list of
    URIs; local, s3:// or gs://. Or a search in a PACS, whose paths are always redacted:
    dicomweb+https://HOST/PATH/studies?StudyDate=20260101-&Modality=MR. May be given several
    times."""
    output_uri: str
    """Where predictions, metrics and report are written. The same command later classifies only
    new scans."""
    classifier_uri: str = field(default_factory=find_default_classifier)
    """A classifier bundle. Default: `$BRAINRAY_CLASSIFIER`, else the one in the repository."""
    labels: str | None = None
    """True classes: `folder` (a scan's folder is named after its class), or a CSV file with the
    columns scan_uri and label."""
    explain: bool = False
    """Write a class activation map beside each prediction."""
    max_rejected: str = "100%"
    """Exit with status 2, after everything is written, if more of the new slices were rejected: a
    share (5%) or a number (20). Slices with little tissue do not count."""
    redact_paths: bool = False
    """Write keyed hashes in place of all paths of scans, which may hold names. The report then has
    no pictures."""
    id_key_file: str | None = None
    """File with the key, at least 16 bytes, of the hashes that replace the identifiers of patients,
    studies, series and objects. Default: a random key; a bulk run keeps it in the output folder."""
    num_predictors: int | None = None
    """Processes that hold the classifier. Default: one per GPU, or one per four CPUs."""
    gpus_per_predictor: float = 1.0
    """Share of a GPU for each predictor, with --use-gpu."""
    num_decoders: int | None = None
    """Concurrent tasks that read and decode. Default: the number of CPUs without a predictor."""
    part_s: float = 20.0
    """Approximate seconds of work per output file: the most that a killed process loses."""
    engine: tyro.conf.OmitArgPrefixes[EngineOptions] = EngineOptions()
    reading: Annotated[ReadOptions, tyro.conf.arg(name="")] = ReadOptions()
    rule: SeriesRule = SeriesRule()


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions(ClassifyJob):
    """Options of `brainray classify`: files to classify in this process, or a bulk job."""

    files: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="FILE ...", help_behavior_hint=""),
    ] = ()
    """Pictures, DICOM files and NIfTI volumes to classify at once, without Ray; local, s3:// or
    gs://."""
    scans_uri: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Scans to classify in bulk: folder, glob, file, DICOMDIR, Parquet table with `image_bytes`, or
    a .txt or .csv list of URIs; local, s3:// or gs://; or a search in a PACS
    (dicomweb+https://HOST/PATH/studies?StudyDate=20260101-). May be given several times."""
    output_uri: str = ""
    """Folder for predictions, metrics and report of a bulk run. The same command later classifies
    only new scans."""
    slices: bool = False
    """List every slice of files with more than 20."""


FILE_OPTIONS = ("classifier_uri", "id_key_file", "engine", "reading", "rule")
"""Fields of :class:`ClassifyJob` that files use too."""


def check_options(options: ClassifyOptions) -> None:
    """Check that either files or a bulk job is given.

    Raises
    ------
    ConfigError
        Neither is given, or options of both.
    """
    default = ClassifyOptions()
    bulk_only = [one.name for one in fields(ClassifyJob) if one.name not in FILE_OPTIONS]
    given = [name for name in bulk_only if getattr(options, name) != getattr(default, name)]
    if options.files and given:
        raise ConfigError(
            f"Got files and --{given[0].replace('_', '-')}, an option of bulk runs. Give files "
            "alone for a table of predictions, or --scans-uri URI --output-uri OUT for a bulk run."
        )
    if not options.files and not (options.scans_uri and options.output_uri):
        raise ConfigError(
            "Expected scans to classify. Give FILE … for a table of predictions, or "
            "--scans-uri URI --output-uri OUT for a bulk run; --help lists all options."
        )
