"""The prediction files of bulk runs: list, read and write them.

::

    OUT/
      predictions/classifier_id=<id>/<run>-<part>-<shard>.parquet   complete or absent
      .plan/<run>/                                                  plan of the present run

A row is the prediction for one slice of a file with one content. A file holds one shard and never
changes. The plan fixes the scans and the file name of a shard before any prediction. A second
attempt at a shard uses the same name, and the first file stays. So a worker may be killed and its
shard repeated, or a stalled worker may resume after its shard is done.

An interrupted run leaves shards without files. Before the next run makes its plan, it creates an
empty file for each of them. A late write by a worker of the old run then fails. So it cannot add a
second row for a scan that the next run predicts in another file.
"""

import io
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from brainray.errors import ConfigError, LockLostError, StorageError
from brainray.inference.schema import SCHEMA_VERSION, build_schema, describe_class_map
from brainray.io import storage
from brainray.io.conditional import create_bytes
from brainray.io.provenance import collect_versions, read_code_revision

PREDICTIONS_FOLDER = "predictions"
PLAN_FOLDER = ".plan"
METADATA_KEY = b"brainray"
NUM_WRITERS = 16
"""Concurrent writes of empty files when an interrupted run is closed."""

KNOWN_SCHEMA = pa.schema(
    [
        ("scan_uri", pa.string()),  # of the file, without the number of a slice
        ("size_bytes", pa.int64()),
        ("modified_ns", pa.int64()),
        ("reason", pa.string()),
        ("content", pa.string()),  # content_sha256, or the reason where there is none
    ]
)


@dataclass(frozen=True, slots=True)
class Wave:
    """Consecutive shards of one part of a plan, predicted in one execution of Ray Data.

    A run writes the wave into the output's lock before the wave's first file. The next run closes
    the wave that it finds there.
    """

    run: str
    part: int
    first_shard: int
    num_shards: int

    def list_shards(self) -> range:
        """Return the numbers of the shards."""
        return range(self.first_shard, self.first_shard + self.num_shards)


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionStore:
    """The predictions of one classifier below one output; picklable."""

    output_uri: str
    classifier_id: str
    classes: tuple[str, ...]
    about: dict[str, Any] = field(default_factory=dict)
    """Provenance for the files' metadata."""

    @classmethod
    def of(cls, output_uri: str, metadata: dict[str, Any]) -> "PredictionStore":
        """Open the predictions of a classifier, given its metadata, below an output.

        Raises
        ------
        ConfigError
            The output holds predictions of an older schema.
        """
        store = cls(
            output_uri=output_uri,
            classifier_id=str(metadata["classifier_id"]),
            classes=tuple(metadata["classes"]),
            about={
                "schema_version": SCHEMA_VERSION,
                "classifier_id": metadata["classifier_id"],
                "weights_sha256": metadata["weights"]["sha256"],
                "preprocessing": metadata["preprocessing"],
                "class_map": describe_class_map(metadata["preprocessing"]["size_px"]),
                "versions": collect_versions(),
                "code_revision": read_code_revision(),
            },
        )
        store._check_schema()
        return store

    @property
    def folder_uri(self) -> str:
        """Folder of the files, named like a Hive partition."""
        name = f"classifier_id={self.classifier_id}"
        return storage.join(self.output_uri, PREDICTIONS_FOLDER, name)

    @property
    def file_schema(self) -> pa.Schema:
        """The prediction table without ``classifier_id``, which the folder's name gives."""
        schema = build_schema(self.classes)
        return schema.remove(schema.get_field_index("classifier_id"))

    def _check_schema(self) -> None:
        folder = storage.join(self.output_uri, PREDICTIONS_FOLDER)
        if not storage.is_folder(folder):
            return
        is_older = bool(_list_parquet(folder))
        for uri in self.list_files()[:1]:
            about = self.read_metadata(uri)  # empty for a closed shard
            is_older |= about.get("schema_version", SCHEMA_VERSION) < SCHEMA_VERSION
        if is_older:
            raise ConfigError(
                f"'{self.output_uri}' holds predictions of an older schema than {SCHEMA_VERSION}. "
                "Give another --output-uri."
            )

    def list_files(self) -> list[str]:
        """Return the URIs of this classifier's files."""
        return _list_parquet(self.folder_uri) if storage.is_folder(self.folder_uri) else []

    def name_file(self, run: str, part: int, shard: int) -> str:
        """Return the URI of a shard's file."""
        return storage.join(self.folder_uri, f"{run}-{part:04d}-{shard:06d}.parquet")

    @property
    def plan_uri(self) -> str:
        """Folder of the run's plan."""
        return storage.join(self.output_uri, PLAN_FOLDER)

    def name_plan(self, run: str, name: str) -> str:
        """Return the URI of a file of a run's plan."""
        return storage.join(self.plan_uri, run, name)

    def read(self, uri: str, columns: Iterable[str]) -> pa.Table:
        """Read some columns of a file.

        Raises
        ------
        StorageError
            It is damaged, or cannot be read.
        """
        with _name_damaged(uri):
            content = pa.BufferReader(storage.read_bytes(uri))
            return pq.read_table(content, columns=list(columns))

    def read_metadata(self, uri: str) -> dict[str, Any]:
        """Read the metadata of a file, written by :meth:`write_shard`."""
        filesystem, path = storage.resolve(uri)
        with _name_damaged(uri):
            schema = pq.read_schema(path, filesystem=filesystem)
            return dict(json.loads((schema.metadata or {})[METADATA_KEY]))

    def read_known(self, uri: str) -> pa.Table:
        """Read the scan files that have rows in a file, as rows of :data:`KNOWN_SCHEMA`.

        Each scan file with slices is returned once with each content.
        """
        names = ["scan_uri", "frame", "size_bytes", "modified_ns", "reason", "content_sha256"]
        rows = self.read(uri, names)
        # Only for rows with a frame: the name of a file may also end in "#frame=1".
        is_slice = rows["frame"].is_valid()
        files = pc.replace_substring_regex(rows["scan_uri"], "#frame=[0-9]+$", "")
        known = pa.table(
            {
                "scan_uri": pc.if_else(is_slice, files, rows["scan_uri"]),
                "size_bytes": rows["size_bytes"],
                "modified_ns": rows["modified_ns"],
                # The file of a slice was read, whatever the slice was rejected for.
                "reason": pc.if_else(is_slice, pa.scalar(None, pa.string()), rows["reason"]),
                "content": pc.coalesce(rows["content_sha256"], rows["reason"]),
            },
            schema=KNOWN_SCHEMA,
        )
        return known.group_by(KNOWN_SCHEMA.names, use_threads=False).aggregate([])

    def write_shard(
        self, uri: str, rows: pa.Table, engine: dict[str, str], statistics: dict[str, Any]
    ) -> pa.Table:
        """Write the file of a shard unless it exists.

        Parameters
        ----------
        uri : str
            From :meth:`name_file`.
        rows : Table
            Rows of the prediction table; at least one.
        engine : dict
            From :meth:`brainray.inference.engine.Engine.describe`.
        statistics : dict
            From :meth:`brainray.inference.stats.RunStats.to_json`, of these rows.

        Returns
        -------
        Table
            The rows of the file: these, or those that another attempt at the shard wrote first.

        Raises
        ------
        LockLostError
            The shard is closed, because another run took over the output.
        StorageError
            It cannot be written.
        """
        about = self.about | {"runtime": engine, "statistics": statistics}
        if create_bytes(uri, self._encode(rows, about)):
            return rows
        existing = self.read(uri, self.file_schema.names)
        if not existing.num_rows:
            raise LockLostError(
                f"Another run has taken over '{self.output_uri}'. Predictions made so far are "
                "kept; give the same command again when that run has ended."
            )
        return existing

    def close(self, state: dict[str, Any]) -> int:
        """Close the shards that an interrupted run did not write; return their number.

        ``state`` is what the run left in the lock, with its wave if one was open.
        """
        if "wave" not in state:
            return 0
        wave, store = Wave(**state["wave"]), self
        if state["classifier_id"] != self.classifier_id:
            store = PredictionStore(
                output_uri=self.output_uri,
                classifier_id=state["classifier_id"],
                classes=tuple(state["classes"]),
            )
        uris = {store.name_file(wave.run, wave.part, shard) for shard in wave.list_shards()}
        missing = sorted(uris.difference(store.list_files()))
        content = store._encode(store.file_schema.empty_table(), store.about | {"closed": True})
        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            list(pool.map(lambda uri: create_bytes(uri, content), missing))
        return len(missing)

    def describe_wave(self, wave: Wave) -> dict[str, Any]:
        """Return the lock's state while a wave is predicted; :meth:`close` reads it."""
        return {
            "classifier_id": self.classifier_id,
            "classes": list(self.classes),
            "wave": asdict(wave),
        }

    def _encode(self, rows: pa.Table, about: dict[str, Any]) -> bytes:
        rows = rows.select(self.file_schema.names).cast(self.file_schema)
        rows = rows.replace_schema_metadata({METADATA_KEY: json.dumps(about)})
        sink = io.BytesIO()
        pq.write_table(rows, sink, compression="zstd")
        return sink.getvalue()


def _list_parquet(folder_uri: str) -> list[str]:
    files, _ = storage.list_folder(folder_uri, folder_uri)
    names = [file.relative_path for file in files]
    return [
        storage.join(folder_uri, name)
        for name in names
        if name.endswith(".parquet") and not name.startswith(".")
    ]


@contextmanager
def _name_damaged(uri: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise StorageError(
            f"'{uri}' is damaged: {error}. Delete it; its scans are classified again."
        ) from error
