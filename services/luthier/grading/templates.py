"""Templates of graders: `{{item.a.b[0]}}`, `{{sample.output_text}}` and `{{sample.output_json.x}}` in a text.

Names and meaning are OpenAI's; `[-1]`, the last of a list, is ours. There is nothing else in them: no code, no filters.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from luthier.errors import Reason
from luthier.grading.outcomes import GradingError, Sample, shown

MAX_TEXT_CHARACTERS = 1 << 16
"""Of a template filled in: what is compared with what."""
MAX_PLACES = 64
MAX_STEPS = 16
_STEP = re.compile(r"\.([^.\[\]{}\s]++)|\[(-?[0-9]{1,6})\]")
_NAMESPACE = re.compile(r"item|sample")
_SHOWN_NAMES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One `{{...}}`: what is written there, `item` or `sample`, and the names and positions behind it."""

    written: str
    namespace: str
    steps: tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A text with places. `field` is what errors call it: `input`, `reference`."""

    field: str
    parts: tuple[str | Place, ...]

    @property
    def reads_sample(self) -> bool:
        """Whether anything of the answer is in it."""
        return any(isinstance(part, Place) and part.namespace == "sample" for part in self.parts)

    def filled(self, sample: Sample) -> str:
        """Return the text for a sample.

        Raises:
            GradingError: TEMPLATE_FIELD_MISSING, a place names what is not there; GRADER_INPUT_INVALID, the text would
                be too long or is no Unicode text.
        """
        texts: list[str] = []
        left = MAX_TEXT_CHARACTERS
        for part in self.parts:
            texts.append(part if isinstance(part, str) else _text(self._value(part, sample)))
            left -= len(texts[-1])
            if left < 0:
                raise GradingError(
                    Reason.GRADER_INPUT_INVALID,
                    f"{self.field} must have at most {MAX_TEXT_CHARACTERS} characters, it has more",
                )
        text = "".join(texts)
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise GradingError(
                Reason.GRADER_INPUT_INVALID, f"{self.field} holds half a character (a surrogate)"
            )
        return text

    def _value(self, place: Place, sample: Sample) -> Any:
        steps = place.steps
        if place.namespace == "item":
            value: Any = sample.item
            known = "item"
        elif steps[0] == "output_text":
            value, steps, known = sample.output_text, steps[1:], "sample.output_text"
        else:
            value, steps, known = sample.output_json, steps[1:], "sample.output_json"
        for step in steps:
            value = self._below(value, step, place, known)
            known += f"[{step}]" if isinstance(step, int) else f".{step}"
        return value

    def _below(self, value: Any, step: str | int, place: Place, known: str) -> Any:
        if isinstance(value, dict) and isinstance(step, str) and step in value:
            return value[step]
        if isinstance(value, list) and isinstance(step, int) and -len(value) <= step < len(value):
            return value[step]
        if isinstance(value, dict):
            names = ", ".join(shown(name, 40) for name in list(value)[:_SHOWN_NAMES])
            has = f"which has {names or 'no field'}" + (", …" if len(value) > _SHOWN_NAMES else "")
        elif isinstance(value, list):
            has = f"which is a list of {len(value)}"
        else:
            has = f"which is {_text(value)[:40]!r}"
        wanted = f"[{step}]" if isinstance(step, int) else f"field {step!r}"
        raise GradingError(
            Reason.TEMPLATE_FIELD_MISSING,
            f"{self.field} names {{{{{place.written}}}}}, but there is no {wanted} in {known}, {has}",
        )


def parsed(text: str, field: str) -> Template:
    """Return the template that a text is; `field` is what errors call it.

    Raises:
        ValueError: it is none; the message says where and what would be right.
    """
    parts: list[str | Place] = []
    end = 0
    num_places = 0
    while (start := text.find("{{", end)) >= 0:
        close = text.find("}}", start)
        if close < 0:
            raise ValueError(f"{{{{ at character {start} must be closed by }}}}")
        parts += [text[end:start]] if start > end else []
        parts.append(_place(text[start + 2 : close].strip()))
        end = close + 2
        num_places += 1
        if num_places > MAX_PLACES:
            raise ValueError(f"must hold at most {MAX_PLACES} {{{{...}}}}, it has more")
    parts += [text[end:]] if end < len(text) else []
    return Template(field=field, parts=tuple(parts))


def _place(written: str) -> Place:
    said = shown(f"{{{{{written}}}}}", 60)
    namespace = _NAMESPACE.match(written)
    steps, end = _steps(written, namespace.end()) if namespace else ((), 0)
    if namespace is None or end != len(written) or not written.isprintable():
        raise ValueError(
            "must name item or sample and what lies in it, {{item.NAME}}, {{item.a.b[0]}} or "
            f"{{{{sample.output_text}}}}, got {said}"
        )
    if len(steps) > MAX_STEPS:
        raise ValueError(f"must lead at most {MAX_STEPS} steps deep, got {said}")
    is_known = namespace[0] == "item" or (bool(steps) and steps[0] in ("output_text", "output_json"))
    if not is_known or (namespace[0] == "sample" and steps[0] == "output_text" and len(steps) > 1):
        raise ValueError(f"sample has output_text, which is text, and output_json, got {said}")
    return Place(written=written, namespace=namespace[0], steps=steps)


def _steps(written: str, start: int) -> tuple[tuple[str | int, ...], int]:
    steps: list[str | int] = []
    while (step := _STEP.match(written, start)) is not None:
        steps.append(step[1] if step[1] is not None else int(step[2]))
        start = step.end()
    return tuple(steps), start


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError as error:
        message = "what a template puts in must not be nested so deep"
        raise GradingError(Reason.GRADER_INPUT_INVALID, message) from error
