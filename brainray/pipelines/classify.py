"""Classify in bulk: one row for every scan, whatever happens, and only what is new."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError

from brainray import storage
from brainray.dataset.inbox import list_scans, read_named_scan
from brainray.errors import (
    BrainrayError,
    ClassificationError,
    ConfigError,
    DataError,
    RejectedImage,
)
from brainray.io.lock import hold_output
from brainray.metrics import compute_curves, compute_evaluation
from brainray.model.classifier import Classifier, load_classifier
from brainray.model.explain import STRIDE_PX
from brainray.model.runtime import RuntimeOptions
from brainray.model.shipped import find_default_classifier
from brainray.model.trust import LOW_CONFIDENCE
from brainray.pipelines.answers import (
    AnswerSet,
    Ledger,
    describe_class_map,
    key_of,
)
from brainray.pipelines.bulk import (
    BulkPlan,
    Counted,
    count_beside,
    open_bulk_stream,
)
from brainray.pipelines.cluster import (
    Need,
    check_fits,
    connect_ray,
    describe_gpu_need,
    list_nodes,
    share_cpus,
    tell_waiting,
)
from brainray.pipelines.judge import METRICS_FILE, Say
from brainray.pipelines.load import LoadPlan, unpack
from brainray.pipelines.tally import (
    STAGES,
    Standing,
    Tally,
    count_rejected,
    describe_counts,
    find_bottleneck,
    thin,
    watch_memory,
)
from brainray.pipelines.truth import Truth, read_truth
from brainray.pixels.decode import DecodeLimits, decode_image
from brainray.pixels.picture import GALLERY_OVERLAY_PX, render_overlay, render_picture
from brainray.pixels.preprocess import Preprocessing, load_image
from brainray.provenance import describe_versions, read_code_revision
from brainray.reporting.bulk import UncertainScan, render_bulk_report
from brainray.reporting.evaluation import Mistake

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
METRICS_SCHEMA_VERSION = 1

PART_ROWS = 16_384
"""Answers of one file, at most."""
MAX_FAILURES = 3
"""Failures of the stream in a row, without a new answer between them, that end a run."""
NUM_SCANS_SHOWN = 24
NUM_BINS = 20
CPUS_PER_PREDICTOR = 4
"""Threads of one predictor on a CPU, where the machine has so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyJob:
    """One bulk run: which scans, by which classifier, to where."""

    scans_uri: tuple[str, ...]
    """Folder, glob, file, Parquet table with `image_bytes`, or a .txt or .csv list of places;
    local, s3:// or gs://. May be given several times."""
    classifier_uri: str = field(default_factory=find_default_classifier)
    """A sealed classifier folder; `$BRAINRAY_CLASSIFIER`, else the one that comes with the
    project, if not given."""
    output_uri: str
    """Where answers, metrics and report go. The same command classifies what is new since."""
    labels: str | None = None
    """Where the truth is: `folder` (the name of a scan's folder is its class), or a CSV file
    with the columns scan_uri and label."""
    explain: bool = False
    """Write beside each answer where in the scan the network saw its class."""
    replace: bool = False
    """Put this classifier's answers in the place of another's, when they are complete."""
    max_rejected: str = "100%"
    """Exit with status 2, after everything is written, when more of the new scans than this
    were rejected: a share (5%) or a number (20)."""
    backend: Literal["auto", "torch", "openvino"] = "auto"
    """What computes; `auto` takes the fastest for the machine."""
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """`auto` is bf16 where the processor has it, else fp32; int8 needs --calibration-uri."""
    calibration_uri: str | None = None
    """Folder of scans like those to classify, for int8."""
    use_gpu: bool = False
    """Predict on GPUs."""
    num_predictors: int | None = None
    """Processes that hold the classifier; one for each GPU, or for four CPUs, if not given."""
    gpus_per_predictor: float = 1.0
    """Share of a GPU that each takes, with --use-gpu."""
    num_decoders: int | None = None
    """Tasks that read and decode at a time; as many as CPUs are left, if not given."""
    part_s: float = 20.0
    """Seconds after which answers are written in any case: what a kill can cost."""
    limits: DecodeLimits = DecodeLimits()
    """What is too large to open."""


def classify(
    job: ClassifyJob,
    *,
    say: Say = logger.info,
    tick: Callable[[Standing], None] = lambda _: None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Classify every new scan, and write answers, metrics and report.

    Parameters
    ----------
    job : ClassifyJob
        What to classify.
    say, tick : callable
        Take a line for a person, and how far the run has come.
    verbose : bool
        Whether Ray's own lines are shown.

    Returns
    -------
    dict
        The content of metrics.json.

    Raises
    ------
    UserError
        The scans, the classifier or the output cannot be used; or, when all is written, more
        was rejected than ``max_rejected`` allows.
    """
    limit = parse_max_rejected(job.max_rejected)
    classifier = load_classifier(job.classifier_uri)
    truth = read_truth(job.labels, classifier.classes)
    if next(list_scans(job.scans_uri, leave_out=[job.output_uri]), None) is None:
        raise DataError(f"No scans at {', '.join(job.scans_uri)}: there is not one visible file.")
    with hold_output(job.output_uri):
        answers = AnswerSet(job.output_uri, classifier.card, replace=job.replace)
        ledger = answers.read_ledger()
        connect_ray(verbose=verbose)
        needs = describe_needs(job)
        check_fits(*needs)
        plan = plan_run(job, classifier)
        started_at = datetime.now(UTC)
        with watch_memory() as peak, tell_waiting(needs, say):
            tally = run_stream(plan, ledger, answers, job.part_s, say, tick)
        answers.publish()
        metrics = build_metrics(plan, classifier, answers, tally, peak.bytes, started_at)
        report(job, classifier, answers, metrics, truth)
    check_rejected(tally, limit, job.max_rejected)
    return metrics


def parse_max_rejected(text: str) -> Callable[[int], float]:
    """Return what turns a number of scans into the number that may be rejected.

    Raises
    ------
    ConfigError
        The text is neither a share nor a number.
    """
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf") or (text.endswith("%") and value > 100):
        raise ConfigError(f"Expected --max-rejected as 5% or 20, got '{text}'.")
    return (lambda n: n * value / 100) if text.endswith("%") else (lambda _: value)


def check_rejected(tally: Tally, limit: Callable[[int], float], text: str) -> None:
    """Check that not too many scans were rejected.

    Raises
    ------
    DataError
        More were than allowed.
    """
    rejected = count_rejected(tally.reasons)
    if rejected > limit(tally.num_new):
        raise DataError(
            f"{rejected:,} of {tally.num_new:,} new scans were rejected "
            f"({_list_reasons(tally.reasons)}), more than --max-rejected {text} allows. "
            "All answers are written."
        )


def _list_reasons(reasons: "Counter[str]") -> str:
    return ", ".join(
        f"{count:,} {reason}" for reason, count in reasons.most_common() if reason != LOW_CONFIDENCE
    )


def describe_needs(job: ClassifyJob) -> list[Need]:
    """Say what the run cannot do without, besides a CPU."""
    if not job.use_gpu:
        return []
    return [describe_gpu_need(job.gpus_per_predictor, job.num_predictors or 1)]


def plan_run(job: ClassifyJob, classifier: Classifier) -> BulkPlan:
    """Decide how many predictors and decoders the cluster takes, and read what int8 needs.

    Raises
    ------
    ConfigError
        int8 without images to calibrate on.
    """
    nodes = list_nodes()
    sizes = [int(node.get("CPU", 0.0)) for node in nodes]
    cpus = max(1, sum(sizes))
    if job.use_gpu:
        gpus = sum(node.get("GPU", 0.0) for node in nodes)
        num_predictors = job.num_predictors or max(1, int(gpus / job.gpus_per_predictor))
        threads = None
        reserved = share_cpus(num_predictors, nodes, GPU=job.gpus_per_predictor)
    else:
        most = max(1, min(CPUS_PER_PREDICTOR, max(sizes, default=1)))
        num_predictors = job.num_predictors or sum(max(1, n // most) for n in sizes if n) or 1
        threads = max(1, min(most, cpus // num_predictors))
        # A CPU of each predictor's stays free for decoding, which needs a tenth as much.
        reserved = share_cpus(num_predictors, nodes, wanted=max(0.5, threads - 1.0))
    options = RuntimeOptions(
        backend=job.backend, precision=job.precision, num_threads=threads, use_gpu=job.use_gpu
    )
    images = read_calibration_images(job, classifier)
    return BulkPlan(
        load=LoadPlan(
            scans_uris=job.scans_uri,
            output_uri=job.output_uri,
            preprocessing=classifier.preprocessing,
            limits=job.limits,
        ),
        classifier_uri=job.classifier_uri,
        runtime=options,
        calibration=None if images is None else ray.put(images),
        explain=job.explain,
        num_predictors=num_predictors,
        num_decoders=job.num_decoders or max(1, round(cpus - num_predictors * reserved)),
        cpus_per_predictor=reserved,
        gpus_per_predictor=job.gpus_per_predictor if job.use_gpu else 0.0,
    )


def read_calibration_images(
    job: ClassifyJob, classifier: Classifier, *, most: int = 300
) -> NDArray[np.uint8] | None:
    """Read the images that int8 is calibrated on, shape (n, size, size); None without int8.

    Raises
    ------
    ConfigError
        int8 without ``calibration_uri``, or not one image there can be opened.
    """
    if job.precision != "int8":
        return None
    if job.calibration_uri is None:
        raise ConfigError(
            "int8 has to be calibrated: give --calibration-uri, a folder of some hundred scans "
            "like those to classify."
        )
    found = list(list_scans([job.calibration_uri]))
    images = []
    for scan in found[:: max(1, len(found) // most)]:
        try:
            content = read_named_scan(scan.scan_uri)
            images.append(load_image(content, classifier.preprocessing, job.limits))
        except RejectedImage:
            continue
    if not images:
        raise ConfigError(f"None of the {len(found)} files in '{job.calibration_uri}' is a scan.")
    return np.stack(images)


def run_stream(
    plan: BulkPlan,
    ledger: Ledger,
    answers: AnswerSet,
    part_s: float,
    say: Say,
    tick: Callable[[Standing], None],
) -> Tally:
    """Run the stream to its end; every answer is written once.

    When a process of it dies, the stream is begun again with what is left. (Ray could restart
    a dead predictor by itself, but without end, also when a scan kills it each time.)

    Raises
    ------
    ClassificationError
        It failed :data:`MAX_FAILURES` times in a row without a single new answer.
    """
    tally, seen = Tally(), set[bytes]()
    failures = 0
    with count_beside(plan.load, ledger) as counted:
        while True:
            before = tally.done
            try:
                with write_parts(answers, tally, part_s) as write:
                    for block in _iterate(plan, ledger):
                        if not tally.done:
                            tally.runtime = json.loads(block["runtime"][0].as_py())
                            say(f"Predicting with {tally.runtime['description']}.")
                            if "cost" in tally.runtime:
                                say(tally.runtime["cost"])
                        fresh, num_known = keep_new(unpack(block["answers"][0]), seen)
                        tally.add(block, fresh, num_known)
                        write(fresh)
                        tick(take_standing(tally, counted))
                break
            except RayTaskError as error:
                if isinstance(error.cause, BrainrayError):
                    raise error.cause from None
                raise
            except RayError as error:
                failures = 1 if tally.done > before else failures + 1
                if failures == MAX_FAILURES:
                    raise ClassificationError(
                        f"The stream broke {failures} times without a new answer: "
                        f"{_first_line(error)} What was answered is written."
                    ) from error
                say(f"A process was lost ({_first_line(error)}); going on with what is left.")
                ledger = answers.read_ledger()
    tick(take_standing(tally, counted))
    if counted.hidden:
        say(f"Passed over {counted.hidden:,} hidden files.")
    return tally


def _iterate(plan: BulkPlan, ledger: Ledger) -> Iterator[pa.Table]:
    """Yield the stream's rows, each as a table."""
    stream = open_bulk_stream(plan, ray.put(ledger))
    batches: Any = stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    for batch in batches:
        for row in range(batch.num_rows):
            yield batch.slice(row, 1)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def keep_new(chunk: pa.Table, seen: set[bytes]) -> tuple[pa.Table, int]:
    """Leave out what is answered already, in an earlier run or in this one.

    Ray may do a task again whose process died; a scan is answered by its first.
    """
    keys = [key_of(uri) for uri in chunk["scan_uri"].to_pylist()]
    is_known = chunk["is_known"].to_pylist()
    mask = []
    for key, known in zip(keys, is_known, strict=True):
        mask.append(key not in seen and not known)
        seen.add(key)
    return chunk.filter(pa.array(mask, pa.bool_())), sum(is_known)


def take_standing(tally: Tally, counted: Counted) -> Standing:
    """Say how far the run has come."""
    now = time.perf_counter()
    return Standing(
        done=tally.done,
        total=max(counted.total, tally.done),
        is_total_known=counted.is_final,
        rejected=count_rejected(tally.reasons),
        elapsed_s=now - (tally.first_answer or now),
        done_at_first=tally.done_at_first,
    )


@contextmanager
def write_parts(
    answers: AnswerSet, tally: Tally, part_s: float
) -> Iterator[Callable[[pa.Table], None]]:
    """Gather answers into files; what is gathered is written also when the run is cut short."""
    waiting: list[pa.Table] = []
    begun = time.perf_counter()

    def flush() -> None:
        nonlocal begun
        started = time.perf_counter()
        if sum(table.num_rows for table in waiting):
            answers.write(pa.concat_tables(waiting), tally.runtime)
        waiting.clear()
        begun = time.perf_counter()
        tally.stages_s["write"] += begun - started

    def write(table: pa.Table) -> None:
        waiting.append(table)
        rows = sum(one.num_rows for one in waiting)
        if rows >= PART_ROWS or time.perf_counter() - begun > part_s:
            flush()

    try:
        yield write
    finally:
        flush()


def build_metrics(
    plan: BulkPlan,
    classifier: Classifier,
    answers: AnswerSet,
    tally: Tally,
    memory_peak_bytes: int,
    started_at: datetime,
) -> dict[str, Any]:
    """Build the content of metrics.json, but for the evaluation."""
    wall_s = time.perf_counter() - tally.started
    done_after_first = tally.done - tally.done_at_first
    busy = tally.compute_busy(
        dict.fromkeys(STAGES, 1)
        | {"read": plan.num_decoders, "decode": plan.num_decoders, "predict": plan.num_predictors}
    )
    total, reasons, classes = 0, Counter[str](), Counter[str]()
    counts, edges = np.histogram([], bins=NUM_BINS, range=(0.0, 1.0))
    for part in answers.iterate(["reason", "predicted_class", "confidence"]):
        total += part.num_rows
        reasons.update(reason for reason in part["reason"].to_pylist() if reason)
        classes.update(name for name in part["predicted_class"].to_pylist() if name)
        counts += np.histogram(part["confidence"].drop_null().to_numpy(), edges)[0]
    return {
        "schema_version": METRICS_SCHEMA_VERSION,
        "classifier_id": classifier.classifier_id,
        "classes": list(classifier.classes),
        "runtime": tally.runtime | {"num_predictors": plan.num_predictors},
        "counts": describe_counts(total, reasons, classes),
        "run": {
            "started_at": started_at.isoformat(),
            "finished_at": datetime.now(UTC).isoformat(),
            "wall_s": round(wall_s, 3),
            "num_new": tally.num_new,
            "num_known": tally.num_known,
            "new_counts": tally.describe(),
            "images_per_s": round(tally.num_new / wall_s, 3),
            "images_per_s_warm": round(done_after_first / tally.warm_s, 3)
            if tally.warm_s
            else None,
            "stages_s": {name: round(spent, 3) for name, spent in tally.stages_s.items()},
            "stages_busy": busy,
            "bottleneck": find_bottleneck(busy) if tally.warm_s else "too little was new to tell",
            "memory_peak_bytes": memory_peak_bytes,
            "timeline": thin(tally.timeline),
        },
        "confidence_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def report(
    job: ClassifyJob,
    classifier: Classifier,
    answers: AnswerSet,
    metrics: dict[str, Any],
    truth: Truth | None,
) -> None:
    """Judge the answers where the truth is known, and write report and metrics."""
    classes = classifier.classes
    columns = ["scan_uri", "confidence", *(f"prob_{name}" for name in classes)]
    table = answers.read([*columns, "class_map"] if job.explain else columns)
    table = table.filter(pc.is_valid(table["confidence"]))  # the least probable ones as well
    probs = np.stack([table[f"prob_{name}"].to_numpy() for name in classes], axis=1)
    uris = table["scan_uri"]

    def draw(row: int) -> list[Drawn]:
        class_map = table["class_map"][row].as_py() if job.explain else None
        return draw_scan(uris[row].as_py(), class_map, classifier.preprocessing, job.limits)

    curves, mistakes = None, []
    if truth is not None:
        labels = [truth(uri.as_py()) for uri in uris]
        known = np.flatnonzero([label is not None for label in labels])
        if len(known):
            y_true = np.array([classes.index(str(labels[row])) for row in known])
            metrics["evaluation"] = compute_evaluation(y_true, probs[known], classes)
            metrics["evaluation"]["num_without_truth"] = len(labels) - len(known)
            curves = compute_curves(y_true, probs[known], classes)
            mistakes = collect_mistakes(uris, known, y_true, probs[known], classes, draw)
    page = render_bulk_report(
        title="brainray classification report",
        metrics=metrics,
        uncertain=collect_uncertain(uris, probs, classes, draw),
        configuration=asdict(job),
        curves=curves,
        mistakes=mistakes,
        facts={
            "Classifier": classifier.classifier_id,
            "Scans": ", ".join(job.scans_uri),
            "Versions": describe_versions(),
            "Revision": read_code_revision(),
        },
    )
    storage.write_bytes(storage.join(job.output_uri, REPORT_FILE), page.encode())
    storage.write_json(storage.join(job.output_uri, METRICS_FILE), metrics)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A scan as the galleries show it."""

    image_png: bytes
    overlay_png: bytes | None
    """The same, with its class map on it; None if it has none."""


def draw_scan(
    scan_uri: str,
    class_map: Sequence[float] | None,
    preprocessing: Preprocessing,
    limits: DecodeLimits,
) -> list[Drawn]:
    """Draw a scan, and its class map on it; nothing if it has vanished since it was classified."""
    try:
        content = read_named_scan(scan_uri)
        image_png = render_picture(content, limits)
        if class_map is None:
            return [Drawn(image_png, None)]
        pixels = decode_image(content, limits)
    except RejectedImage:
        return []
    side = describe_class_map(preprocessing.size_px)["height"]
    overlay_png = render_overlay(
        np.array(class_map, np.float32).reshape(side, side),
        pixels,
        preprocessing,
        STRIDE_PX,
        shown_px=GALLERY_OVERLAY_PX,
    )
    return [Drawn(image_png, overlay_png)]


def collect_uncertain(
    uris: pa.ChunkedArray,
    probs: NDArray[np.float32],
    classes: tuple[str, ...],
    draw: Callable[[int], list[Drawn]],
) -> list[UncertainScan]:
    """Collect the least certain scans, with their pictures."""
    found = []
    for row in np.argsort(probs.max(axis=1), kind="stable")[:NUM_SCANS_SHOWN]:
        first, second = np.argsort(-probs[row])[:2]
        for drawn in draw(int(row)):
            found.append(
                UncertainScan(
                    scan_uri=uris[row].as_py(),
                    predicted_class=classes[first],
                    confidence=float(probs[row, first]),
                    second_class=classes[second],
                    second_confidence=float(probs[row, second]),
                    image_png=drawn.image_png,
                    overlay_png=drawn.overlay_png,
                )
            )
    return found


def collect_mistakes(
    uris: pa.ChunkedArray,
    known: NDArray[np.int64],
    y_true: NDArray[np.int64],
    probs: NDArray[np.float32],
    classes: tuple[str, ...],
    draw: Callable[[int], list[Drawn]],
) -> list[Mistake]:
    """Collect the most confident mistakes, with their pictures.

    ``y_true`` and ``probs`` are of the scans whose numbers are ``known``.
    """
    top = probs.argmax(axis=1)
    wrong = np.flatnonzero(top != y_true)
    worst = wrong[np.argsort(-probs[wrong, top[wrong]], kind="stable")][:NUM_SCANS_SHOWN]
    return [
        Mistake(
            path=uris[known[row]].as_py(),
            true_class=classes[y_true[row]],
            predicted_class=classes[top[row]],
            confidence=float(probs[row, top[row]]),
            image_png=drawn.image_png,
            overlay_png=drawn.overlay_png,
        )
        for row in worst
        for drawn in draw(int(known[row]))
    ]
