"""Write the earnings data set: made-up earnings news and the figures in them as JSON. All of it is synthetic.

    python examples/earnings/generate.py OUT_DIR [--seed N --train N --validation N --test N]

No company, figure or sentence comes from the world: a seeded generator invents them. The same seed and sizes
give the same bytes. Every line of `train.jsonl`, `validation.jsonl` and `test.jsonl` is a conversation in
OpenAI's chat format; its answer is compact JSON with the keys of `FIELDS` in that order (README.md has the rules).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import get_args

from amounts import (
    VERBS,
    Currency,
    Guidance,
    MoneyStyle,
    draw_eps,
    draw_period,
    draw_revenue,
    draw_style,
    near_eps,
    near_revenue,
)
from companies import Split, draw_company, possessive
from phrasings import DISTRACTORS, TEST_PHRASINGS, TRAIN_PHRASINGS, fill, shows

INSTRUCTION = (
    "Extract company, period, revenue (in millions), eps, guidance and currency as JSON. "
    "Use null for what is not stated."
)
FIELDS = ("company", "period", "revenue", "eps", "guidance", "currency")
CAN_BE_MISSING = ("period", "revenue", "eps", "guidance")
SEGMENTS = ("cloud", "consumer", "industrial", "licensing", "medical", "online", "retail", "services")
SIZES: Mapping[Split, int] = {"train": 720, "validation": 64, "test": 200}
SHARE_WITH_MISSING = 0.2
# Drawn from at random; a phrasing has a place for one distractor or for two.
_NUM_DISTRACTORS = (0, 1, 1, 1, 2, 2)
_CURRENCIES: Sequence[Currency] = ("USD", "USD", "USD", "EUR", "EUR", "GBP", "GBP", "JPY")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A text, the fields that it states (a missing one is None) and the distractors in it."""

    text: str
    answer: Mapping[str, str | int | float | None]
    distractors: tuple[str, ...]


def examples(split: Split, count: int, *, seed: int) -> Iterator[Example]:
    """Yield `count` examples of a split, no two with the same text; exactly a fifth (rounded) lack a field."""
    source = random.Random(f"earnings/{seed}/{split}")
    phrasings = TEST_PHRASINGS if split == "test" else TRAIN_PHRASINGS
    lacking = set(source.sample(range(count), round(count * SHARE_WITH_MISSING)))
    seen: set[str] = set()
    while len(seen) < count:
        missing = source.choice(CAN_BE_MISSING) if len(seen) in lacking else None
        example = _draw(source, split, source.choice(phrasings), missing)
        if example.text not in seen:
            seen.add(example.text)
            yield example


def conversation(example: Example) -> dict[str, list[dict[str, str]]]:
    """Return an example as a line of OpenAI's chat format."""
    answer = json.dumps(example.answer, ensure_ascii=False, separators=(",", ":"))
    turns = (("system", INSTRUCTION), ("user", example.text), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(folder: Path, sizes: Mapping[Split, int], *, seed: int) -> dict[Split, Path]:
    """Write one file for each split into a folder, which is made if need be, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[Split, Path] = {}
    for split, count in sizes.items():
        lines = [
            json.dumps(conversation(example), ensure_ascii=False) + "\n"
            for example in examples(split, count, seed=seed)
        ]
        paths[split] = folder / f"{split}.jsonl"
        paths[split].write_text("".join(lines), encoding="utf-8")
    return paths


def _draw(source: random.Random, split: Split, phrasing: str, missing: str | None) -> Example:
    company = draw_company(source, split)
    period, written_period = draw_period(source)
    currency = source.choice(_CURRENCIES)
    revenue, eps = draw_revenue(source, currency), draw_eps(source, currency)
    guidance: Guidance = source.choice(get_args(Guidance))
    style = draw_style(source, currency)
    stated = {
        "period": written_period,
        "revenue": style.revenue(revenue),
        "eps": style.per_share(eps),
        "guided": source.choice(VERBS[guidance]),
    }
    stated.pop("guided" if missing == "guidance" else missing or "", None)
    possible = [name for name in DISTRACTORS if shows(phrasing, name) and _has_place(name, stated)]
    chosen = sorted(source.sample(possible, min(len(possible), source.choice(_NUM_DISTRACTORS))))
    figures = _distractors(source, chosen, revenue, eps, style)
    names = {"company": company, "possessive": possessive(company)}
    answer: dict[str, str | int | float | None] = {
        "company": company,
        "period": period,
        "revenue": _number(revenue),
        "eps": _number(eps),
        "guidance": guidance,
        "currency": currency,
    }
    if missing is not None:
        answer[missing] = None
    return Example(text=fill(phrasing, names | stated | figures), answer=answer, distractors=tuple(chosen))


def _has_place(distractor: str, stated: Mapping[str, str]) -> bool:
    """Last year's revenue stands beside this year's, an estimate beside the earnings; a segment stands alone."""
    needs = {"prior": "revenue", "consensus": "eps"}
    return distractor not in needs or needs[distractor] in stated


def _distractors(
    source: random.Random, chosen: Sequence[str], revenue: Decimal, eps: Decimal, style: MoneyStyle
) -> dict[str, str]:
    written: dict[str, str] = {}
    if "prior" in chosen:
        written["prior"] = style.revenue(near_revenue(source, revenue, low=0.7, high=1.2))
    if "consensus" in chosen:
        written["consensus"] = style.per_share(near_eps(source, eps))
    if "segment" in chosen:
        written["segment"] = source.choice(SEGMENTS)
        written["segment_revenue"] = style.revenue(near_revenue(source, revenue, low=0.15, high=0.6))
    return written


def _number(amount: Decimal) -> int | float:
    return int(amount) if amount == amount.to_integral_value() else float(amount)


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {count}")
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the data set that the command line asks for and say where it is."""
    parser = argparse.ArgumentParser(description="Write the synthetic earnings data set.")
    parser.add_argument("folder", metavar="OUT_DIR", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    for split, size in SIZES.items():
        parser.add_argument(
            f"--{split}", type=_count, default=size, metavar="N", help=f"records, {size} unless told"
        )
    options = parser.parse_args(arguments)
    sizes: dict[Split, int] = {split: getattr(options, split) for split in SIZES}
    for split, path in write(options.folder, sizes, seed=options.seed).items():
        print(f"{path}: {sizes[split]} synthetic records")


if __name__ == "__main__":
    main()
