"""Failures between plain values and the wire."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from luthier.errors.failure import Failure

M = TypeVar("M", bound=Message)


def failure_to_status(failure: Failure) -> status_pb2.Status:
    """Write a failure as google.rpc.Status with one ErrorInfo, and RetryInfo where it says when to come back."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=failure.reason, domain="luthier", metadata=dict(failure.metadata))
    ]
    if failure.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(failure.retry_after_seconds * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code_pb2.Code.Value(failure.code), message=failure.message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def status_to_failure(status: status_pb2.Status) -> Failure:
    """Read a failure from google.rpc.Status.

    One without a readable ErrorInfo gets the reason INTERNAL, one whose code is none of gRPC's is UNKNOWN.
    """
    info = error_details_pb2.ErrorInfo(reason="INTERNAL")
    retry_after_seconds = None
    for detail in status.details:
        told = _unpacked(detail, error_details_pb2.ErrorInfo())
        if told is not None:
            info = told
        retry = _unpacked(detail, error_details_pb2.RetryInfo())
        if retry is not None:
            retry_after_seconds = max(0.0, retry.retry_delay.ToNanoseconds() / 1e9)
    known = status.code in code_pb2.Code.values()
    return Failure(
        code=code_pb2.Code.Name(status.code) if known else "UNKNOWN",
        reason=info.reason,
        message=status.message,
        metadata=dict(info.metadata),
        retry_after_seconds=retry_after_seconds,
    )


def _unpacked(detail: any_pb2.Any, message: M) -> M | None:
    """Read a detail of the kind of `message`; None for another kind, and for bytes that are none."""
    try:
        return message if detail.Unpack(message) else None
    except DecodeError:
        return None
