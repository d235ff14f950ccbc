"""Chat templates: Jinja in a sandbox, with the globals and filters that transformers gives them.

Templates come from users and model authors. The sandbox keeps them from the interpreter's insides; it does not bound
their time or memory: render untrusted ones in a process with limits.
"""

from __future__ import annotations

import calendar
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime

from luthier.text.sandbox import Sandbox, Unwritten

_FILENAME = "<template>"  # what jinja2 calls a template made of a string, in code and tracebacks
_MARK = "_generation_mark"
_MAX_PROBLEM = 500


class TemplateError(ValueError):
    """A template that cannot be compiled or rendered; the message has its line where it is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedText:
    """Rendered text and the character ranges [start, end) that `generation` blocks produced."""

    text: str
    generated: tuple[tuple[int, int], ...] = ()


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what an assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Wrap the block's output in marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        opening, closing = _marks(context[_MARK])
        return f"{opening}{caller()}{closing}"


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja source.
        today: the date that `strftime_now` shows; frozen, so that a rendering can be repeated.

    `dated_source` is the source with the dates that it asks for written in, so that it renders the same on any day,
    elsewhere too. It is the source as it is where that asks for no date, or for one in a computed format.

    Raises:
        TemplateError: the source does not compile.
    """

    def __init__(self, source: str, today: date) -> None:
        environment = Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = Unwritten(_raise_exception)
        environment.globals["strftime_now"] = Unwritten(_strftime(today))
        self.source = source
        with _as_template_errors():
            self._template = environment.from_string(source)
            tree = environment.parse(source)
            self.dated_source = _dated(source, tree, _strftime(today))
            _require_no_self(tree)
        self.has_generation_blocks = any(
            isinstance(node.call, jinja2.nodes.Call)
            and isinstance(node.call.node, jinja2.nodes.ExtensionAttribute)
            and node.call.node.name == "_mark"
            for node in tree.find_all(jinja2.nodes.CallBlock)
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
        special_tokens: Mapping[str, str] | None = None,
    ) -> RenderedText:
        """Render a conversation.

        Args:
            messages: turns as JSON values.
            tools: tool definitions as JSON values; none is the same as not given.
            add_generation_prompt: end with what comes before an assistant's answer.
            special_tokens: texts that templates use by name, e.g. bos_token.

        Raises:
            TemplateError: the template refuses the conversation, fails, or writes what is no text.
        """
        with _as_template_errors():
            mark = _digest(messages, tools) if self.has_generation_blocks else ""
            text = self._template.render(
                messages=[dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**(special_tokens or {}), _MARK: mark},
            )
        rendered = _without_marks(text, mark) if self.has_generation_blocks else RenderedText(text=text)
        _require_text(rendered.text)
        return rendered


def _digest(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([list(messages), list(tools)]).encode()).hexdigest()


def _marks(mark: str) -> tuple[str, str]:
    """Return what stands around the text of a `generation` block until it is taken out again.

    `mark` is a digest of the conversation: a record that could write it would choose what is learnt.
    """
    return f"\ue000{mark}\ue001", f"\ue001{mark}\ue000"


def _require_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TemplateError(
            f"the chat template fails: it writes the lone surrogate {text[error.start]!a} at character "
            f"{error.start}, which is no text; write the whole character"
        ) from error


def _dated(source: str, tree: jinja2.nodes.Template, strftime_now: Callable[[str], str]) -> str:
    """Put a macro before the source that knows the date in each format that the source asks for."""
    calls = [call for call in tree.find_all(jinja2.nodes.Call) if _names_the_date(call.node)]
    given = [call.args[0] for call in calls if len(call.args) == 1]
    known = [one.value for one in given if isinstance(one, jinja2.nodes.Const) and isinstance(one.value, str)]
    formats = sorted(set(known))
    computed = len(known) < len(calls)
    if not formats or computed:
        return source
    dates = "".join(
        f"{{%- if format == {json.dumps(one)} -%}}{{{{ {json.dumps(strftime_now(one))} }}}}{{%- endif -%}}"
        for one in formats
    )
    # The plus keeps a line break at the source's beginning.
    return f"{{%- macro strftime_now(format) -%}}{dates}{{%- endmacro +%}}{source}"


def _names_the_date(node: jinja2.nodes.Expr) -> bool:
    return isinstance(node, jinja2.nodes.Name) and node.name == "strftime_now"


def _without_marks(marked: str, name: str) -> RenderedText:
    opening, closing = _marks(name)
    parts: list[str] = []
    ranges: list[tuple[int, int]] = []
    length, started = 0, -1
    rest = marked
    while rest:
        mark = closing if started >= 0 else opening
        before, found, rest = rest.partition(mark)
        parts.append(before)
        length += len(before)
        if found and started >= 0:
            ranges.append((started, length))
            started = -1
        elif found:
            started = length
    text = "".join(parts)
    if started >= 0 or name in text.lower():
        raise TemplateError(
            "the chat template fails: a generation block must lie in no other one, and its text be written as it is, "
            "by no filter that changes it: what is learnt would not be known"
        )
    return RenderedText(text=text, generated=tuple(ranges))


@contextmanager
def _as_template_errors() -> Iterator[None]:
    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template does not compile: {_shown(error.message)} (line {error.lineno})"
        ) from error
    except jinja2.TemplateError as error:
        raise _failure(error, error.message or type(error).__name__) from error
    except MemoryError:
        raise  # the limit of the process that renders: its owner says so
    except Exception as error:  # whatever Python raises in a template's code is the template's
        raise _failure(error, f"{type(error).__name__}: {_shown(error)}") from error


def _require_no_self(tree: jinja2.nodes.Template) -> None:
    """Refuse what gives a template its own blocks, as objects that formats write by their addresses."""
    for name in tree.find_all(jinja2.nodes.Name):
        if name.name == "self" and name.ctx == "load":
            raise jinja2.TemplateSyntaxError("self is not there, write a macro", name.lineno)


def _failure(error: Exception, problem: str) -> TemplateError:
    """Name the innermost line of the template; jinja2 writes template lines into the traceback."""
    line, frame = None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == _FILENAME:
            line = frame.tb_lineno
        frame = frame.tb_next
    place = "" if line is None else f" (line {line})"
    return TemplateError(f"the chat template fails: {_shown(problem)}{place}")


def _shown(problem: object) -> str:
    """Return a problem as text that can be sent: templates may raise what has no text, and as much as they like."""
    try:
        text = str(problem)
    except jinja2.TemplateError as error:
        text = error.message or ""
    return text.encode("utf-8", "backslashreplace").decode()[:_MAX_PROBLEM]


def _strftime(today: date) -> Callable[[str], str]:
    now = datetime(today.year, today.month, today.day)
    seconds = str(calendar.timegm(now.timetuple()))

    def strftime_now(shape: str) -> str:
        # Of all directives %s alone reads the machine's time zone.
        return now.strftime(re.sub("%%|%s", lambda found: {"%s": seconds}.get(found[0], found[0]), shape))

    return strftime_now


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)
