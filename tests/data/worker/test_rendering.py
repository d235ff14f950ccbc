import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from luthier.data.renderings.domain import LengthPolicy, MaskMode
from luthier.data.splits import Split, SplitSettings
from luthier.data.worker.building import Place, VersionBuilder
from luthier.data.worker.rendering import RenderedVersion, RenderPlan, render_plan
from luthier.errors import InvalidArgument, Reason

Ordered = Callable[..., RenderPlan]


def chat(question: str, answer: str, weight: float | None = None) -> dict[str, Any]:
    answered: dict[str, Any] = {"role": "assistant", "content": answer}
    if weight is not None:
        answered["weight"] = weight
    return {"messages": [{"role": "user", "content": question}, answered]}


@pytest.fixture
def ordered(tmp_path: Path, bundle_folder: Path) -> Ordered:
    """Makes a plan that renders the records given."""

    def order(*records: object, split: Split = Split.TRAIN, **changes: Any) -> RenderPlan:
        folder = tmp_path / f"plan-{len(list(tmp_path.iterdir()))}"
        for name in ("version", "rows"):
            (folder / name).mkdir(parents=True)
        builder = VersionBuilder(folder / "version", SplitSettings(), lambda: None)
        data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        builder.read(io.BytesIO(data), Place(filename="a.jsonl", split=split), None)
        plan = RenderPlan(
            shards=tuple(str(shard.path) for shard in builder.finish().shards),
            bundle_folder=str(bundle_folder),
            output_folder=str(folder / "rows"),
            dataset_digest="d",
            tokenizer_digest="t",
            chat_template="",
            mask_mode=MaskMode.DEFAULT,
            max_tokens=512,
            length_policy=LengthPolicy.DROP,
            template_date="2026-11-23",
        )
        return replace(plan, **changes)

    return order


def render(plan: RenderPlan) -> RenderedVersion:
    return render_plan(plan, lambda done, first: None)


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
    assert row["num_tokens"] == len(row["input_ids"]) == len(row["loss_mask"])
    assert row["num_supervised"] == sum(row["loss_mask"])
    (split,) = rendered.splits
    assert (split.tokens.count, split.tokens.sum) == (1, row["num_tokens"])
    assert split.supervised_tokens.maximum == row["num_supervised"]
    assert rendered.warnings == ()


def test_render_plan_names_records_that_teach_nothing(ordered: Ordered) -> None:
    rendered = render(ordered(chat("q1", "a1"), chat("q2", "a2", weight=0), chat("q3", "a3")))
    (record,) = rendered.unsupervised
    assert (record.filename, record.line) == ("a.jsonl", 2)
    assert "weight 0" in record.message
    assert rendered.splits[0].num_unsupervised == 1
    assert [row["num_supervised"] > 0 for row in rows(rendered)] == [True, False, True]


def test_render_plan_warns_when_nothing_at_all_is_learnt(ordered: Ordered) -> None:
    rendered = render(ordered(chat("q1", "a1", weight=0), chat("q2", "a2", weight=0)))
    assert rendered.warnings == ("none of the 2 rows of the train split has a token to learn",)
    held_out = render(ordered(chat("q1", "a1"), split=Split.TEST))
    assert held_out.warnings == ("the train split has no rows: there is nothing to learn from",)


def test_render_plan_drops_truncates_or_refuses_long_records(ordered: Ordered) -> None:
    records = (chat("q", "a"), chat("long " * 40, "a"))
    dropped = render(ordered(*records, max_tokens=40))
    assert (dropped.splits[0].num_dropped, len(rows(dropped))) == (1, 1)
    cut = render(ordered(*records, max_tokens=40, length_policy=LengthPolicy.TRUNCATE))
    assert cut.splits[0].num_truncated == 1
    assert [row["num_tokens"] for row in rows(cut)][1] == 40
    assert "the record is cut at 40 tokens" in cut.unsupervised[0].message
    with pytest.raises(InvalidArgument) as caught:
        render(ordered(*records, max_tokens=40, length_policy=LengthPolicy.FAIL))
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
        render(ordered(*records)).digest,
        render(ordered(*records, max_tokens=500)).digest,
        render(ordered(*records, mask_mode=MaskMode.LAST_TURN)).digest,
        render(ordered(records[0])).digest,
        render(ordered(*records, template_date="2026-11-24")).digest,
    ]
    assert len(set(digests)) == 5
    assert render(ordered(*records)).digest == digests[0]


def test_render_plan_of_a_broken_tokenizer_is_refused(ordered: Ordered, bundle_folder: Path) -> None:
    (bundle_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidArgument) as caught:
        render(ordered(chat("q", "a")))
    assert caught.value.reason == Reason.MODEL_INVALID


def test_render_plan_tells_each_record_before_it_begins(ordered: Ordered) -> None:
    begun: list[tuple[int, int]] = []
    records = [chat(f"question {number}", "a") for number in range(70)]
    render_plan(ordered(*records), lambda done, row: begun.append((done, row["line"])))
    assert begun == [(number, number + 1) for number in range(70)]
