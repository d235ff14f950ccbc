"""What a record may take is what asking for each of its rows may take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from datetime import date
from pathlib import Path
from time import process_time
from typing import Any

import msgspec
import pytest
from tests.data.worker.conftest import Ordered

from luthier.data.worker import child, render_child
from luthier.data.worker.limited_renderer import LimitedRenderer
from luthier.text import spans
from luthier.text.templates import ChatTemplate
from luthier.work.limited_child import Limits
from luthier.work.text_pool import TEXT_LIMITS, TextPool

LIMITS = Limits(cpu_seconds=1)
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def slow(times: int) -> str:
    """A template that takes its time over each whole conversation."""
    loops = f"{{% for i in range(99999) %}}{{% for j in range({times}) %}}{{% endfor %}}{{% endfor %}}"
    return f"{TURNS}{ASKS}{{% if not add_generation_prompt %}}{loops}{{% endif %}}"


def conversation(num_answers: int) -> str:
    turns = [{"role": role, "content": "x"} for _ in range(num_answers) for role in ("user", "assistant")]
    return json.dumps({"messages": turns})


def test_each_row_of_a_record_may_take_what_a_prompt_may(ordered: Ordered, tmp_path: Path) -> None:
    """Nine rows take some 0.35 s of CPU time each, where a request that sends no note is ended after two at most."""
    started = process_time()
    ChatTemplate(slow(20), date(2026, 11, 23)).render([{"role": "user", "content": "q"}])
    template = slow(round(0.35 * 20 / (process_time() - started)))
    records = replace(ordered({"prompt": "p", "completion": "c"}).records, split_turns=True)
    records = replace(records, chat_template=template)
    with closing(LimitedRenderer(records, LIMITS, tmp_path, lambda: None)) as renderer:
        rendered = renderer.render(conversation(9))
    assert len(rendered.rows) == 9
    assert not rendered.refused


CHOSEN = [{"role": role, "content": "a"} for role in ("assistant", "user", "assistant")]
PAIR = {
    "messages": [{"role": "user", "content": "x"}],
    "chosen": CHOSEN,
    "rejected": [{"role": "assistant", "content": "b"}],
}


@pytest.mark.parametrize(
    ("record", "changes", "spent"),
    [
        # The whole; what asks; each answer; then the tokens, which asking takes as well; what is left out.
        (conversation(3), {}, [[0, 0, 0, 0, 3, 0], [0]]),
        # Each row asks for one more turn; who is asked for the last one pays for all.
        (conversation(3), {"split_turns": True}, [[0, 0, 1, 0], [1, 0, 2, 0], [2, 0, 3, 0], [0, 0, 0]]),
        (json.dumps({"prompt": "p", "completion": "c"}), {}, [[0]]),
        (conversation(1), {"kind": "PROMPT"}, [[0], [0]]),
        # The rejected side is asked for as the first turn of the chosen one is.
        (json.dumps(PAIR), {"kind": "PREFERENCE"}, [[0, 0, 0, 2, 0], [0], [1, 0, 1, 0], [0]]),
    ],
    ids=["one row", "split turns", "plain", "prompt", "pair"],
)
def test_a_note_says_what_is_spent_of_what_asking_takes(
    record: str,
    changes: Mapping[str, Any],
    spent: list[list[float]],
    ordered: Ordered,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = replace(ordered({"prompt": "p", "completion": "c"}).records, **changes)
    rendering = render_child._Child()
    told: list[float] = []

    def note(message: Mapping[str, Any], spent_seconds: float = 0.0) -> None:
        told.append(spent_seconds)

    monkeypatch.setattr(render_child, "_NOTE_SECONDS", 0.0)
    rendering.handle(msgspec.to_builtins(records), note)
    assert told[0] == 0.0  # the tokenizer is read
    told.clear()
    # As if each text that asks took a second.
    clock, asking = [0.0], spans.Writer._asking

    def in_a_second(writer: spans.Writer, *arguments: Any, **options: Any) -> str | None:
        clock[0] += 1
        return asking(writer, *arguments, **options)

    monkeypatch.setattr(spans.Writer, "_asking", in_a_second)
    monkeypatch.setattr(spans, "process_time", lambda: clock[0])
    assert not rendering.handle({"record": record, "other": ""}, note)["refused"]
    assert told == [one for part in spent for one in part]


def test_notes_go_out_where_they_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [10.0]
    monkeypatch.setattr(render_child, "process_time", lambda: clock[0])
    rendering, told = render_child._Child(), []

    def note(message: Mapping[str, Any], spent_seconds: float = 0.0) -> None:
        told.append((clock[0], spent_seconds))

    rendering._noted_at = 10.0
    for now, spent_seconds in ((10.1, 0.0), (10.2, 0.2), (10.3, 0.1), (10.4, 3.0), (10.5, 3.1), (10.6, 0.0)):
        clock[0] = now
        rendering._between(note, spent_seconds)
    # A quarter of a second passed; much more is spent, or again much less.
    assert told == [(10.3, 0.1), (10.4, 3.0), (10.6, 0.0)]


def test_renderings_and_prompts_have_the_same_limits(
    ordered: Ordered, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Limits] = []
    monkeypatch.setattr(child, "rendered", lambda order, desk, limits: given.append(limits))
    no_line: Any = None
    child.work(no_line, ordered({"prompt": "p", "completion": "c"}))
    with closing(TextPool()) as pool:
        assert given == [TEXT_LIMITS] == [pool._pool._limits]
