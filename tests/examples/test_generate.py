from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import generate
import pytest
from companies import STEMS, Split
from generate import FIELDS, SHARE_WITH_MISSING, SIZES, Example, conversation, examples, main, write

ROOT = Path(__file__).parents[2]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# Read here anew, not with the tables of the generator: what the text says must be enough for a reader.
SIGNS = {
    "US$": "USD",
    "$": "USD",
    "USD": "USD",
    "dollars": "USD",
    "€": "EUR",
    "EUR": "EUR",
    "euros": "EUR",
    "£": "GBP",
    "GBP": "GBP",
    "pounds": "GBP",
    "¥": "JPY",
    "JPY": "JPY",
    "yen": "JPY",
}
MONEY = re.compile(
    r"(?:(?P<before>US\$|[$€£¥]|USD |EUR |GBP |JPY ))?(?P<number>\d[\d,]*(?:\.\d+)?)"
    r"(?P<scale> billion| million|bn\b|m\b)?(?: (?P<after>dollars|euros|pounds|yen))?"
)
GUIDANCE = {
    "raised": "raised lifted increased",
    "lowered": "lowered cut reduced trimmed",
    "maintained": "maintained confirmed reaffirmed reiterated",
}
ORDINALS = {"first": 1, "second": 2, "third": 3, "fourth": 4}


def amounts(text: str) -> list[tuple[str, float, bool]]:
    """Every amount of money in a text: currency, number (with a scale: in millions), whether it has a scale."""
    found = []
    for match in MONEY.finditer(text):
        sign = (match["before"] or match["after"] or "").strip()
        if sign:
            scale = (match["scale"] or "").strip()
            factor = 1000 if scale in {"billion", "bn"} else 1
            number = round(float(match["number"].replace(",", "")) * factor, 6)
            found.append((SIGNS[sign], number, bool(scale)))
    return found


def periods(text: str) -> set[str]:
    found = {f"Q{quarter} {year}" for quarter, year in re.findall(r"Q([1-4])(?: of)? (\d{4})", text)}
    found |= {f"FY {year}" for year in re.findall(r"(?:FY|fiscal|fiscal year|full year) (\d{4})", text)}
    for ordinal, year in re.findall(r"the (\w+) quarter of (\d{4})", text):
        found.add(f"Q{ORDINALS[ordinal]} {year}")
    for year, ordinal in re.findall(r"the (\d{4}) (\w+) quarter", text):
        found.add(f"Q{ORDINALS[ordinal]} {year}")
    return found


def guidance(text: str) -> set[str]:
    said = set(re.findall(r"\w+", text))
    return {meaning for meaning, verbs in GUIDANCE.items() if said & set(verbs.split())}


def lines(path: Path) -> list[list[Mapping[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def drawn() -> Mapping[Split, list[Example]]:
    return {split: list(examples(split, 400, seed=7)) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_examples_state_every_field_of_the_answer(drawn: Mapping[Split, list[Example]], split: Split) -> None:
    for example in drawn[split]:
        text, answer = example.text, example.answer
        found = amounts(text)
        assert str(answer["company"]) in text
        assert periods(text) == ({answer["period"]} - {None}), text
        assert guidance(text) == ({answer["guidance"]} - {None}), text
        assert {currency for currency, _, _ in found} == {answer["currency"]}, text
        if answer["revenue"] is not None:
            assert (answer["currency"], answer["revenue"], True) in found, text
        if answer["eps"] is not None:
            assert (answer["currency"], answer["eps"], False) in found, text


@pytest.mark.parametrize("split", SPLITS)
def test_examples_hold_no_other_figures_than_answers_and_distractors(
    drawn: Mapping[Split, list[Example]], split: Split
) -> None:
    """So a figure that is null in the answer cannot be read off the text after all."""
    for example in drawn[split]:
        stated = [example.answer[name] for name in ("revenue", "eps") if example.answer[name] is not None]
        assert len(amounts(example.text)) == len(stated) + len(example.distractors), example.text
        figures = [number for _, number, _ in amounts(example.text)]
        assert len(set(figures)) == len(figures), f"a distractor equals the answer: {example.text}"


@pytest.mark.parametrize("split", SPLITS)
def test_examples_lack_a_field_in_a_fifth_of_the_records(
    drawn: Mapping[Split, list[Example]], split: Split
) -> None:
    lacking = Counter(
        tuple(name for name in FIELDS if example.answer[name] is None) for example in drawn[split]
    )
    assert lacking[()] == 400 * (1 - SHARE_WITH_MISSING)
    assert set(lacking) == {(), ("period",), ("revenue",), ("eps",), ("guidance",)}


@pytest.mark.parametrize("split", SPLITS)
def test_examples_mostly_hold_distractors_of_every_kind(
    drawn: Mapping[Split, list[Example]], split: Split
) -> None:
    kinds = Counter(kind for example in drawn[split] for kind in example.distractors)
    assert sum(bool(example.distractors) for example in drawn[split]) > 0.65 * 400
    assert min(kinds[kind] for kind in ("prior", "consensus", "segment")) > 0.1 * 400


@pytest.mark.parametrize("split", SPLITS)
def test_examples_put_distractors_only_beside_what_they_resemble(
    drawn: Mapping[Split, list[Example]], split: Split
) -> None:
    """An estimate alone, with no earnings beside it, would make the task harder than it is meant to be."""
    for example in drawn[split]:
        assert example.answer["revenue"] is not None or "prior" not in example.distractors
        assert example.answer["eps"] is not None or "consensus" not in example.distractors


def test_examples_take_the_phrasings_of_their_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "TRAIN_PHRASINGS", ("Seen in training: {company} {segment}",))
    monkeypatch.setattr(generate, "TEST_PHRASINGS", ("Seen in the test: {company} {segment}",))
    monkeypatch.setattr(generate, "_NUM_DISTRACTORS", (1,))
    for split in SPLITS:
        start = "Seen in the test" if split == "test" else "Seen in training"
        assert all(example.text.startswith(start) for example in examples(split, 20, seed=0))


def test_examples_draw_again_when_a_text_has_been_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "TRAIN_PHRASINGS", ("Outlook [guided:{guided}|not given].",))
    texts = [example.text for example in examples("train", 10, seed=0)]
    assert len(texts) == len(set(texts)) == 10  # of twelve that there can be


def test_examples_never_repeat_a_text(drawn: Mapping[Split, list[Example]]) -> None:
    texts = [example.text for split in SPLITS for example in drawn[split]]
    assert len(set(texts)) == len(texts)


def test_examples_of_the_splits_share_no_company(drawn: Mapping[Split, list[Example]]) -> None:
    first_words = {
        split: {str(example.answer["company"]).split()[0] for example in drawn[split]} for split in SPLITS
    }
    for split in SPLITS:
        assert first_words[split] <= set(STEMS[split])
        for other in set(SPLITS) - {split}:
            assert first_words[split].isdisjoint(first_words[other])


def test_examples_depend_on_the_seed_alone() -> None:
    first = [example.text for example in examples("train", 50, seed=1)]
    assert first == [example.text for example in examples("train", 50, seed=1)]
    assert set(first).isdisjoint(example.text for example in examples("train", 50, seed=2))


def test_conversation_answers_in_compact_json_with_fixed_keys() -> None:
    for example in examples("validation", 100, seed=3):
        system, user, assistant = conversation(example)["messages"]
        assert [turn["role"] for turn in (system, user, assistant)] == ["system", "user", "assistant"]
        assert user["content"] == example.text
        answer = json.loads(assistant["content"])
        assert answer == example.answer
        assert tuple(answer) == FIELDS
        assert assistant["content"] == json.dumps(answer, ensure_ascii=False, separators=(",", ":"))


def test_write_writes_one_line_for_each_record(tmp_path: Path) -> None:
    paths = write(tmp_path / "new" / "folder", {"train": 40, "validation": 5, "test": 7}, seed=0)
    assert {path.name: len(lines(path)) for path in paths.values()} == {
        "train.jsonl": 40,
        "validation.jsonl": 5,
        "test.jsonl": 7,
    }
    assert len({turns[0]["content"] for path in paths.values() for turns in lines(path)}) == 1


def test_main_writes_the_same_bytes_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once in a fresh interpreter, where strings hash differently."""
    script = ROOT / "examples" / "earnings" / "generate.py"
    subprocess.run([sys.executable, script, tmp_path / "a"], check=True, capture_output=True)
    main([str(tmp_path / "b")])
    assert "synthetic" in capsys.readouterr().out
    for split, size in SIZES.items():
        written = (tmp_path / "a" / f"{split}.jsonl").read_bytes()
        assert written == (tmp_path / "b" / f"{split}.jsonl").read_bytes()
        assert written.count(b"\n") == size


def test_main_refuses_an_empty_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "out"), "--test", "0"])
    assert caught.value.code == 2
    assert "must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
