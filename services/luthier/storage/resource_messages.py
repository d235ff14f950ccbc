"""What the messages of resources have in common, for the code that is written once for all of them.

A protocol cannot be a `google.protobuf.message.Message` too, so the methods of one that are used stand here again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.status_pb2 import Status


class ResourceMessage(Protocol):
    """The message of a resource of any family."""

    DESCRIPTOR: Descriptor
    name: str
    uid: str
    etag: str

    @property
    def create_time(self) -> Timestamp:
        """When it was created."""

    @property
    def update_time(self) -> Timestamp:
        """When it last changed."""

    @property
    def delete_time(self) -> Timestamp:
        """When it was deleted."""

    def CopyFrom(self, other_msg: Self) -> None:
        """As a message's."""

    def ClearField(self, field_name: Any) -> None:
        """As a message's."""

    def ListFields(self) -> Sequence[tuple[FieldDescriptor, Any]]:
        """As a message's."""

    def SerializeToString(self, *, deterministic: bool = ...) -> bytes:
        """As a message's."""

    @classmethod
    def FromString(cls, s: bytes) -> Self:
        """As a message's."""


class StatefulMessage(ResourceMessage, Protocol):
    """The message of a resource that workers work for."""

    state: Any
    """An enum of the message's own."""

    @property
    def error(self) -> Status:
        """Why it FAILED."""

    @property
    def waiting(self) -> Status:
        """Why nobody can work for it."""

    def HasField(self, field_name: Any) -> bool:
        """As a message's."""
