"""Services and workers as processes of their own, on free ports, for benchmarks that go the whole way."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from luthier.client import Client, ConfigArguments

SERVICES = ("data", "training", "evaluation")
WAIT_SECONDS = 240.0
_AT_ONCE = [("grpc.max_reconnect_backoff_ms", 100)]
"""By default gRPC tries again after a second, and then after longer ones."""


@dataclass(kw_only=True)
class Stack:
    """Services and their workers, those that were started.

    Attributes:
        home: of all of them.
        device: what the workers with models compute on.
        settings: further variables of their environment.
        processes: those that run, by name.
    """

    home: Path
    device: str
    settings: Mapping[str, str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _addresses: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(6)]
        ports = [one.getsockname()[1] for one in sockets]
        for one in sockets:
            one.close()
        for place, name in enumerate(SERVICES):
            self._addresses[f"{name.upper()}_ADDRESS"] = f"127.0.0.1:{ports[place]}"
            self._addresses[f"{name.upper()}_METRICS_ADDRESS"] = f"127.0.0.1:{ports[place + 3]}"

    def start(self, *words: str) -> None:
        """Start `luthierd` with these words."""
        self.launch(" ".join(words[:2]), "-m", "luthier.daemon", *words)

    def launch(self, name: str, *words: str) -> None:
        """Start this Python with these words, as a process of the stack."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith("LUTHIER_")}
        addresses = {f"LUTHIER_{key}": value for key, value in self._addresses.items()}
        environment = {**clean, "LUTHIER_HOME": str(self.home), **addresses, **self.settings}
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def start_worker(self, service: str) -> None:
        """Start the worker of a service, also again."""
        words = () if service == "data" else ("--device", self.device)
        self.start("worker", service, *words)

    def await_serving(self, service: str) -> None:
        """Return once a service serves. Raises RuntimeError with its log when it does not."""
        deadline = time.monotonic() + WAIT_SECONDS
        with grpc.insecure_channel(self._addresses[f"{service.upper()}_ADDRESS"], _AT_ONCE) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while not _serves(stub):
                if time.monotonic() > deadline or self.processes[f"serve {service}"].poll() is not None:
                    raise RuntimeError(f"{service} does not serve:\n{self.logs()}")
                time.sleep(0.05)

    def client(self) -> Client:
        """Return a client of the services."""
        return Client(
            ConfigArguments(
                home=self.home,
                data_address=self._addresses["DATA_ADDRESS"],
                training_address=self._addresses["TRAINING_ADDRESS"],
                evaluation_address=self._addresses["EVALUATION_ADDRESS"],
            )
        )

    def logs(self) -> str:
        """Return the end of each log."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}"
            for path in sorted(self.home.glob("*.log"))
        )

    def stop(self) -> None:
        """End every process."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _serves(stub: health_pb2_grpc.HealthStub) -> bool:
    try:
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextmanager
def running(
    home: Path,
    device: str,
    services: Sequence[str] = SERVICES,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Stack]:
    """Run services, and a worker of each, for the length of a block; workers with models compute on a device.

    `settings`: further variables of their environment.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    stack = Stack(home=home, device=device, settings=settings)
    try:
        for service in services:
            stack.start("serve", service)
        for service in services:
            stack.await_serving(service)
        for service in services:
            stack.start_worker(service)
        yield stack
    finally:
        stack.stop()
