"""The service under load, compared with the bare model on the same cores and with a plain app.

    python benchmarks/serve_load.py --scans-uri FOLDER

Needs `wrk` and `hey` (Debian packages). One run measures these servers in turn:

* ``bare``: the engine alone, one scan after another and in batches, decoded and in memory.
* ``proxy``: `jobs/serve.py`. wrk posts scans as raw bodies.
* ``haproxy``: `jobs/serve.py --production`.
* ``uvicorn``: the same ASGI application on uvicorn, without Ray.
* ``plain``: a minimal app of FastAPI, uvicorn, Pillow and eager fp32 PyTorch.

Then hey sends each server four times its throughput at a fixed rate, and wrk measures it again:
status counts, memory over time, and throughput before and after.
"""

import csv
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
import tyro

from brainray.images.preprocess import Preprocessing
from brainray.images.slices import open_file, open_slice
from brainray.inference.engine import EngineOptions, open_engine
from brainray.labels import BRAIN_TUMOUR_CLASSES
from brainray.model.classifier import load_classifier, save_classifier
from brainray.model.network import build_network
from brainray.serving.metrics import Metrics
from brainray.serving.middleware import AccessLog
from brainray.serving.options import ServiceLimits
from brainray.serving.pipeline import Pipeline
from brainray.serving.predictor import ModelOptions, Predictor
from brainray.serving.routes import build_app

REPOSITORY = Path(__file__).parents[1]
START_S = 180.0
STOP_S = 120.0  # HAProxy mode takes half a minute
TOKEN = "a-token-for-the-benchmark"  # HAProxy mode needs one
Server = Literal["proxy", "haproxy", "uvicorn"]
WRK_SCRIPT = """
local scans, number, statuses = {}, 0, {}
for path in io.lines(os.getenv("SCANS")) do
  local file = io.open(path, "rb"); scans[#scans + 1] = file:read("*all"); file:close()
end
request = function()
  number = number + 1
  return wrk.format("POST", nil, {["Content-Type"] = "image/jpeg",
    ["Authorization"] = "Bearer " .. os.getenv("TOKEN")}, scans[number % #scans + 1])
end
done = function(summary, latency, requests)
  io.write(string.format('JSON {"requests": %d, "seconds": %f, "p50_ms": %f, "p95_ms": %f, ' ..
    '"p99_ms": %f, "failed": %d, "broken": %d}\\n', summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(95) / 1e3, latency:percentile(99) / 1e3,
    summary.errors.status, summary.errors.connect + summary.errors.read + summary.errors.write +
    summary.errors.timeout))
end
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The servers, and the length of the measurement."""

    scans_uri: str
    """Local folder of scans."""
    classifier_uri: str | None = None
    """A classifier bundle; by default random weights at 224 px, which are as fast."""
    num_scans: int = 64
    """Number of scans that are posted in turn."""
    servers: tuple[Server, ...] = ("proxy", "haproxy", "uvicorn")
    connections: tuple[int, ...] = (1, 4, 16, 64)
    """Concurrent requests."""
    duration_s: int = 15
    """Length of each measurement, in seconds."""
    rounds: int = 3
    """Measurements of each server."""
    with_plain: bool = True
    """Measure the plain app too."""
    overload_s: int = 120
    """Length of the overload of each server, in seconds; 0 for none."""
    port: int = 8300
    """Port of the service; the plain app has the next one."""
    role: Literal["all", "bare", "uvicorn", "plain"] = "all"
    """`all` measures; it starts the others in processes of their own."""


# --- servers -------------------------------------------------------------------------------------


def measure_bare(classifier_uri: str, files: list[Path]) -> None:
    """Print the time of one scan, and the scans/s of batches."""
    classifier = load_classifier(classifier_uri)
    engine = open_engine(classifier, EngineOptions())
    images = np.stack(
        [
            open_slice(open_file(f.read_bytes()), 0, classifier.preprocessing).scan.image
            for f in files
        ]
    )
    engine.predict(images)
    times = []
    for image in np.concatenate([images, images]):
        started = time.perf_counter()
        engine.predict(image[None])
        times.append(time.perf_counter() - started)
    rates = []
    for _ in range(4):
        started = time.perf_counter()
        engine.predict(images)
        rates.append(len(images) / (time.perf_counter() - started))
    found = {
        "p50_ms": statistics.median(times) * 1e3,
        "one_per_s": len(times) / sum(times),
        "many_per_s": statistics.median(rates),
    }
    print("JSON", json.dumps(found))


def run_on_uvicorn(classifier_uri: str, port: int) -> None:
    """Serve the service's own application without Ray."""
    import uvicorn

    predictor = Predictor(ModelOptions(classifier_uri=classifier_uri))
    app = build_app(
        Pipeline(predictor, ServiceLimits()),
        token=TOKEN,
        metrics=Metrics("uvicorn"),
        access_log=AccessLog(os.devnull),
    )
    uvicorn.run(app, port=port, log_level="error", access_log=False)


def run_plain_app(classifier_uri: str, port: int) -> None:
    """Serve with a minimal app."""
    import uvicorn
    from fastapi import FastAPI, Request
    from PIL import Image
    from torchvision.transforms import v2

    classifier = load_classifier(classifier_uri)
    network = classifier.build_network().to(memory_format=torch.contiguous_format)
    preprocessing = classifier.preprocessing
    transform = v2.Compose(
        [
            v2.Resize((preprocessing.size_px, preprocessing.size_px)),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([preprocessing.mean], [preprocessing.std]),
        ]
    )
    app = FastAPI()

    @app.get("/readyz")
    def readyz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/classify")
    async def classify(request: Request) -> dict[str, Any]:
        image = Image.open(io.BytesIO(await request.body())).convert("L")
        with torch.inference_mode():
            probs = network(transform(image).unsqueeze(0)).softmax(1)[0]
        return {"probs": dict(zip(classifier.classes, probs.tolist(), strict=True))}

    uvicorn.run(app, port=port, log_level="error", access_log=False)


@contextmanager
def running(port: int, *command: str) -> Iterator[psutil.Process]:
    """Start a server, wait until it is ready, and stop it at the end."""
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"BRAINRAY_API_TOKEN": TOKEN},
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + START_S
        while not is_ready(port):
            assert process.poll() is None, "the server ended before it was ready"
            assert time.monotonic() < deadline, "the server did not become ready"
            time.sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(STOP_S)


def is_ready(port: int) -> bool:
    """Return whether a server answers."""
    with (
        suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer,
    ):
        return bool(answer.status == 200)
    return False


# --- load ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """The options and files of all measurements."""

    options: Options
    classifier_uri: str
    files: list[Path]
    folder: Path

    def run_wrk(self, port: int, connections: int, seconds: int) -> dict[str, float]:
        """Post scans on some connections as fast as possible; return the results of wrk."""
        script, names = self.folder / "post.lua", self.folder / "scans.txt"
        script.write_text(WRK_SCRIPT)
        names.write_text("".join(f"{file.absolute()}\n" for file in self.files))
        output = subprocess.run(
            [
                *("wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "60s"),
                *("-s", str(script), f"http://127.0.0.1:{port}/v1/classify"),
            ],
            env=os.environ | {"SCANS": str(names), "TOKEN": TOKEN},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        return read_json(output)

    def run_self(self, role: str) -> list[str]:
        """Return the command that runs this file in a role."""
        return [
            *(sys.executable, __file__, "--role", role, "--scans-uri", self.options.scans_uri),
            *("--classifier-uri", self.classifier_uri, "--port", str(self.options.port)),
            *("--num-scans", str(self.options.num_scans)),
        ]

    def serve(self, server: Server) -> list[str]:
        """Return the command that starts a server."""
        if server == "uvicorn":
            return self.run_self("uvicorn")
        return [
            *(sys.executable, "jobs/serve.py", "--classifier-uri", self.classifier_uri),
            *("--port", str(self.options.port)),
            *(["--production"] if server == "haproxy" else []),
        ]


def read_json(output: str) -> dict[str, float]:
    """Read the line of figures in a command's output."""
    (line,) = [line for line in output.splitlines() if line.startswith("JSON ")]
    found: dict[str, float] = json.loads(line.removeprefix("JSON "))
    return found


def compare(bench: Bench) -> dict[Server, float]:
    """Measure the servers in turn; print all results, and return the best rate of each."""
    options = bench.options
    best: dict[Server, float] = dict.fromkeys(options.servers, 0.0)
    for turn in range(1, options.rounds + 1):
        output = subprocess.run(
            bench.run_self("bare"), check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        bare = read_json(output)
        print(
            f"round {turn}  bare     one after another {bare['p50_ms']:6.1f} ms "
            f"{bare['one_per_s']:6.1f} scans/s   many at once {bare['many_per_s']:6.1f} scans/s"
        )
        for server in options.servers:
            with running(options.port, *bench.serve(server)):
                bench.run_wrk(options.port, 4, 3)
                for connections in options.connections:
                    found = bench.run_wrk(options.port, connections, options.duration_s)
                    rate = show(turn, server, connections, found, bare)
                    best[server] = max(best[server], rate)
        if options.with_plain:
            with running(options.port + 1, *bench.run_self("plain")):
                bench.run_wrk(options.port + 1, 4, 3)
                for connections in options.connections:
                    found = bench.run_wrk(options.port + 1, connections, options.duration_s)
                    show(turn, "plain", connections, found, bare)
    return best


def show(
    turn: int, server: str, connections: int, found: dict[str, float], bare: dict[str, float]
) -> float:
    """Print a result and its share of the bare model; return its scans/s."""
    rate = (found["requests"] - found["failed"]) / found["seconds"]
    print(
        f"round {turn}  {server:<8} {connections:>3} connections  p50 {found['p50_ms']:7.1f}  "
        f"p95 {found['p95_ms']:7.1f}  p99 {found['p99_ms']:7.1f} ms  {rate:6.1f} scans/s  "
        f"{rate / bare['many_per_s']:5.1%} of bare  p50 {found['p50_ms'] - bare['p50_ms']:+7.1f} ms"
        f"  failed {found['failed']:.0f}  broken {found['broken']:.0f}",
        flush=True,
    )
    return rate


def overload(bench: Bench, name: Server, rate: float) -> None:
    """Send four times the throughput at a fixed rate; print statuses, memory, and recovery."""
    options = bench.options
    workers = 800  # enough to keep the rate although many wait for answers
    with running(options.port, *bench.serve(name)) as server:
        before = bench.run_wrk(options.port, 16, options.duration_s)
        memory: list[tuple[float, float]] = []
        stopped = threading.Event()
        watcher = threading.Thread(target=watch_memory, args=(server, memory, stopped))
        watcher.start()
        output = subprocess.run(
            [
                *("hey", "-z", f"{options.overload_s}s", "-c", str(workers)),
                *("-q", f"{4 * rate / workers:.4f}", "-t", "60", "-m", "POST", "-o", "csv"),
                *("-T", "image/jpeg", "-D", str(bench.files[0])),
                *("-H", f"Authorization: Bearer {TOKEN}"),
                f"http://127.0.0.1:{options.port}/v1/classify",
            ],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        stopped.set()
        watcher.join()
        after = bench.run_wrk(options.port, 16, options.duration_s)
    rows = list(csv.DictReader(io.StringIO(output)))
    rate_sent = len(rows) / options.overload_s
    print(f"overload of {name}: {rate_sent:.0f} requests/s for {options.overload_s} s")
    counts = Counter(row["status-code"] for row in rows)
    for status, count in sorted(counts.items()):
        times = sorted(float(r["response-time"]) for r in rows if r["status-code"] == status)
        print(
            f"  status {status}  {count:>7}  {count / options.overload_s:7.1f} /s  "
            f"p50 {times[len(times) // 2]:.3f} s  p99 {times[int(len(times) * 0.99)]:.3f} s"
        )
    for part in range(5):
        at, mib = memory[min(len(memory) - 1, part * (len(memory) - 1) // 4)]
        print(f"  memory at {at:5.0f} s  {mib:7.0f} MiB")
    for name, found in (("before", before), ("after", after)):
        print(f"  {name:<6} {found['requests'] / found['seconds']:6.1f} scans/s, 16 connections")


def watch_memory(
    server: psutil.Process, memory: list[tuple[float, float]], stopped: threading.Event
) -> None:
    """Record the private memory of the server's processes."""
    started = time.monotonic()
    while not stopped.is_set():
        total = 0
        for process in (server, *server.children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_full_info().uss
        memory.append((time.monotonic() - started, total / 2**20))
        stopped.wait(2)


def save_random_classifier(folder: Path) -> str:
    """Write a classifier bundle with random weights."""
    torch.manual_seed(0)
    save_classifier(
        str(folder),
        build_network(len(BRAIN_TUMOUR_CLASSES)).state_dict(),
        classes=BRAIN_TUMOUR_CLASSES,
        preprocessing=Preprocessing(),
        provenance={},
    )
    return str(folder)


def main(options: Options) -> None:
    """Measure, or run in another role."""
    found = sorted(Path(options.scans_uri).rglob("*.jpg"))
    files = found[:: max(1, len(found) // options.num_scans)][: options.num_scans]
    if options.role == "bare":
        measure_bare(str(options.classifier_uri), files)
    elif options.role == "uvicorn":
        run_on_uvicorn(str(options.classifier_uri), options.port)
    elif options.role == "plain":
        run_plain_app(str(options.classifier_uri), options.port + 1)
    else:
        with tempfile.TemporaryDirectory() as name:
            uri = options.classifier_uri or save_random_classifier(Path(name) / "classifier")
            bench = Bench(options, uri, files, Path(name))
            best = compare(bench)
            for server, rate in best.items():
                if options.overload_s:
                    overload(bench, server, rate)


if __name__ == "__main__":
    main(tyro.cli(Options))
