"""What this machine can do for Luthier, and what is wrong with it: looked at without changing anything."""

from __future__ import annotations

import ctypes
import errno
import http.client
import importlib.metadata
import os
import platform
import socket
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from luthier.data.config import Config as DataConfig
from luthier.errors import InvalidArgument, LuthierError
from luthier.evaluation.config import Config as EvaluationConfig
from luthier.kernels.dispatch import current_isa
from luthier.kernels.tables import OPS, entries
from luthier.runtime.config import others, read
from luthier.runtime.granted_keys import ALL_PROJECTS, GRANTED_FILE, read_granted
from luthier.runtime.home import require_own
from luthier.runtime.server import check_loopback
from luthier.runtime.tracing import traces_config
from luthier.storage.disk import Disk
from luthier.training.config import Config as TrainingConfig
from luthier.training.executors.ranks import require_choice, require_devices
from luthier.training.executors.ray.driver import found_fleet
from luthier.work.device import chosen_device
from luthier.work.machine import available_bytes, memory_bytes, num_cores, processor_name
from luthier.work.worker_config import WorkerConfig

Level = Literal["ok", "warning", "problem"]
_GIB = 1 << 30
_FEW_BYTES = 2 * _GIB
_ANSWER_SECONDS = 3.0
_HUB = "https://huggingface.co"
_HUB_PORTS = {"https": 443, "http": 80}
_CONFIGS = {"DATA": DataConfig, "TRAINING": TrainingConfig, "EVALUATION": EvaluationConfig}
_UNASKED = -1
_LAST_PORT = 65535
_PAGE_BYTES = 16 << 20
_TIME_ERROR = 5
"""What adjtimex says of a clock that nothing keeps right."""
_PACKAGES = ("luthier", "luthier-client", "grpcio", "protobuf", "torch", "transformers", "torchao", "triton")
_WAYS: Mapping[frozenset[str], str] = {
    frozenset(): "torch, unmeasured",
    frozenset({"cpu"}): "C++",
    frozenset({"eager"}): "torch",
    frozenset({"cpu", "eager"}): "either, by shape",
}
"""What is taken of an operator whose winners, over shapes and types, are these."""
_OF_WORKERS = ("torch", "transformers", "torchao")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found of one thing.

    Attributes:
        what: the thing.
        level: problem: something that Luthier does will fail; warning: it may, or be slow.
        text: what was found; of what is not ok, with what would be right.
    """

    what: str
    level: Level
    text: str


def _ok(what: str, text: str) -> Finding:
    return Finding(what=what, level="ok", text=text)


def _warning(what: str, text: str) -> Finding:
    return Finding(what=what, level="warning", text=text)


def _problem(what: str, text: str) -> Finding:
    return Finding(what=what, level="problem", text=text)


def examined(home: Path, addresses: Mapping[str, str]) -> Iterator[Finding]:
    """Yield what is found of everything; `addresses` are those of the services by their names.

    Raises nothing: what cannot be looked at is a finding.
    """
    looks: Mapping[str, Callable[[], Finding]] = {
        "versions": versions,
        "processor": processor,
        "kernels": kernels,
        "device": lambda: device(read(WorkerConfig, section="WORKER").device),
        "executor": lambda: executor(read(WorkerConfig, section="WORKER")),
        "memory": memory,
        "home": partial(folder, home),
        "granted keys": lambda: granted_keys(home, projects()),
        "disk": lambda: disk(home, floor_bytes()),
        **{f"{name} service": partial(service, name, address) for name, address in addresses.items()},
        **{f"{name} metrics": partial(_metrics_of, name, addresses) for name in addresses},
        "traces": traces,
        "clock": clock,
        "hub": lambda: hub(others().get("HF_ENDPOINT") or _HUB),
    }
    for what, look in looks.items():
        try:
            yield look()
        except (LuthierError, OSError) as error:
            yield _problem(what, str(error))


def versions() -> Finding:
    """Say which versions are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    text = ", ".join(
        [f"python {platform.python_version()}", *(f"{name} {one}" for name, one in found.items())]
    )
    if found.get("luthier") != found.get("luthier-client"):
        return _problem("versions", f"luthier and luthier-client must be of one version: {text}")
    if missing := [name for name in _OF_WORKERS if name not in found]:
        return _warning(
            "versions",
            f"{text}; without {', '.join(missing)} no model is trained or asked here: pip install 'luthier[worker]'",
        )
    return _ok("versions", text)


def processor() -> Finding:
    """Say what the processor is, and what of it kernels use."""
    isa = current_isa()
    text = f"{processor_name()}, {num_cores()} cores, kernels run {isa}"
    if isa == "plain":
        return _warning("processor", f"{text}: without AVX2 training takes many times as long")
    return _ok("processor", text)


def kernels() -> Finding:
    """Say which implementation of each operator is taken on this instruction set, as it was measured."""
    isa = current_isa()
    ways: dict[str, list[str]] = {"C++": [], "torch": [], "either, by shape": [], "torch, unmeasured": []}
    for op in OPS:
        won = {best for key, best in entries(op).items() if key.startswith(f"{isa}/")}
        ways[_WAYS[frozenset(won)]].append(op)
    num_measured = len(OPS) - len(ways["torch, unmeasured"])
    taken = "; ".join(f"{way}: {', '.join(ops)}" for way, ops in ways.items() if ops)
    text = f"{num_measured} of {len(OPS)} operators are measured on {isa}"
    if not num_measured:
        return _warning(
            "kernels", f"{text}: plain torch is taken; benchmarks/kernels.py --write-tables measures them"
        )
    return _ok("kernels", f"{text}; {taken}")


def device(wanted: str) -> Finding:
    """Say what a worker with a device of this name computes on."""
    found = chosen_device(wanted)
    return _ok(
        "device", f"a worker takes {found.name} (LUTHIER_WORKER_DEVICE is {wanted}): it {found.equipment}"
    )


def executor(config: WorkerConfig) -> Finding:
    """Say how a training worker with these settings runs a training; a Ray cluster is asked what it has."""
    require_choice(config.executor, config.ranks)
    setting = f"LUTHIER_WORKER_EXECUTOR is {config.executor}"
    if config.executor == "inline":
        return _ok("executor", f"a training worker runs a training in one process ({setting})")
    if config.executor == "ray":
        _, found = found_fleet(config)
        where = f"the Ray cluster at {config.ray_address}"
    else:
        found, where = chosen_device(config.device), "this machine"
        kind, num_available = found.name.partition(":")[0], found.num_available
        require_devices(kind, num_available, config.device, config.ranks, found.name)
    return _ok("executor", f"on up to {config.ranks} ranks of {where} ({setting}): each {found.equipment}")


def memory() -> Finding:
    """Say what memory this process may take, and what is free of it."""
    whole, free = memory_bytes(), available_bytes()
    if not whole or free is None:
        return _warning("memory", "the system does not tell how much there is")
    text = f"{free / _GIB:.1f} of {whole / _GIB:.1f} GiB are free"
    if free < _FEW_BYTES:
        return _warning("memory", f"{text}: a worker needs about {_FEW_BYTES // _GIB} GiB beside its model")
    return _ok("memory", text)


def folder(home: Path) -> Finding:
    """Say whether the home is a folder that may hold the state of this process's user."""
    if not home.exists():
        parent = next(one for one in home.parents if one.exists())
        if not _may_write(parent):
            return _problem(
                "home",
                f"{home} cannot be made, user {os.geteuid()} may not write {parent}: make it that user's own, or set "
                "LUTHIER_HOME",
            )
        return _ok("home", f"{home} is made by the first start, in {parent}")
    if not home.is_dir():
        return _problem("home", f"{home} must be a folder: set LUTHIER_HOME")
    require_own(home)
    if not _may_write(home):
        return _problem(
            "home", f"user {os.geteuid()} may not write {home}: mend its mode, or what it is mounted from"
        )
    return _ok("home", f"{home}, mode {stat.S_IMODE(home.stat().st_mode):04o}")


def projects() -> tuple[str, ...]:
    """Return the projects that are served."""
    return read(DataConfig, section="DATA").projects


def granted_keys(home: Path, served: Collection[str]) -> Finding:
    """Say whether services can read the keys of some projects and roles, and whether those are served."""
    granted = read_granted(home)
    unserved = sorted({project for key in granted for project in key.projects} - {ALL_PROJECTS, *served})
    text = f"{len(granted)} in {home / GRANTED_FILE}"
    if unserved:
        return _warning(
            "granted keys",
            f"{text}, of projects that are not served: {', '.join(unserved)}; see LUTHIER_PROJECTS",
        )
    return _ok("granted keys", text)


def _may_write(path: Path) -> bool:
    return os.access(path, os.W_OK | os.X_OK)


def floor_bytes() -> int:
    """Return the highest floor of the services, of what must stay free on the disk of the home."""
    return max(read(config, section=section).min_free_bytes for section, config in _CONFIGS.items())


def disk(home: Path, min_free_bytes: int) -> Finding:
    """Say what room there is on the disk of the home."""
    there = next(one for one in (home, *home.parents) if one.exists())
    found = Disk(there, min_free_bytes)
    text = f"{found.free_bytes() / _GIB:.1f} GiB are free at {there}"
    if not found.has_room():
        return _problem(
            "disk", f"{text}, less than the floor of {min_free_bytes / _GIB:.1f} GiB: nothing new begins"
        )
    if found.free_bytes() < 5 * min_free_bytes:
        return _warning(
            "disk", f"{text}: few checkpoints fit before the floor of {min_free_bytes / _GIB:.1f} GiB"
        )
    return _ok("disk", text)


def service(name: str, address: str) -> Finding:
    """Say whether a service serves at its address, or could."""
    what = f"{name} service"
    check_loopback(address)
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except ConnectionRefusedError:
        return _ok(what, f"{address} is free: the service does not run")
    except OSError as error:
        return _problem(what, f"{address} cannot be reached: {error}")
    # An address means host and port, whatever proxies the environment names.
    options = [("grpc.enable_retries", 0), ("grpc.enable_http_proxy", 0)]
    asked = health_pb2.HealthCheckRequest(service=f"luthier.v1.{name.capitalize()}Service")
    with grpc.insecure_channel(address, options=options) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=_ANSWER_SECONDS)
        except grpc.RpcError:
            setting = f"LUTHIER_{name.upper()}_ADDRESS"
            return _problem(
                what, f"something else listens at {address}: stop it, or set {setting} to another port"
            )
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        return _warning(what, f"{address} answers that it does not serve: it starts or stops")
    return _ok(what, f"serves at {address}")


def _metrics_of(name: str, addresses: Mapping[str, str]) -> Finding:
    return metrics(name, _taken(addresses))


def _taken(addresses: Mapping[str, str]) -> Mapping[str, str]:
    """Return every address that services listen at, by the setting that says it."""
    calls = {f"LUTHIER_{name.upper()}_ADDRESS": address for name, address in addresses.items()}
    pages: dict[str, str] = {
        f"LUTHIER_{section}_METRICS_ADDRESS": read(config, section=section).metrics_address
        for section, config in _CONFIGS.items()
    }
    return {**calls, **pages}


def metrics(name: str, taken: Mapping[str, str]) -> Finding:
    """Say whether a service serves its metrics, or could: it does not start where something else has that address.

    `taken` is every address that services listen at, by its setting.
    """
    what, setting = f"{name} metrics", f"LUTHIER_{name.upper()}_METRICS_ADDRESS"
    address = taken[setting]
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) > _LAST_PORT:
        return _problem(what, f"{setting} must be host:port, e.g. 127.0.0.1:9601, got {address!r}")
    if int(port) and (twins := [one for one in taken if one != setting and taken[one] == address]):
        return _problem(what, f"{setting} and {twins[0]} are both {address}: give each a port of its own")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, int(port)), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE and _has_metrics(host, int(port)):
            return _ok(what, f"are served at {address}")
        right = "stop what has it" if error.errno == errno.EADDRINUSE else "it must be this machine's"
        return _problem(
            what,
            f"{address} cannot be taken, and the service will not start ({error.strerror}): {right}, or set {setting} "
            "to another",
        )
    return _ok(what, f"{address} is free: the service does not run")


def _has_metrics(host: str, port: int) -> bool:
    """Tell whether a service of ours serves its metrics there."""
    reached = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    asked = http.client.HTTPConnection(reached, port, timeout=_ANSWER_SECONDS)
    try:
        asked.request("GET", "/metrics")
        return b"luthier_build_info" in asked.getresponse().read(_PAGE_BYTES)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        asked.close()


def traces() -> Finding:
    """Say where traces go, and whether somebody takes them there."""
    address = traces_config().address
    if not address:
        return _ok("traces", "are kept nowhere: LUTHIER_TRACES_ADDRESS is empty")
    host, _, port = address.removeprefix("https://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        return _warning(
            "traces",
            f"nobody takes them at {address} ({error}): start a receiver of OTLP over gRPC there, or unset "
            "LUTHIER_TRACES_ADDRESS",
        )
    return _ok("traces", f"are sent to {address}")


def clock() -> Finding:
    """Say whether something keeps the clock right: leases do not need it, tokens and certificates do."""
    state = _clock_state()
    if state == _UNASKED:
        return _warning(
            "clock", "the system cannot be asked whether something keeps it right: see `timedatectl`"
        )
    if state == _TIME_ERROR:
        return _warning(
            "clock", "nothing keeps the clock right: processes on several machines need chrony or ntpd"
        )
    return _ok("clock", "is kept right")


def _clock_state() -> int:
    libc = ctypes.CDLL(None)
    # A struct timex of zeros asks and sets nothing; it has 208 bytes on 64 bits.
    return int(libc.adjtimex(ctypes.create_string_buffer(256)))


def hub(endpoint: str) -> Finding:
    """Say whether base models can come from the Hub at an address, as HF_ENDPOINT has it."""
    try:
        url = urlsplit(endpoint)
        host, port = url.hostname or "", url.port or _HUB_PORTS[url.scheme]
    except (ValueError, KeyError):
        host = ""
    if not host:
        raise InvalidArgument(f"HF_ENDPOINT must be an address such as {_HUB}, got {endpoint!r}")
    try:
        socket.create_connection((host, port), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        return _warning(
            "hub",
            f"{endpoint} cannot be reached ({error}): register base models from a folder or a GGUF file",
        )
    return _ok("hub", f"{endpoint} can be reached")
