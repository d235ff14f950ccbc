"""Real Ray clusters on loopback: a raylet for each node, with a home of its own, started as an operator starts it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_WAIT_POLICY": "passive",
    # Else what it starts gives way to all that a machine does besides, tests in other processes too.
    "RAY_worker_niceness": "0",
}
_START_SECONDS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalNode:
    """A node: `ray start --block` and what that started."""

    process: subprocess.Popen[bytes]
    home: Path
    host: str

    def raylet(self) -> int:
        """The process that is the node, as the cluster sees it."""
        [found] = [pid for pid in children_of(self.process.pid) if name_of(pid) == "raylet"]
        return found

    def kill(self) -> None:
        """Take the node away, as a machine that loses its power goes: nothing of it says farewell."""
        os.kill(self.raylet(), signal.SIGKILL)

    def stop(self) -> None:
        """End it in order; what does not end is ended."""
        started = descendants_of(self.process.pid)
        self.process.terminate()
        try:
            self.process.wait(20.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in started:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCluster:
    """Nodes of one cluster; the first has its head."""

    address: str
    nodes: list[LocalNode]


@contextmanager
def cluster_of(folder: Path, num_nodes: int) -> Iterator[LocalCluster]:
    """Run a cluster whose nodes have a processor each, for the length of a block."""
    sockets = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # the names of sockets must be short
    port = _free_port()
    nodes: list[LocalNode] = []
    try:
        for number in range(num_nodes):
            host = f"127.0.0.{number + 1}"
            which = (
                ["--head", f"--port={port}", f"--temp-dir={sockets}", "--include-dashboard=false"]
                if number == 0
                else [f"--address=127.0.0.1:{port}"]
            )
            nodes.append(_started(which, host, folder / f"node-{number}"))
            _await_node(nodes[-1], f"127.0.0.1:{port}", number + 1)
        yield LocalCluster(address=f"127.0.0.1:{port}", nodes=nodes)
    finally:
        for node in reversed(nodes):
            node.stop()
        shutil.rmtree(sockets, ignore_errors=True)


def children_of(pid: int) -> list[int]:
    """The processes that a process has started itself."""
    return [child for child, parent in _parents().items() if parent == pid]


def descendants_of(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    return [one for child in children_of(pid) for one in (child, *descendants_of(child))]


def name_of(pid: int) -> str:
    """What the kernel calls a process; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _parents() -> dict[int, int]:
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            found[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return found


def _started(which: list[str], host: str, home: Path) -> LocalNode:
    home.mkdir(parents=True)
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        *which,
        f"--node-ip-address={host}",
        "--num-cpus=1",
        "--num-gpus=0",
        f"--object-store-memory={100 << 20}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
        "--disable-usage-stats",
        "--no-monitor",
        "--include-log-monitor=false",
        "--block",
    ]
    environ = {name: text for name, text in os.environ.items() if not name.startswith(("LUTHIER_", "RAY_"))}
    with (home / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**environ, **_QUIET, "LUTHIER_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return LocalNode(process=process, home=home, host=host)


def _await_node(node: LocalNode, address: str, count: int) -> None:
    """Wait until so many nodes are of the cluster."""
    deadline = time.monotonic() + _START_SECONDS
    asking = (
        "import sys, ray; from ray._raylet import GcsClient; "
        "print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)))"
    )
    while time.monotonic() < deadline:
        assert node.process.poll() is None, (node.home / "ray.log").read_text()
        found = subprocess.run(
            [sys.executable, "-c", asking, address], capture_output=True, text=True, timeout=60, check=False
        )
        if found.stdout.strip() == str(count):
            return
    raise AssertionError((node.home / "ray.log").read_text())


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
