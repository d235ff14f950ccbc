"""Judges on the command line: files that say them, and how they look."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click
from rich.text import Text

from luthier.client.cli.views import table
from luthier.client.escaping import escaped, escaped_line
from luthier.client.judges import agreement_words, bias_words, error_words, judgement_words, pair_words
from luthier.errors import InvalidArgument

if TYPE_CHECKING:
    from rich.table import Table

    from luthier.v1.evaluation_pb2 import Evaluation, Prediction
    from luthier.v1.judge_pb2 import Judge


def read_judges(paths: Iterable[str]) -> list[Judge]:
    """Read judges from files of YAML or JSON. Raises UsageError that names the file."""
    from luthier.client.documents import MAX_BYTES
    from luthier.client.message_files import read_message
    from luthier.v1.judge_pb2 import Judge

    found = []
    for path in paths:
        try:
            with click.open_file(path, "rb") as file:
                found.append(read_message(file.read(MAX_BYTES + 1), Judge, source=escaped_line(path)).message)
        except InvalidArgument as error:
            raise click.UsageError(escaped(error.message)) from error
    return found


def judge_table(evaluation: Evaluation) -> Table:
    """Return judges, a row each: how often they gave nothing, and what the order of two answers does to them."""
    made = table("JUDGE", "WITHOUT A JUDGEMENT", "#ORDERS AGREE", "#FIRST PREFERRED BY", "#CALLS REPEATED")
    for one in evaluation.judge_results:
        made.add_row(
            one.judge_id,
            error_words(one),
            agreement_words(one),
            bias_words(one),
            f"{one.num_repeated_calls:,}" if one.num_repeated_calls else "",
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
