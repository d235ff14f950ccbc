"""What a chat template leaves out of a row: text of turns and tool calls that the model then never sees."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.text.templates import TemplateError

Turns = Sequence[Mapping[str, Any]]
_GONE = "\0"
# Numbers that stand for others in a probe begin here: no template writes them by itself.
_FIRST_NUMBER = 7_305_090_000


def left_out(turns: Turns, text: str, render: Callable[[list[dict[str, Any]]], str]) -> dict[int, str]:
    """Return what is missing in a row's text, by the turn's index.

    White space does not count, nor do escapes of JSON and HTML. Two turns of the same text must stand there twice.
    Tool calls are looked for in a rendering of their own, with other names and values, as those of the record may
    stand elsewhere; `render` makes it.
    """
    found = dict.fromkeys(_missing_texts(turns, text), "its text")
    for index, what in _missing_calls(turns, text, render):
        found[index] = f"{found[index]} and {what}" if index in found else what
    return found


def _missing_texts(turns: Turns, text: str) -> Iterator[int]:
    contents = [str(turn.get("content") or "").strip() for turn in turns]
    left = _compact(text)
    # Longer ones first: a short text that only stands inside a longer one is missing.
    for index in sorted(range(len(contents)), key=lambda index: -len(contents[index])):
        shown = next((form for form in _forms(contents[index]) if form in left), None)
        if shown is None:
            yield index
        else:
            left = left.replace(shown, _GONE * len(shown), 1)


def _forms(stripped: str) -> Iterator[str]:
    yield _compact(stripped)
    yield _compact(json.dumps(stripped, ensure_ascii=False)[1:-1])
    yield _compact(json.dumps(stripped)[1:-1])
    yield _compact(html.escape(stripped, quote=False).replace('"', "&#34;").replace("'", "&#39;"))


def _compact(text: str) -> str:
    return "".join(text.split())


@dataclass(slots=True)
class _Probes:
    """Names and values that stand for others, and what each stands for: message index and a description."""

    meanings: dict[str, tuple[int, str]] = field(default_factory=dict)

    def name(self, index: int, name: str) -> str:
        return self._new(f"probe{len(self.meanings)}name", index, f"the name of its tool call {name!r}")

    def value(self, index: int, name: str, value: Any) -> Any:
        """Replace the texts and numbers of a value."""
        if isinstance(value, Mapping):
            return {key: self.value(index, name, inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(index, name, inner) for inner in value]
        what = f"an argument of its tool call {name!r}"
        if isinstance(value, str) and value:
            return self._new(f"probe{len(self.meanings)}text", index, what)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return int(self._new(str(_FIRST_NUMBER + len(self.meanings)), index, what))
        return value

    def _new(self, probe: str, index: int, what: str) -> str:
        self.meanings[probe] = (index, what)
        return probe


def _missing_calls(
    turns: Turns, text: str, render: Callable[[list[dict[str, Any]]], str]
) -> Iterator[tuple[int, str]]:
    if not any(turn.get("tool_calls") for turn in turns):
        return
    probes = _Probes()
    try:
        shown = render([_probed(index, turn, probes) for index, turn in enumerate(turns)])
    except (TemplateError, RecursionError):
        # It takes the record's own values only; then what can be seen is whether the names are there at all.
        for index, turn in enumerate(turns):
            gone = [name for name in map(_call_name, turn.get("tool_calls", ())) if name not in text]
            yield from ((index, f"the name of its tool call {name!r}") for name in gone[:1])
        return
    missing: dict[int, str] = {}
    for probe, (index, what) in probes.meanings.items():
        if probe not in shown:
            missing.setdefault(index, what)
    yield from missing.items()


def _probed(index: int, turn: Mapping[str, Any], probes: _Probes) -> dict[str, Any]:
    if not turn.get("tool_calls"):
        return dict(turn)
    return {**turn, "tool_calls": [_probed_call(index, call, probes) for call in turn["tool_calls"]]}


def _probed_call(index: int, call: Mapping[str, Any], probes: _Probes) -> Mapping[str, Any]:
    function = call.get("function")
    inner = function if isinstance(function, Mapping) else call
    name = _call_name(call)
    made = {**inner, "name": probes.name(index, name)} if name else dict(inner)
    if "arguments" in inner:
        made["arguments"] = probes.value(index, name, inner["arguments"])
    return {**call, "function": made} if inner is function else made


def _call_name(call: Mapping[str, Any]) -> str:
    function = call.get("function")
    name = (function if isinstance(function, Mapping) else call).get("name")
    return name if isinstance(name, str) else ""
