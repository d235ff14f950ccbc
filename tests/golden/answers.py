"""Ask services by plain messages, and hold their answers as JSON that can be compared years later.

An answer is one line: `{"rpc": "luthier.v1.DataService/GetDataset", "request": {...}, "response": {...}}`. Instead of
`response` it has `error` with code and reason where the call was refused, and `numEvents` where a Watch went on
after so many. A response shows every field that the code
of its day had: zeros as zeros, messages that are not set as null. Streams of events are lists without heartbeats,
streams of rows and bytes their number and sha256. The token of a page is not kept, only that there was one: a
request with the token `PAGE` asks for the page after the answer before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import operator
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import pyarrow.ipc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from luthier.v1 import data_service_pb2, evaluation_service_pb2, model_service_pb2, training_service_pb2

ANSWERS = "answers.jsonl.xz"
PAGE = "<of the page before>"
CALL_SECONDS = 30.0
SILENCE_SECONDS = 2.0
_FILES = {
    "data": (data_service_pb2,),
    "training": (training_service_pb2, model_service_pb2),
    "evaluation": (evaluation_service_pb2,),
}
Answer = dict[str, Any]


def rpcs() -> dict[str, tuple[str, MethodDescriptor]]:
    """Return the service process and the descriptor of every public rpc by its full name."""
    return {
        f"{service.full_name}/{method.name}": (process, method)
        for process, files in _FILES.items()
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


class Asker:
    """Calls the public rpcs of three services with one API key. Close it, or use it in a `with`."""

    def __init__(self, addresses: Mapping[str, str], api_key: str) -> None:
        self._channels = {name: grpc.insecure_channel(address) for name, address in addresses.items()}
        self._metadata = [("authorization", f"Bearer {api_key}")]
        self._rpcs = rpcs()
        self._next_token = ""

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        for channel in self._channels.values():
            channel.close()

    def has(self, rpc: str) -> bool:
        """Tell whether the code of this checkout knows an rpc."""
        return rpc in self._rpcs

    def send(self, rpc: str, request: Mapping[str, Any] | Sequence[Message]) -> Any:
        """Call an rpc and return what gRPC returns: a message, or an iterable of messages."""
        process, method = self._rpcs[rpc]
        kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        make = getattr(self._channels[process], kind)
        answer_type = message_factory.GetMessageClass(method.output_type)
        call = make(f"/{rpc}", operator.methodcaller("SerializeToString"), answer_type.FromString)
        if isinstance(request, Mapping):
            message = message_factory.GetMessageClass(method.input_type)()
            return call(
                json_format.ParseDict(dict(request), message), timeout=CALL_SECONDS, metadata=self._metadata
            )
        return call(iter(request), timeout=CALL_SECONDS, metadata=self._metadata)

    def ask(self, rpc: str, request: Mapping[str, Any], num_events: int | None = None) -> Answer:
        """Call an rpc that changes nothing, or that was called before, and return the answer.

        `num_events`: leave a Watch that goes on after so many; None: read it to its end.
        """
        sent = dict(request)
        answer: Answer = {"rpc": rpc, "request": dict(request)}
        if num_events is not None:
            answer["numEvents"] = num_events
        if sent.get("pageToken") == PAGE:
            if not self._next_token:
                return answer | {"error": {"code": "", "reason": "there is no next page"}}
            sent["pageToken"] = self._next_token
        self._next_token = ""
        try:
            answer["response"] = self._response(rpc, sent, num_events)
        except grpc.RpcError as error:
            answer["error"] = _refusal(error)
        return answer

    def count_events(self, rpc: str, name: str) -> int:
        """Return how many events a Watch that goes on brings before it falls silent."""
        stream, count = self.send(rpc, {"name": name}), 0
        silence = threading.Timer(SILENCE_SECONDS, stream.cancel)
        silence.start()
        with contextlib.suppress(grpc.RpcError):
            for _ in stream:
                count += 1
        return count

    def _response(self, rpc: str, request: Mapping[str, Any], num_events: int | None) -> Any:
        result = self.send(rpc, request)
        if isinstance(result, Message):
            return self._plain_page(result)
        name = rpc.partition("/")[2]
        if name.startswith("Watch"):
            return list(_events(result, num_events))
        return _rows_digest(result) if name.startswith("Read") else _bytes_digest(result)

    def _plain_page(self, message: Message) -> Any:
        plain_message = plain(message)
        if "nextPageToken" in plain_message:
            self._next_token = plain_message["nextPageToken"]
            plain_message["nextPageToken"] = bool(self._next_token)
        return plain_message


def plain(message: Message) -> Any:
    """Return a message as JSON values: zeros are there, and null for each message and optional value not set."""
    values = json_format.MessageToDict(message, always_print_fields_with_no_presence=True)
    _show_unset(message, values)
    return values


def _show_unset(message: Message, values: Any) -> None:
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            if field.containing_oneof is None or len(field.containing_oneof.fields) == 1:
                values[field.json_name] = None
            continue
        if field.message_type is None or field.message_type.full_name.startswith("google."):
            continue
        held, shown = getattr(message, field.name), values[field.json_name]
        if field.message_type.GetOptions().map_entry:
            is_of_messages = field.message_type.fields_by_name["value"].message_type is not None
            for key, one in held.items() if is_of_messages else ():
                _show_unset(one, shown[str(key)])
        elif field.is_repeated:
            for one, one_shown in zip(held, shown, strict=True):
                _show_unset(one, one_shown)
        else:
            _show_unset(held, shown)


def _events(stream: Any, num_events: int | None) -> Iterator[Any]:
    """Yield a Watch's events; heartbeats are none."""
    try:
        for event in islice((one for one in stream if not one.HasField("heartbeat")), num_events):
            yield plain(event)
    finally:
        stream.cancel()


# Columns that rows have beside those that they had when homes were recorded.
_LATER_COLUMNS = ("unit", "role")


def _rows_digest(stream: Any) -> Any:
    rows: list[Any] = []
    for chunk in stream:
        table = pyarrow.ipc.open_stream(chunk.ipc).read_all()
        rows += table.drop_columns(
            [name for name in _LATER_COLUMNS if name in table.column_names]
        ).to_pylist()
    text = "\n".join(json.dumps(row, sort_keys=True) for row in rows)
    return {"numRows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _bytes_digest(stream: Any) -> Any:
    data = b"".join(piece.data for piece in stream)
    return {"sizeBytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _refusal(error: Any) -> Any:
    """Return code and reason of a refusal; its message is for people and may change."""
    reason = ""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                reason = info.reason if detail.Unpack(info) else reason
    return {"code": error.code().name, "reason": reason}


def write_answers(folder: Path, answers: Sequence[Answer], home: Path) -> None:
    """Write answers; `{home}` stands for the home's path."""
    lines = "".join(json.dumps(answer, sort_keys=True, ensure_ascii=False) + "\n" for answer in answers)
    data = lines.replace(str(home), "{home}").encode()
    (folder / ANSWERS).write_bytes(lzma.compress(data, preset=lzma.PRESET_EXTREME))


def read_answers(folder: Path, home: Path) -> list[Answer]:
    """Read what `write_answers` wrote, for a home at another path."""
    text = lzma.decompress((folder / ANSWERS).read_bytes()).decode()
    return [json.loads(line) for line in text.replace("{home}", str(home)).splitlines()]
