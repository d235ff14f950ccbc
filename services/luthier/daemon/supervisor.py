"""Services and workers as child processes, kept running until asked to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from luthier.errors import Unavailable

_START_SECONDS = 60.0
_STOP_SECONDS = 30.0
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 10.0
_STEADY_SECONDS = 30.0
_LOG_TAIL_LINES = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A child process to keep running.

    Attributes:
        name: shown to people and used for the log file.
        module: run with `python -m`.
        address: host:port whose health says that it serves; empty for workers.
    """

    name: str
    module: str
    address: str = ""


class Supervisor:
    """Starts programs, restarts those that end, stops them all at the end."""

    def __init__(self, logs: Path, say: Callable[[str], None]) -> None:
        self._logs = logs
        self._say = say
        self._keepers: list[asyncio.Task[None]] = []
        self._processes: dict[Program, asyncio.subprocess.Process] = {}

    async def start(self, programs: Sequence[Program]) -> None:
        """Start programs and return when all those with an address are SERVING.

        Raises:
            Unavailable: one of them ended or did not serve in time; its last log lines are in the message.
        """
        started = []
        for program in programs:
            process = await self._spawn(program)
            self._keepers.append(asyncio.create_task(self._keep(program, process)))
            started.append(self._serving(program, process))
        await asyncio.gather(*started)

    async def stop(self) -> None:
        """Ask every child to end, wait, and kill what did not.

        Workers go first: they give their tasks back to services that still listen.
        """
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for serves in (False, True):
            ending = [
                process for program, process in self._processes.items() if bool(program.address) == serves
            ]
            await asyncio.gather(*map(_end, ending))

    async def _spawn(self, program: Program) -> asyncio.subprocess.Process:
        self._logs.mkdir(parents=True, exist_ok=True)
        with self._log_file(program).open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "luthier.daemon.child",
                str(os.getpid()),
                program.module,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes[program] = process
        return process

    async def _keep(self, program: Program, process: asyncio.subprocess.Process) -> None:
        pause_seconds = _FIRST_PAUSE_SECONDS
        while True:
            began = time.monotonic()
            status = await process.wait()
            if time.monotonic() - began > _STEADY_SECONDS:
                pause_seconds = _FIRST_PAUSE_SECONDS
            self._say(f"{program.name} ended with status {status}, starting it again in {pause_seconds:g} s")
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(pause_seconds * 2, _LONGEST_PAUSE_SECONDS)
            try:
                process = await self._spawn(program)
            except OSError as error:  # no process or file handle is left just now; the old one is still ended
                self._say(f"{program.name} cannot be started: {error}")

    async def _serving(self, program: Program, process: asyncio.subprocess.Process) -> None:
        if not program.address:
            return
        deadline = time.monotonic() + _START_SECONDS
        options = [("grpc.max_reconnect_backoff_ms", 100)]
        async with grpc.aio.insecure_channel(program.address, options=options) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while not await _is_serving(stub):
                if process.returncode is not None:
                    raise Unavailable(f"{program.name} ended at start-up:\n{self._log_tail(program)}")
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"{program.name} does not serve on {program.address} after {_START_SECONDS:g} s:\n"
                        f"{self._log_tail(program)}"
                    )
                await asyncio.sleep(0.03)

    def _log_file(self, program: Program) -> Path:
        return self._logs / f"{program.name}.log"

    def _log_tail(self, program: Program) -> str:
        lines = self._log_file(program).read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])


async def _is_serving(stub: health_pb2_grpc.HealthStub) -> bool:
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


async def run_until_stopped(
    supervisor: Supervisor, services: Sequence[Program], workers: Sequence[Program], ready: Callable[[], None]
) -> None:
    """Run services, then workers, until SIGINT or SIGTERM.

    Raises:
        Unavailable: a service did not come up; everything started is stopped again.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    try:
        # Workers come second: importing torch next to the services would slow the start of both.
        await supervisor.start(services)
        ready()
        await supervisor.start(workers)
        await stopping.wait()
    finally:
        await supervisor.stop()
