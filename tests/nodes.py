"""A Ray cluster for tests: nodes on this machine, with a token, ports and folders of their own.

Every node is a `ray start --block` process and its children. Commands reach the cluster as a
user's commands do: by the token and the addresses in their environment.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.conftest import REPOSITORY
from tests.processes import TIMEOUT_S, finish

BIN = Path(sys.executable).parent
STORE_BYTES = 150 * 10**6


class Node:
    """One node: a `ray start` process, its raylet, and the workers of the raylet."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def list_processes(self) -> list[psutil.Process]:
        """List the processes of the node, including those that have outlived their parent."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid:
                    found.append(process)
                    found += process.children(recursive=True)
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        return found

    def find_id(self) -> str:
        """Return Ray's id of the node, from the command line of its raylet."""
        for process in self.list_processes():
            for word in process.cmdline():
                if word.startswith("--node_id="):
                    return word.partition("=")[2]
        raise AssertionError("the node has no raylet")

    def kill(self) -> None:
        """Kill all processes of the node, as a power failure does."""
        for process in self.list_processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


class Cluster:
    """A head and other nodes; :meth:`close` kills all of them."""

    def __init__(self, *, head_cpus: int, node_cpus: Sequence[int] = (), **extra: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="brainray-"))  # short, for socket paths
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.port, self.dashboard_port, client_port = _find_ports(3)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "HOME": str(self.folder),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
            # On a busy machine, a process may take longer to start than Ray waits by default.
            "RAY_raylet_start_wait_time_s": "300",
            "RAY_agent_register_timeout_ms": "300000",
            "RAY_worker_register_timeout_seconds": "300",
            # By default, a node of one CPU ends all but one idle worker after a second. The next
            # chunk of scans would start a new worker, with seconds of imports.
            "RAY_idle_worker_killing_time_threshold_ms": "300000",
            **extra,
        }
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self.nodes: list[Node] = []
        self.head = self._start(
            "--head",
            f"--port={self.port}",
            f"--dashboard-port={self.dashboard_port}",
            "--dashboard-host=127.0.0.1",
            f"--ray-client-server-port={client_port}",
            f"--temp-dir={self.folder / 'ray'}",
            num_cpus=head_cpus,
        )
        try:
            self._wait_for_port(self.dashboard_port)
            self._wait_for_node(0)  # the dashboard listens before the node takes jobs
            for number, num_cpus in enumerate(node_cpus, 1):
                self.add_node(num_cpus)
                # One at a time: two nodes that start at once may choose the same port.
                self._wait_for_node(number)
        except AssertionError:
            self.close()
            raise

    def add_node(self, num_cpus: int) -> Node:
        return self._start(f"--address={self.address}", num_cpus=num_cpus)

    def drain(self, node: Node, *, deadline_s: int) -> None:
        """Announce the preemption of a node, as a cloud does for spot instances."""
        words = ("--reason-message", "spot", "--deadline-remaining-seconds", deadline_s)
        reason = "DRAIN_NODE_REASON_PREEMPTION"
        command = ("ray", "drain-node", "--address", self.address, "--node-id", node.find_id())
        status, printed = finish(self.start_client(*command, "--reason", reason, *words))
        assert status == 0, printed

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _start(self, *words: str, num_cpus: int) -> Node:
        options = [
            f"--num-cpus={num_cpus}",
            f"--object-store-memory={STORE_BYTES}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--dashboard-agent-listen-port=0",
            "--disable-usage-stats",
            "--block",
        ]
        with (self.folder / f"node-{len(self.nodes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(BIN / "ray"), "start", *words, *options],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.nodes.append(Node(process))
        return self.nodes[-1]

    def _wait_for_port(self, port: int) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, self.read_logs()
                assert self.head.process.poll() is None, self.read_logs()
                time.sleep(0.2)

    def _wait_for_node(self, number: int) -> None:
        """Wait until a node has joined: `ray start --block` then prints that it blocks."""
        deadline = time.monotonic() + TIMEOUT_S
        while "will now block forever" not in (self.folder / f"node-{number}.log").read_text():
            assert time.monotonic() < deadline, self.read_logs()
            assert self.nodes[number].process.poll() is None, self.read_logs()
            time.sleep(0.2)

    def read_logs(self) -> str:
        return "\n".join(file.read_text() for file in sorted(self.folder.glob("node-*.log")))

    def start(self, *words: object, cwd: Path = REPOSITORY) -> subprocess.Popen[str]:
        """Start a command that joins the cluster as a driver, on the machine of the head."""
        environment = self.environment | {"RAY_ADDRESS": self.address}
        return _start(words, cwd, environment)

    def start_client(
        self, *words: object, cwd: Path = REPOSITORY, **extra: str
    ) -> subprocess.Popen[str]:
        """Start a command that sends requests to the dashboard, as `ray job …` does."""
        environment = self.environment | {
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard_port}"
        }
        return _start(words, cwd, environment | extra)

    def close(self) -> None:
        for node in self.nodes:
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def _start(
    words: Sequence[object], cwd: Path, environment: dict[str, str]
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(word) for word in words],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _find_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
