"""What becomes of a classifier's answers on scans from another scanner or export.

    python benchmarks/robustness.py --classifier-uri RUN/classifier --data-uri FOLDER/Training \
        --manifest-uri RUN/manifest.parquet --split val --output robustness

Scans of known class are changed in each of the ways of ``brainray.evaluation.shifts`` and
predicted by the engine that every command uses. Choose a classifier by the validation images of its
own training run (``--manifest-uri``), never by test images. Writes OUTPUT.json and OUTPUT.md, and
prints the table.
"""

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from brainray import storage
from brainray.data.expand import expand_files
from brainray.data.labelled import find_samples
from brainray.data.read import SampleReader
from brainray.errors import DataError, RejectedImage
from brainray.evaluation.robustness import measure_robustness, render_robustness
from brainray.images.slices import ReadOptions
from brainray.inference.engine import EngineOptions, open_engine
from brainray.model.classifier import load_classifier


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    classifier_uri: str
    """A classifier bundle."""
    data_uri: str
    """Labelled scans, as `brainray train` takes them."""
    output: str
    """Begins the names of the files that are written."""
    manifest_uri: str | None = None
    """`manifest.parquet` of a training run on the same --data-uri; none takes all scans."""
    split: Literal["train", "val", "test"] = "val"
    """Split of the manifest to take."""
    num_images: int | None = None
    """Images, drawn at random; none takes all."""
    severity: Literal[1, 2, 3] = 2
    """Of each shift."""
    seed: int = 0
    """Draws the images and what is random in a shift."""
    engine: EngineOptions = EngineOptions()


def choose_samples(options: Options, classes: tuple[str, ...]) -> pa.Table:
    """List the scans to take, in an order that depends on the seed alone."""
    samples = expand_files(find_samples(options.data_uri, classes), ReadOptions()).samples
    if options.manifest_uri is not None:
        manifest = storage.read_table(options.manifest_uri)
        paths = manifest.filter(pc.field("split") == options.split)["path"]
        samples = samples.filter(pc.is_in(samples["path"], value_set=paths.combine_chunks()))
        if len(samples) < len(paths):
            raise DataError(
                f"Expected the {len(paths)} {options.split} scans of '{options.manifest_uri}' in "
                f"'{options.data_uri}', found {len(samples)}. Give the --data-uri of the training."
            )
    order = np.random.default_rng(options.seed).permutation(len(samples))[: options.num_images]
    return samples.take(pa.array(order))


def read_scans(samples: pa.Table) -> tuple[list[np.ndarray], list[int]]:
    """Decode scans; return those that can be decoded, and their labels."""
    scans, labels = [], []
    reader = SampleReader(ReadOptions())
    for row in samples.select(["uri", "row_group", "row", "frame", "label"]).to_pylist():
        label = row.pop("label")
        try:
            file, index = reader.open(**row)
            scans.append(file.render(index)[0])
        except RejectedImage as error:
            print(f"Skipped '{row['uri']}': {error}", flush=True)
            continue
        labels.append(label)
    return scans, labels


def main(options: Options) -> None:
    """Measure, print and write."""
    classifier = load_classifier(options.classifier_uri)
    scans, labels = read_scans(choose_samples(options, classifier.classes))
    engine = open_engine(classifier, options.engine)
    found = measure_robustness(
        engine,
        classifier.preprocessing,
        classifier.classes,
        scans,
        labels,
        severity=options.severity,
        seed=options.seed,
        on_progress=lambda name: print(f"Measuring {name} …", flush=True),
    )
    about = {"classifier_id": classifier.classifier_id, "options": asdict(options)}
    table = render_robustness(found)
    storage.write_json(f"{options.output}.json", about | engine.describe() | found)
    storage.write_bytes(f"{options.output}.md", f"{table}\n".encode())
    print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
