"""Versions rendered as pairs, labelled answers and prompts: units, roles, counts, findings and digests."""

from __future__ import annotations

import hashlib
import json
from array import array
from typing import Any

import pytest
from tests.data.worker.conftest import Ordered
from tests.data.worker.test_version_rendering import REFUSING, attempt, chat, learnt, render, rows

from luthier.data.worker.version_rendering import RenderedVersion
from luthier.errors import InvalidArgument, Reason
from luthier.v1.dataset_pb2 import SPLIT_TEST, SPLIT_TRAIN
from luthier.v1.rendering_pb2 import RenderingFinding, TemplateErrorPolicy

SKIP = TemplateErrorPolicy.TEMPLATE_ERROR_POLICY_SKIP


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pair(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "prompt": [turn("user", question)],
        "chosen": [turn("assistant", chosen)],
        "rejected": [turn("assistant", rejected)],
    }


def labelled(question: str, answer: str, *, label: bool) -> dict[str, Any]:
    return {
        "prompt": [turn("user", question)],
        "completion": [turn("assistant", answer)],
        "label": label,
    }


def found(rendered: RenderedVersion) -> dict[str, tuple[int, list[int]]]:
    """The findings by kind: how many records, and the lines of the first."""
    return {
        RenderingFinding.Kind.Name(one.kind): (one.num_records, [record.line for record in one.records])
        for one in rendered.result.findings
    }


def test_pairs_are_units_of_two_rows(ordered: Ordered, bundle_files: dict[str, bytes]) -> None:
    order = ordered(pair("q1", "good", "bad"), pair("q2", "better", "worse answer"), kind="PREFERENCE")
    rendered = render(order)
    stored = rows(rendered)
    assert [(row["row"], row["unit"], row["role"], row["line"]) for row in stored] == [
        (0, 0, "chosen", 1),
        (1, 0, "rejected", 1),
        (2, 2, "chosen", 2),
        (3, 2, "rejected", 2),
    ]
    assert stored[0]["record_id"] == stored[1]["record_id"]
    assert [learnt(row, bundle_files) for row in stored] == [
        f"{text}<|im_end|>" for text in ("good", "bad", "better", "worse answer")
    ]
    (split,) = rendered.result.split_statistics
    assert (split.num_records, split.num_units, split.tokens.count) == (2, 2, 4)
    assert split.longest_unit_tokens == max(
        stored[first]["num_tokens"] + stored[first + 1]["num_tokens"] for first in (0, 2)
    )
    for role, first in (("chosen", 0), ("rejected", 1)):
        (counts,) = (one for one in split.roles if one.role == role)
        assert counts.tokens.sum == sum(row["num_tokens"] for row in stored[first::2])
        assert counts.supervised_tokens.sum == sum(row["num_supervised"] for row in stored[first::2])
    assert [one.role for one in split.roles] == ["chosen", "rejected"]
    assert rendered.result.warnings == []


def test_pairs_without_a_difference_are_named_kept_and_not_learnt(ordered: Ordered) -> None:
    records = (
        pair("q1", "same", "same"),
        pair("q2", "the answer " * 60 + "a", "the answer " * 60 + "b"),
        pair("q3", "good", "bad"),
    )
    rendered = render(ordered(*records, kind="PREFERENCE", max_tokens=60, length_policy="TRUNCATE"))
    assert found(rendered) == {"KIND_EQUAL_SIDES": (1, [1]), "KIND_EQUAL_WITHIN_LIMIT": (1, [2])}
    assert [row["num_supervised"] > 0 for row in rows(rendered)] == [False] * 4 + [True] * 2
    (split,) = rendered.result.split_statistics
    assert (split.num_unsupervised, split.num_truncated, split.num_units) == (4, 2, 3)
    assert split.longest_unit_tokens == sum(row["num_tokens"] for row in rows(rendered)[4:])
    assert [(one.line, one.message) for one in rendered.result.unsupervised_records] == [
        (1, "both sides are the same tokens"),
        (2, "both sides are the same in their first 60 tokens, where they are cut"),
    ]
    assert rendered.result.warnings == [
        "in 1 record both sides of a pair are the same: nothing is learnt from it; the first is b.jsonl:1: both sides "
        "are the same tokens",
        "in 1 record the sides of a pair differ only beyond max_tokens, where they are cut: nothing is learnt from it; "
        "the first is b.jsonl:2: both sides are the same in their first 60 tokens, where they are cut",
    ]
    nothing = render(ordered(records[0], kind="PREFERENCE"))
    assert nothing.result.warnings[0] == "none of the 2 rows of the train split has a token to learn"


def test_pairs_are_dropped_and_refused_as_one(ordered: Ordered) -> None:
    records = (pair("q1", "a", "b"), pair("q2", "a", "long " * 40))
    dropped = render(ordered(*records, kind="PREFERENCE", max_tokens=40))
    assert [row["line"] for row in rows(dropped)] == [1, 1]
    assert dropped.result.split_statistics[0].num_dropped == 1
    with pytest.raises(
        InvalidArgument, match=r"^b\.jsonl:2: rejected: must have at most 40 tokens"
    ) as caught:
        render(ordered(*records, kind="PREFERENCE", max_tokens=40, length_policy="FAIL"))
    assert caught.value.reason == Reason.SEQUENCE_TOO_LONG


@pytest.mark.parametrize(
    ("kind", "suits", "others"),
    [
        ("PREFERENCE", pair("p", "a", "b"), [chat("q1", "a"), chat("q2", "a")]),
        ("UNPAIRED", labelled("p", "a", label=True), [chat("q1", "a"), chat("q2", "a")]),
    ],
)
def test_records_that_do_not_suit_the_kind_are_refused_with_count_and_place(
    ordered: Ordered,
    kind: str,
    suits: dict[str, Any],
    others: list[dict[str, Any]],
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        render(ordered(*others, suits, kind=kind))
    assert caught.value.reason == Reason.RENDERING_KIND_MISMATCH
    assert caught.value.message.startswith(f"a.jsonl:1: a rendering of kind {kind} needs ")
    assert "got a conversation without a label; pass --kind supervised" in caught.value.message
    assert "2 of 3 records cannot be rendered" in caught.value.message
    left = render(ordered(*others, suits, kind=kind, template_error_policy=SKIP))
    assert {row["filename"] for row in rows(left)} == {"b.jsonl"}
    assert left.result.split_statistics[0].num_refused == 2


def test_labelled_answers_stand_before_the_answer_of_another(
    ordered: Ordered,
    bundle_files: dict[str, bytes],
) -> None:
    records = [labelled(f"q{number}", f"answer {number}", label=number % 3 == 0) for number in range(6)]
    rendered = render(ordered(*records, kind="UNPAIRED"))
    stored = rows(rendered)
    assert [row["role"] for row in stored[::2]] == [
        "desirable" if number % 3 == 0 else "undesirable" for number in range(6)
    ]
    assert {row["role"] for row in stored[1::2]} == {"mismatched"}
    assert [row["unit"] for row in stored] == [number // 2 * 2 for number in range(12)]
    own = [learnt(row, bundle_files) for row in stored[::2]]
    others = [learnt(row, bundle_files) for row in stored[1::2]]
    assert sorted(others) == sorted(own)
    assert all(one != other for one, other in zip(own, others, strict=True))
    (split,) = rendered.result.split_statistics
    assert [(one.role, one.tokens.count) for one in split.roles] == [
        ("desirable", 2),
        ("undesirable", 4),
        ("mismatched", 6),
    ]
    assert rendered.result.warnings == []
    again = render(ordered(*reversed(records), kind="UNPAIRED"))
    behind = {tuple(row["input_ids"]) for row in stored[1::2]}
    assert {tuple(row["input_ids"]) for row in rows(again)[1::2]} == behind


def test_a_labelled_answer_that_is_alone_in_its_split_is_named(ordered: Ordered) -> None:
    rendered = render(ordered(labelled("q", "a", label=True), kind="UNPAIRED"))
    assert found(rendered) == {"KIND_NO_MISMATCHED_ANSWER": (1, [1])}
    (row,) = rows(rendered)
    assert (row["role"], row["num_supervised"]) == ("desirable", 0)
    assert rendered.result.split_statistics[0].longest_unit_tokens == 0


@pytest.mark.parametrize("label", [True, False])
def test_labels_that_are_all_the_same_are_a_warning(ordered: Ordered, label: bool) -> None:
    records = [labelled(f"q{number}", f"answer {number}", label=label) for number in range(3)]
    word = "desirable" if label else "undesirable"
    assert render(ordered(*records, kind="UNPAIRED")).result.warnings == [
        f"all 3 answers of the train split that are learnt from are labelled {word}: there is nothing to tell them from"
    ]
    mixed = [*records, labelled("q9", "answer 9", label=not label)]
    assert render(ordered(*mixed, kind="UNPAIRED")).result.warnings == []


def test_prompts_are_what_asks_and_keep_the_record(
    ordered: Ordered,
    bundle_files: dict[str, bytes],
) -> None:
    order = ordered(chat("q1", "the answer"), pair("q2", "good", "bad"), kind="PROMPT")
    rendered = render(order)
    stored = rows(rendered)
    pairs = rows(render(ordered(pair("q2", "good", "bad"), kind="PREFERENCE")))
    asking = stored[1]["input_ids"]
    assert [row["input_ids"][: len(asking)] for row in pairs] == [asking, asking]
    assert [(row["role"], row["num_supervised"], any(row["loss_mask"])) for row in stored] == [
        ("prompt", 0, False)
    ] * 2
    assert [row["unit"] for row in stored] == [0, 1]
    assert json.loads(stored[0]["record"])["messages"][1]["content"] == "the answer"
    assert json.loads(stored[1]["record"])["chosen"][0]["content"] == "good"
    (split,) = rendered.result.split_statistics
    assert (split.num_unsupervised, split.longest_unit_tokens) == (
        0,
        max(map(len, (asking, stored[0]["input_ids"]))),
    )
    assert not [*rendered.result.warnings, *rendered.result.unsupervised_records]
    assert list(rendered.result.stop_token_ids) == list(render(ordered(chat("q", "a"))).result.stop_token_ids)


def test_a_supervised_rendering_of_pairs_and_labels_says_what_it_takes(
    ordered: Ordered,
    bundle_files: dict[str, bytes],
) -> None:
    pairs = render(ordered(pair("q1", "good", "bad"), pair("q2", "better", "worse")))
    assert [learnt(row, bundle_files) for row in rows(pairs)] == ["good<|im_end|>", "better<|im_end|>"]
    assert {row["role"] for row in rows(pairs)} == {""}
    assert pairs.result.warnings == [
        "in 2 records a pair gives its chosen side to this SUPERVISED rendering; the first is b.jsonl:1: the rejected "
        "side is not used"
    ]
    labels = (labelled("q1", "good", label=True), labelled("q2", "bad", label=False))
    rendered = render(ordered(*labels))
    assert [learnt(row, bundle_files) for row in rows(rendered)] == ["good<|im_end|>"]
    assert found(rendered) == {"KIND_DESIRABLE_TAKEN": (1, [1]), "KIND_UNDESIRABLE_LEFT_OUT": (1, [2])}
    (split,) = rendered.result.split_statistics
    assert (split.num_records, split.num_without_row, split.num_unsupervised) == (2, 1, 1)
    assert [(one.line, one.message) for one in rendered.result.unsupervised_records] == [
        (2, "no row: the answer is labelled undesirable")
    ]


def test_a_template_that_refuses_one_side_refuses_the_pair(ordered: Ordered) -> None:
    order = ordered(
        pair("q1", "good", "bad"), pair("q2", "a", "b"), kind="PREFERENCE", chat_template=REFUSING
    )
    rendered = attempt(order)
    assert [(error.line, error.reason) for error in rendered.result.errors] == [(1, "TEMPLATE_INVALID")]
    assert rendered.shards == ()


def test_digests_tell_kinds_apart_and_hold_the_roles(ordered: Ordered) -> None:
    records = [pair("q1", "good", "bad"), pair("q2", "better", "worse")]
    kinds: list[dict[str, Any]] = [
        {},
        {"kind": "PREFERENCE"},
        {"kind": "PROMPT"},
        {"kind": "PREFERENCE", "max_tokens": 500},
    ]
    digests = [render(ordered(*records, **kind)).result.digest for kind in kinds]
    assert len(set(digests)) == len(kinds)
    swapped = [pair("q1", "bad", "good"), pair("q2", "worse", "better")]
    assert render(ordered(*swapped, kind="PREFERENCE")).result.digest not in digests
    assert render(ordered(*records, kind="PREFERENCE")).result.digest == digests[1]


@pytest.mark.parametrize("split_turns", [False, True])
def test_digests_of_supervised_renderings_are_those_of_before_there_were_kinds(
    ordered: Ordered,
    split_turns: bool,
) -> None:
    """Jobs pin them: what was rendered before and what is rendered now must be told to be the same."""
    talk = chat("q1", "a1")
    talk["messages"] += chat("q2", "a2")["messages"]
    order = ordered(
        talk, chat("q3", "a3", weight=0), {"prompt": "p:", "completion": " c"}, split_turns=split_turns
    )
    rendered = render(order)
    settings = {
        "version": "luthier-rendering-2",
        "dataset_digest": "d",
        "tokenizer_digest": "t",
        "chat_template": "",
        "mask_mode": "DEFAULT",
        "max_tokens": 512,
        "length_policy": "DROP",
        "template_date": "2026-11-23",
        "split_turns": split_turns,
        "template_error_policy": "STRICT",
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + b"\n")
    for row in rows(rendered):
        digest.update(f"{row['record_id']} {row['split']} {len(row['input_ids'])}\n".encode())
        digest.update(array("i", row["input_ids"]).tobytes())
        digest.update(bytes(row["loss_mask"]))
    assert rendered.result.digest == digest.hexdigest()
    assert "record" not in rows(rendered)[0]


def test_mismatched_answers_stay_in_their_split(ordered: Ordered) -> None:
    """A test answer in a training row would be read before it is asked for."""
    for split in (SPLIT_TRAIN, SPLIT_TEST):
        rendered = render(ordered(labelled("q", "a", label=True), kind="UNPAIRED", split=split))
        assert found(rendered) == {"KIND_NO_MISMATCHED_ANSWER": (1, [1])}
