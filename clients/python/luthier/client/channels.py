"""Channels to the three services, and the stubs on them."""

from __future__ import annotations

import ipaddress
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio

from luthier.client.config import ClientConfig
from luthier.errors import InvalidArgument
from luthier.v1.data_service_pb2_grpc import DataServiceStub
from luthier.v1.evaluation_service_pb2_grpc import EvaluationServiceStub
from luthier.v1.model_service_pb2_grpc import ModelServiceStub
from luthier.v1.training_service_pb2_grpc import TrainingServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    C = TypeVar("C", grpc.Channel, grpc.aio.Channel)

_SECURE = "https://"
_LAST_PORT = 65535
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_OPTIONS: Sequence[tuple[str, int | str]] = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.primary_user_agent", f"luthier-python/{platform.python_version()}"),
    # Retries are made here, with a request id and under one deadline; a second layer would multiply them.
    ("grpc.enable_retries", 0),
    # A watch may be quiet for 15 s; a peer that vanished without a word is found out after 40 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A restarted service must be found again within the retry deadline; the default grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stubs:
    """The generated stubs of one client. On `grpc.aio` channels the same classes answer with awaitables."""

    data: DataServiceStub
    models: ModelServiceStub
    training: TrainingServiceStub
    evaluation: EvaluationServiceStub


@dataclass(frozen=True, slots=True)
class Connection:
    """The stubs, the channels that they use, and the credentials sent with each call."""

    stubs: Stubs
    channels: tuple[grpc.Channel, ...] | tuple[grpc.aio.Channel, ...]
    metadata: tuple[tuple[str, str], ...]


def connect(config: ClientConfig) -> Connection:
    """Return a connection over `grpc`. Nothing is sent before the first call.

    Raises:
        InvalidArgument: An address is neither loopback nor https.
    """
    return _connection(config, grpc.insecure_channel, grpc.secure_channel)


def connect_async(config: ClientConfig) -> Connection:
    """Return a connection over `grpc.aio`, bound to the running event loop; raises as `connect`."""
    return _connection(config, grpc.aio.insecure_channel, grpc.aio.secure_channel)


def open_channel(address: str) -> grpc.Channel:
    """Return a channel over `grpc` to one service. Raises as `connect`."""
    return _opened(address, grpc.insecure_channel, grpc.secure_channel)


def _opened(address: str, insecure: Callable[..., C], secure: Callable[..., C]) -> C:
    if _is_secure(address):
        target = address.removeprefix(_SECURE).removesuffix("/")
        return secure(target, grpc.ssl_channel_credentials(), options=_OPTIONS)
    if not address.startswith("unix:") and not _is_loopback(address):
        raise InvalidArgument(
            f"address must be host:port on loopback, unix:/path or https://host:port, got {address!r}:"
            " the API key would travel in the clear, or where nobody meant it to",
            metadata={"address": address},
        )
    return insecure(address, options=_OPTIONS)


def _connection(config: ClientConfig, insecure: Callable[..., C], secure: Callable[..., C]) -> Connection:
    data = _opened(config.data_address, insecure, secure)
    training = _opened(config.training_address, insecure, secure)
    evaluation = _opened(config.evaluation_address, insecure, secure)
    stubs = Stubs(
        data=DataServiceStub(data),
        models=ModelServiceStub(training),
        training=TrainingServiceStub(training),
        evaluation=EvaluationServiceStub(evaluation),
    )
    return Connection(stubs, (data, training, evaluation), (("authorization", f"Bearer {config.api_key}"),))


def _is_secure(address: str) -> bool:
    """Tell whether it is https://host:port: no user, path or query, in which another host could hide."""
    target = address.removeprefix(_SECURE).removesuffix("/")
    return address.startswith(_SECURE) and target != "" and not set(target) & set("@/?#\\ ")


def _is_loopback(address: str) -> bool:
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) <= _LAST_PORT):
        return False
    if host.lower() in {"localhost", "[::1]"}:
        return True
    try:
        return ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False
