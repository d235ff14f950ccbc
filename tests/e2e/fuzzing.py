"""Requests that nobody would send on purpose, made from descriptors and a seed: the same seed, the same requests."""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

_MAX_DEPTH = 4
_INTEGERS = (0, 1, -1, 2, 7, 100, 2**31 - 1, -(2**31), 2**53, 2**63 - 1, -(2**63))
_NUMBERS = (
    0.0,
    -0.0,
    0.1,
    0.5,
    1.0,
    2.5,
    -1.0,
    1e-320,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
)
_TEXTS = (
    "",
    "a",
    "\x00",
    "a\x00b",
    "\x1b[31m",
    "\N{GRINNING FACE}" * 3,
    "\N{COMBINING ACUTE ACCENT}" * 50,
    "\ufffe\uffff\N{RIGHT-TO-LEFT OVERRIDE}",
    "x" * 300,
    "é" * 5000,
    "../../etc/passwd",
    "/dev/zero",
    "-" * 64,
    "%s%n{}{{7*7}}",
    "{% for a in range(9) %}{{ a }}{% endfor %}",
    "{{ messages[",
    "state = ",
    'labels.a = "b" AND',
    "create_time desc",
    "null",
    "9" * 40,
    "2026-02-30",
    "0" * 64,
)
_BYTES = (b"", b"\x00", b"\xff" * 20, b"{" * 1000, b"PAR1" + bytes(64))
_VALUES: dict[int, Sequence[Any]] = {
    FieldDescriptor.CPPTYPE_DOUBLE: _NUMBERS,
    FieldDescriptor.CPPTYPE_FLOAT: _NUMBERS,
    FieldDescriptor.CPPTYPE_BOOL: (True, False),
    FieldDescriptor.CPPTYPE_STRING: _BYTES,
    FieldDescriptor.CPPTYPE_INT64: _INTEGERS,
    FieldDescriptor.CPPTYPE_INT32: [value for value in _INTEGERS if -(2**31) <= value < 2**31],
    FieldDescriptor.CPPTYPE_UINT64: [value for value in _INTEGERS if value >= 0],
    FieldDescriptor.CPPTYPE_UINT32: [value for value in _INTEGERS if 0 <= value < 2**32],
}


_FAMILIES = (
    ("rollouts", "/fineTuningJobs/"),
    ("checkpoint", "/checkpoints/"),
    ("rendering", "/renderings/"),
    ("version", "/versions/"),
    ("dataset", "/datasets/"),
    ("upload", "/uploads/"),
    ("alias", "/modelAliases/"),
    ("evaluation", "/evaluations/"),
    ("prediction", "/evaluations/"),
    ("job", "/fineTuningJobs/"),
    ("startfrom", "/models/"),
    ("model", "/models/"),
    ("generate", "/models/"),
)
"""What names a family of resources in a field or its request, the first that fits."""


class Fuzzer:
    """Draws requests. `names` are resource names, some of which exist; `meant` are requests that mean something."""

    def __init__(self, seed: int, names: Sequence[str], meant: Sequence[Message] = ()) -> None:
        self.random = random.Random(seed)
        self._names = names
        self._meant: dict[str, list[Message]] = {}
        for message in meant:
            self._meant.setdefault(message.DESCRIPTOR.full_name, []).append(message)
        self._is_clean = False

    def raw(self) -> bytes:
        """Return bytes that are hardly a message."""
        return self.random.randbytes(self.random.choice((1, 2, 5, 17, 60, 300)))

    def request(self, kind: type[Message]) -> bytes:
        """Return the bytes of a message: well-formed, seldom meaningful, now and then damaged.

        Most are clean: nothing in them is refused for itself, so that they come to those who ask what it means.
        """
        self._is_clean = self.random.random() < 0.7
        message = kind()
        meant = self._meant.get(message.DESCRIPTOR.full_name)
        if meant and self.random.random() < 0.6:
            message.CopyFrom(self.random.choice(meant))
            self._change(message)
        else:
            self._fill(message, 0)
        data = bytearray(message.SerializeToString())
        if data and not self._is_clean and self.random.random() < 0.3:
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        return bytes(data)

    def metadata(self) -> list[tuple[str, str | bytes]]:
        """Return metadata beside the credential, most often none."""
        choice = self.random.choice
        odd: tuple[Callable[[], tuple[str, str | bytes]], ...] = (
            lambda: ("x-request-id", choice(("", "a b", "~" * 200, "%0A", "ok-1"))),
            lambda: ("x-request-id-bin", self.raw()),
            lambda: (
                "authorization",
                choice(("", "Bearer", "Bearer ", "bearer lt_", "Basic x", "\x7e" * 500)),
            ),
            lambda: ("authorization-bin", self.raw()),
            lambda: ("grpc-trace-bin", self.raw()),
            lambda: ("grpc-tags-bin", self.raw()),
            lambda: (choice(("content-type", "te", "grpc-encoding", "grpc-accept-encoding")), "zzz"),
            lambda: (choice(("host", "cookie", "content-length", "connection", "grpc-status")), "7"),
            lambda: ("traceparent", choice(("00", "zz" * 30))),
            lambda: ("x-" + "k" * 60, "v" * 1000),
        )
        return [choice(odd)() for _ in range(choice((0, 0, 0, 1, 2)))]

    def _change(self, message: Message) -> None:
        """Change a few fields of a request that means something, at whatever depth, and leave the others."""
        for _ in range(self.random.choice((0, 1, 1, 2))):
            inner, field = self.random.choice(
                _set_fields(message) or [(message, message.DESCRIPTOR.fields[0])]
            )
            if self.random.random() < 0.3:
                every: list[Any] = list(inner.DESCRIPTOR.fields)
                field = self.random.choice(every)
            if self.random.random() < 0.9 or field.name not in ("name", "parent"):
                inner.ClearField(field.name)
                self._set(inner, field, _MAX_DEPTH - 1)
        if "request_id" in message.DESCRIPTOR.fields_by_name:
            self._set(message, message.DESCRIPTOR.fields_by_name["request_id"], 0)

    def _fill(self, message: Message, depth: int) -> None:
        for field in message.DESCRIPTOR.fields:
            is_name = field.name in ("name", "parent")
            if self.random.random() > (0.9 if is_name else 0.45):
                continue
            self._set(message, field, depth)

    def _set(self, message: Message, field: Any, depth: int) -> None:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            self._fill_map(message, field, depth)
        elif field.is_repeated:
            self._fill_list(message, field, depth)
        elif field.message_type is not None:
            getattr(message, field.name).SetInParent()
            if depth < _MAX_DEPTH:
                self._fill(getattr(message, field.name), depth + 1)
        else:
            setattr(message, field.name, self._scalar(field))

    def _fill_map(self, message: Message, field: Any, depth: int) -> None:
        entry = field.message_type.fields_by_name
        for _ in range(self.random.choice((1, 1, 3))):
            key = self._scalar(entry["key"])
            if entry["value"].message_type is None:
                getattr(message, field.name)[key] = self._scalar(entry["value"])
            elif depth < _MAX_DEPTH:
                self._fill(getattr(message, field.name)[key], depth + 1)

    def _fill_list(self, message: Message, field: Any, depth: int) -> None:
        values: Any = getattr(message, field.name)
        for _ in range(self.random.choice((1, 1, 2, 4))):
            if field.message_type is None:
                values.append(self._scalar(field))
            elif depth < _MAX_DEPTH:
                item = GetMessageClass(field.message_type)()
                self._fill(item, depth + 1)
                values.append(item)

    def _scalar(self, field: Any) -> Any:
        if field.type == FieldDescriptor.TYPE_STRING:
            return self._text(field)
        if field.enum_type is not None:
            known = tuple(field.enum_type.values_by_number)
            return self.random.choice(known if self._is_clean else (*known, 9999, -1))
        value = self.random.choice(_VALUES[field.cpp_type])
        return 0.5 if self._is_clean and isinstance(value, float) and not math.isfinite(value) else value

    def _text(self, field: Any) -> str:
        if field.name == "request_id" and self.random.random() < 0.9:
            return str(uuid.UUID(int=self.random.getrandbits(128)))
        if field.name == "parent" and self.random.random() < 0.6:
            return self._names[0]
        if self.random.random() < (0.85 if field.name in ("name", "parent") else 0.3):
            return self.random.choice(self._suiting(field) or self._names)
        return self.random.choice(_TEXTS)

    def _suiting(self, field: Any) -> list[str]:
        """Return, most often, the names of what a field is to name: by its own word or by that of its request."""
        if self.random.random() < 0.3:
            return []
        word = f"{field.name} {field.containing_type.name}".lower().replace("_", "")
        family = next((family for sign, family in _FAMILIES if sign in word), None)
        return [] if family is None else [name for name in self._names if family in name]


def _set_fields(message: Message) -> list[tuple[Message, FieldDescriptor]]:
    """Return the fields that are set, with what has them, at every depth."""
    found: list[tuple[Message, FieldDescriptor]] = []
    for field, value in message.ListFields():
        found.append((message, field))
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for inner in value if field.is_repeated else [value]:
            found += _set_fields(inner)
    return found
