"""How judges look on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from luthier.client.cli.views import table
from luthier.client.judges import (
    agreement_words,
    bias_words,
    cost_words,
    error_words,
    judgement_words,
    pair_words,
)

if TYPE_CHECKING:
    from rich.table import Table

    from luthier.v1.evaluation_pb2 import Evaluation, Prediction


def judge_table(evaluation: Evaluation) -> Table:
    """Return judges, a row each: how often they gave nothing, and what the order of two answers does to them."""
    made = table("JUDGE", "WITHOUT A JUDGEMENT", "#ORDERS AGREE", "#FIRST PREFERRED BY", "COST")
    for one in evaluation.judge_results:
        made.add_row(
            one.judge_id,
            error_words(one),
            agreement_words(one),
            bias_words(one),
            cost_words(one),
        )
    return made


def pair_lines(evaluation: Evaluation) -> Iterator[Text]:
    """Yield how the arms did before each judge, pair by pair."""
    for one in evaluation.judge_results:
        for pair in one.pairs:
            yield Text(f"judge {one.judge_id}: {pair_words(pair)}")


def add_judgements(made: Table, prediction: Prediction) -> None:
    """Add what judges made of a record's answers to a table of answers."""
    for one in prediction.judgements:
        mark = Text("!", "red") if one.HasField("error") else Text("")
        made.add_row("", f"judge {one.judge_id}", mark, Text(judgement_words(one), "dim"))
