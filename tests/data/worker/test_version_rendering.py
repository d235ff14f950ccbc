from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from tests.data.worker.conftest import Ordered
from tokenizers import Tokenizer

from luthier.data.worker.record_rendering import RecordRenderer
from luthier.data.worker.version_rendering import RenderedVersion, RenderOrder, render_version
from luthier.errors import InvalidArgument, Reason
from luthier.v1.dataset_pb2 import SPLIT_TEST
from luthier.v1.rendering_pb2 import RenderingFinding, TemplateErrorPolicy


def chat(question: str, answer: str, weight: float | None = None) -> dict[str, Any]:
    answered: dict[str, Any] = {"role": "assistant", "content": answer}
    if weight is not None:
        answered["weight"] = weight
    return {"messages": [{"role": "user", "content": question}, answered]}


def render(order: RenderOrder) -> RenderedVersion:
    """Render, and raise why it fails, as the task does."""
    rendered = attempt(order)
    if rendered.failure is not None:
        raise rendered.failure.to_error()
    return rendered


def attempt(order: RenderOrder) -> RenderedVersion:
    return render_version(order, RecordRenderer(order.records), lambda done, first: None)


def rows(rendered: RenderedVersion) -> list[dict[str, Any]]:
    return [row for shard in rendered.shards for row in pyarrow.parquet.read_table(shard.path).to_pylist()]


def learnt(row: dict[str, Any], bundle_files: dict[str, bytes]) -> str:
    tokenizer = Tokenizer.from_str(bundle_files["tokenizer.json"].decode())
    ids = [token for token, kept in zip(row["input_ids"], row["loss_mask"], strict=True) if kept]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def test_render_plan_learns_the_answer_and_the_end_of_its_turn(
    ordered: Ordered, bundle_files: dict[str, bytes]
) -> None:
    rendered = render(ordered(chat("the question", "the answer")))
    (row,) = rows(rendered)
    assert learnt(row, bundle_files) == "the answer<|im_end|>"
    assert (row["row"], row["filename"], row["line"], row["split"]) == (0, "a.jsonl", 1, "TRAIN")
    assert (row["unit"], row["role"]) == (0, "")
    assert row["num_tokens"] == len(row["input_ids"]) == len(row["loss_mask"])
    assert row["num_supervised"] == sum(row["loss_mask"])
    (split,) = rendered.result.split_statistics
    assert (split.tokens.count, split.tokens.sum) == (1, row["num_tokens"])
    assert split.supervised_tokens.maximum == row["num_supervised"]
    assert rendered.result.warnings == []


def test_render_plan_names_records_that_teach_nothing(ordered: Ordered) -> None:
    rendered = render(ordered(chat("q1", "a1"), chat("q2", "a2", weight=0), chat("q3", "a3")))
    (record,) = rendered.result.unsupervised_records
    assert (record.filename, record.line) == ("a.jsonl", 2)
    assert "weight 0" in record.message
    assert rendered.result.split_statistics[0].num_unsupervised == 1
    assert [row["num_supervised"] > 0 for row in rows(rendered)] == [True, False, True]


def test_render_plan_warns_when_nothing_at_all_is_learnt(ordered: Ordered) -> None:
    rendered = render(ordered(chat("q1", "a1", weight=0), chat("q2", "a2", weight=0)))
    assert rendered.result.warnings == ["none of the 2 rows of the train split has a token to learn"]
    held_out = render(ordered(chat("q1", "a1"), split=SPLIT_TEST))
    assert held_out.result.warnings == ["the train split has no rows: there is nothing to learn from"]


def test_render_plan_drops_truncates_or_refuses_long_records(ordered: Ordered) -> None:
    records = (chat("q", "a"), chat("long " * 40, "a"))
    dropped = render(ordered(*records, max_tokens=40))
    assert (dropped.result.split_statistics[0].num_dropped, len(rows(dropped))) == (1, 1)
    cut = render(ordered(*records, max_tokens=40, length_policy="TRUNCATE"))
    assert cut.result.split_statistics[0].num_truncated == 1
    assert [row["num_tokens"] for row in rows(cut)][1] == 40
    assert "the record is cut at 40 tokens" in cut.result.unsupervised_records[0].message
    with pytest.raises(InvalidArgument) as caught:
        render(ordered(*records, max_tokens=40, length_policy="FAIL"))
    assert caught.value.reason == Reason.SEQUENCE_TOO_LONG
    assert caught.value.message.startswith("a.jsonl:2: must have at most 40 tokens, got ")
    assert caught.value.metadata == {"filename": "a.jsonl", "line": "2"}


def test_render_plan_refuses_a_template_that_does_not_compile(ordered: Ordered) -> None:
    with pytest.raises(InvalidArgument, match="does not compile") as caught:
        render(ordered(chat("q", "a"), chat_template="{% for x in %}"))
    assert caught.value.reason == Reason.TEMPLATE_INVALID


def test_render_plan_names_the_record_that_a_template_refuses(ordered: Ordered) -> None:
    template = (
        "{% if messages[0].content == 'q2' %}{{ raise_exception('not this one') }}{% endif %}{{ messages }}"
    )
    with pytest.raises(InvalidArgument, match=r"^a.jsonl:2: .*not this one") as caught:
        render(
            ordered(
                chat("q1", "a"),
                chat("q2", "a"),
                chat_template="{% generation %}x{% endgeneration %}" + template,
            )
        )
    assert caught.value.reason == Reason.TEMPLATE_INVALID


def test_render_plan_refuses_a_template_that_is_not_prefix_preserving(ordered: Ordered) -> None:
    template = "{% for m in messages %}[{{ messages | length }}]{{ m.role }}:{{ m.content }}\n{% endfor %}"
    with pytest.raises(InvalidArgument, match=r"a.jsonl:1: .*not prefix-preserving.*generation") as caught:
        render(ordered(chat("q", "a"), chat_template=template))
    assert caught.value.reason == Reason.TEMPLATE_NOT_PREFIX_PRESERVING


def test_render_plan_without_a_template_takes_plain_text_only(
    ordered: Ordered, bundle_folder: Path, bundle_files: dict[str, bytes]
) -> None:
    (bundle_folder / "chat_template.jinja").unlink()
    (row,) = rows(render(ordered({"prompt": "the question:", "completion": "answer"})))
    assert learnt(row, bundle_files) == "answer<|im_end|>"
    with pytest.raises(InvalidArgument) as caught:
        render(ordered(chat("q", "a")))
    assert caught.value.reason == Reason.CHAT_TEMPLATE_MISSING


def test_render_plan_digest_depends_on_rows_and_settings(ordered: Ordered) -> None:
    records = (chat("q1", "a1"), chat("q2", "a2"))
    digests = [
        render(ordered(*records)).result.digest,
        render(ordered(*records, max_tokens=500)).result.digest,
        render(ordered(*records, mask_mode="LAST_TURN")).result.digest,
        render(ordered(records[0])).result.digest,
        render(ordered(*records, template_date="2026-11-24")).result.digest,
        render(ordered(*records, split_turns=True)).result.digest,
        render(
            ordered(*records, template_error_policy=TemplateErrorPolicy.TEMPLATE_ERROR_POLICY_SKIP)
        ).result.digest,
    ]
    assert len(set(digests)) == 7
    assert render(ordered(*records)).result.digest == digests[0]


def test_render_plan_of_a_broken_tokenizer_is_refused(ordered: Ordered, bundle_folder: Path) -> None:
    (bundle_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidArgument) as caught:
        render(ordered(chat("q", "a")))
    assert caught.value.reason == Reason.MODEL_INVALID


def test_render_plan_tells_each_record_before_it_begins(ordered: Ordered) -> None:
    begun: list[tuple[int, int]] = []
    records = [chat(f"question {number}", "a") for number in range(70)]
    order = ordered(*records)
    render_version(order, RecordRenderer(order.records), lambda done, row: begun.append((done, row["line"])))
    assert begun == [(number, number + 1) for number in range(70)]


REFUSING = (
    "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('not ' + m.content) }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_render_plan_lists_all_records_that_a_template_refuses(ordered: Ordered) -> None:
    records = [chat(f"bad {number}" if number % 2 else f"q{number}", "a") for number in range(6)]
    records.append({"prompt": "p:", "completion": " c"})
    order = ordered(*records, chat_template=REFUSING, mask_mode="LAST_TURN")
    rendered = attempt(order)
    assert [(error.line, error.reason) for error in rendered.result.errors] == [
        (2, "TEMPLATE_INVALID"),
        (4, "TEMPLATE_INVALID"),
        (6, "TEMPLATE_INVALID"),
        (1, "INVALID_FIELD"),
    ]
    assert rendered.result.errors[0].message.startswith("the chat template fails: not bad 1")
    assert (rendered.shards, rendered.result.num_errors) == ((), 4)
    with pytest.raises(
        InvalidArgument, match=r"^a.jsonl:2: .*not bad 1.*; 4 of 7 records cannot be"
    ) as caught:
        render(order)
    assert caught.value.metadata == {"filename": "a.jsonl", "line": "2"}


def test_render_plan_leaves_out_what_a_template_refuses_where_it_may(ordered: Ordered) -> None:
    records = [chat(f"bad {number}" if number % 2 else f"q{number}", "a") for number in range(6)]
    skip = TemplateErrorPolicy.TEMPLATE_ERROR_POLICY_SKIP
    rendered = render(ordered(*records, chat_template=REFUSING, template_error_policy=skip))
    assert [row["line"] for row in rows(rendered)] == [1, 3, 5]
    (split,) = rendered.result.split_statistics
    assert (split.num_records, split.num_refused, split.tokens.count) == (6, 3, 3)
    assert ([error.line for error in rendered.result.errors], rendered.result.num_errors) == ([2, 4, 6], 3)
    assert rendered.result.warnings[0].startswith(
        "3 records cannot be rendered and are left out; the first is a.jsonl:2: "
    )
    with pytest.raises(InvalidArgument, match=r"^a.jsonl:1: .*not bad 1.*no record is left"):
        render(ordered(chat("bad 1", "a"), chat_template=REFUSING, template_error_policy=skip))
    with pytest.raises(InvalidArgument, match="must have at most 2 tokens") as caught:
        render(
            ordered(
                *records,
                template_error_policy=skip,
                length_policy="FAIL",
                max_tokens=2,
            )
        )
    assert caught.value.reason == Reason.SEQUENCE_TOO_LONG


def test_render_plan_keeps_a_thousand_errors_and_counts_all(ordered: Ordered) -> None:
    records = [chat(f"bad {number}", "a") for number in range(1100)]
    rendered = attempt(ordered(*records, chat_template=REFUSING))
    assert (len(rendered.result.errors), rendered.result.num_errors) == (1000, 1100)


FORGETTING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('=')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def talk(*turns: str, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return {"messages": messages, **fields}


def test_render_plan_makes_a_row_of_each_answer(ordered: Ordered, bundle_files: dict[str, bytes]) -> None:
    silent = talk("q", "a")
    silent["messages"][1]["weight"] = 0
    records = (
        talk("q1", "x=a1", "q2", "y=a2"),
        talk("q3", "a3"),
        {"prompt": "p:", "completion": " c"},
        silent,
    )
    rendered = render(ordered(*records, chat_template=FORGETTING, split_turns=True))
    found = rows(rendered)
    assert [(row["line"], learnt(row, bundle_files)) for row in found] == [
        (1, "x=a1<|im_end|>"),
        (1, "y=a2<|im_end|>"),
        (2, "a3<|im_end|>"),
        (1, " c<|im_end|>"),
    ]
    assert found[0]["record_id"] == found[1]["record_id"]
    (split,) = rendered.result.split_statistics
    assert (split.num_records, split.tokens.count, split.num_unsupervised) == (4, 4, 1)
    assert [(one.line, one.message) for one in rendered.result.unsupervised_records] == [
        (3, "no row: every assistant turn has weight 0")
    ]
    assert rendered.result.warnings == []
    with pytest.raises(InvalidArgument, match=r"--split-turns.*--mask last-turn.*--chat-template FILE"):
        render(ordered(*records, chat_template=FORGETTING))
    last = render(ordered(*records[:2], chat_template=FORGETTING, mask_mode="LAST_TURN"))
    assert [learnt(row, bundle_files) for row in rows(last)] == ["y=a2<|im_end|>", "a3<|im_end|>"]


def test_render_plan_drops_and_cuts_rows_of_answers_each_by_itself(ordered: Ordered) -> None:
    record = talk("q1", "a1", "long " * 40, "a2")
    dropped = render(ordered(record, split_turns=True, max_tokens=40))
    assert (
        dropped.result.split_statistics[0].num_dropped,
        len(rows(dropped)),
        dropped.result.split_statistics[0].num_records,
    ) == (1, 1, 1)
    cut = render(ordered(record, split_turns=True, max_tokens=40, length_policy="TRUNCATE"))
    assert (
        cut.result.split_statistics[0].num_truncated,
        cut.result.split_statistics[0].num_unsupervised,
    ) == (1, 1)
    assert "the record is cut at 40 tokens" in cut.result.unsupervised_records[0].message


def test_render_plan_warns_of_what_its_tokens_do_not_show(ordered: Ordered) -> None:
    calling = talk("q", "a")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "no json"}}
    calling["messages"][1] = {"role": "assistant", "content": "", "tool_calls": [call]}
    records = (
        {"prompt": "the question: ", "completion": "answer"},
        chat("q", "a"),
        calling,
        {"prompt": "the question: ", "completion": "answers"},
    )
    rendered = render(ordered(*records))
    found = {
        finding.kind: (finding.num_records, [one.line for one in finding.records])
        for finding in rendered.result.findings
    }
    assert found == {
        RenderingFinding.KIND_JOINED_BOUNDARY: (2, [1, 2]),
        RenderingFinding.KIND_ARGUMENTS_NOT_OBJECT: (1, [2]),
        RenderingFinding.KIND_ONLY_END_LEARNT: (1, [2]),
        RenderingFinding.KIND_TURN_NOT_WRITTEN: (1, [2]),
    }
    (joined,) = (warning for warning in rendered.result.warnings if "inside a token" in warning)
    assert joined.startswith("in 2 records an answer begins inside a token of the whole text")
    assert joined.endswith("the first is b.jsonl:1: the completion: between 'the question: ' and 'answer'")
    assert len(rendered.result.warnings) == 4


def test_render_plan_keeps_a_hundred_records_of_a_finding(ordered: Ordered) -> None:
    records = [{"prompt": f"{number} the question: ", "completion": "answer"} for number in range(120)]
    (finding,) = render(ordered(*records)).result.findings
    assert (finding.num_records, len(finding.records)) == (120, 100)


def test_render_plan_refuses_what_is_no_text_or_random(ordered: Ordered) -> None:
    for template in ("{{ '\\ud800' }}", "{{ lipsum() }}", "{{ [1, 2] | random }}"):
        with pytest.raises(InvalidArgument, match=r"^a.jsonl:1: the chat template fails") as caught:
            render(ordered(chat("q", "a"), chat_template=template))
        assert caught.value.reason == Reason.TEMPLATE_INVALID


@pytest.mark.parametrize("ending", ["<|im_start|>", "!"])
def test_render_plan_finds_how_a_template_ends_a_turn_in_the_records_or_says_it_does_not(
    ordered: Ordered, bundle_files: dict[str, bytes], ending: str
) -> None:
    """The template takes no conversation that one could make up for it."""
    picky = "{% if messages | length < 3 %}{{ raise_exception('too short') }}{% endif %}"
    picky += "{% for m in messages %}{{ m.role }}: {{ m.content }}" + ending + "{% endfor %}"
    picky += "{% if add_generation_prompt %}assistant: {% endif %}"
    rendered = render(
        ordered(
            *(talk("q1", "a1", "q2", f"a{number}") for number in range(3)),
            chat_template=picky,
            mask_mode="LAST_TURN",
        )
    )
    tokenizer = Tokenizer.from_str(bundle_files["tokenizer.json"].decode())
    ends = ("<|im_end|>",) if ending == "!" else ("<|im_end|>", ending)
    assert set(rendered.result.stop_token_ids) == {tokenizer.token_to_id(token) for token in ends}
    said = [warning for warning in rendered.result.warnings if "end-of-turn" in warning]
    if ending == "!":
        assert said[0].startswith(
            "in 3 records no end-of-turn or end-of-sequence token of an answer is learnt"
        )
        assert said[0].endswith(
            "first is a.jsonl:1: message 3: the chat template ends it without a special token"
        )
    assert len(said) == (ending == "!")
