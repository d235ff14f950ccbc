"""Sync and async clients of the Luthier services.

    from luthier.client import Client

    with Client() as client:
        upload = client.datasets.upload("examples.jsonl")
        version = client.datasets.create_version("my-data", [upload])

`Client` talks over `grpc`, `AsyncClient` over `grpc.aio`; both have the same resources and methods and return
the protobuf messages of `luthier.v1`. Errors are those of `luthier.errors`. The names below are imported when
first used, so that the command line can answer `--help` without loading gRPC.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luthier.client.clients import AsyncClient, Client
    from luthier.client.config import ClientConfig, ConfigArguments, read_config
    from luthier.client.failures import (
        EvaluationFailed,
        JobFailed,
        ModelFailed,
        RenderingFailed,
        ResourceFailed,
        VersionFailed,
    )
    from luthier.client.message_files import read_message
    from luthier.client.retry import RetryPolicy
    from luthier.client.transfers import TransferProgress

_HOME_OF = {
    "AsyncClient": "clients",
    "Client": "clients",
    "ClientConfig": "config",
    "ConfigArguments": "config",
    "EvaluationFailed": "failures",
    "JobFailed": "failures",
    "ModelFailed": "failures",
    "RenderingFailed": "failures",
    "ResourceFailed": "failures",
    "RetryPolicy": "retry",
    "TransferProgress": "transfers",
    "VersionFailed": "failures",
    "read_config": "config",
    "read_message": "message_files",
}

__all__ = [
    "AsyncClient",
    "Client",
    "ClientConfig",
    "ConfigArguments",
    "EvaluationFailed",
    "JobFailed",
    "ModelFailed",
    "RenderingFailed",
    "ResourceFailed",
    "RetryPolicy",
    "TransferProgress",
    "VersionFailed",
    "read_config",
    "read_message",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"luthier.client.{_HOME_OF[name]}"), name)
