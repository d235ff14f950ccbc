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
    """Seven rows take some 0.45 s of CPU time each, where a request that sends no note is ended after two at most."""
    started = process_time()
    ChatTemplate(slow(20), date(2026, 11, 23)).render([{"role": "user", "content": "q"}])
    template = slow(round(0.45 * 20 / (process_time() - started)))
    records = replace(ordered({"prompt": "p", "completion": "c"}).records, split_turns=True)
    records = replace(records, chat_template=template)
    with closing(LimitedRenderer(records, LIMITS, tmp_path, lambda: None)) as renderer:
        rendered = renderer.render(conversation(7))
    assert len(rendered.rows) == 7
    assert not rendered.refused


@pytest.mark.parametrize(
    ("record", "changes", "spent"),
    [
        # Each row asks for one more turn; who is asked for the last one pays for all.
        (conversation(3), {"split_turns": True}, [1.0, 2.0, 3.0, 0.0, 0.0, 0.0]),
        (conversation(3), {}, [3.0, 0.0]),
        (json.dumps({"prompt": "p", "completion": "c"}), {}, [0.0]),
        (conversation(1), {"kind": "PROMPT"}, [0.0, 0.0]),
        # What asks for both answers is the same text.
        (
            json.dumps(
                {
                    "messages": [{"role": "user", "content": "x"}],
                    "chosen": [{"role": "assistant", "content": "a"}],
                    "rejected": [{"role": "assistant", "content": "b"}],
                }
            ),
            {"kind": "PREFERENCE"},
            [1.0, 0.0, 1.0, 0.0],
        ),
    ],
    ids=["split turns", "one row", "plain", "prompt", "pair"],
)
def test_a_note_says_what_rows_share_with_those_before_them(
    record: str,
    changes: Mapping[str, Any],
    spent: list[float],
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
    assert told == [0.0]  # the tokenizer is read
    told.clear()
    clock, asking = [0.0], spans.Writer._asking

    def in_a_second(writer: spans.Writer, *arguments: Any, **options: Any) -> str | None:
        clock[0] += 1
        return asking(writer, *arguments, **options)

    monkeypatch.setattr(spans.Writer, "_asking", in_a_second)
    monkeypatch.setattr(spans, "process_time", lambda: clock[0])
    assert not rendering.handle({"record": record, "other": ""}, note)["refused"]
    assert told == spent


def test_renderings_and_prompts_have_the_same_limits(
    ordered: Ordered, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Limits] = []
    monkeypatch.setattr(child, "rendered", lambda order, desk, limits: given.append(limits))
    no_line: Any = None
    child.work(no_line, ordered({"prompt": "p", "completion": "c"}))
    with closing(TextPool()) as pool:
        assert given == [TEXT_LIMITS] == [pool._pool._limits]
