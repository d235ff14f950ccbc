"""How graders of an evaluation look on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from luthier.client.cli.views import table
from luthier.client.graders import first_error, grade_lines, lost_words

if TYPE_CHECKING:
    from rich.table import Table

    from luthier.v1.evaluation_pb2 import ArmPrediction, Evaluation


def grader_table(evaluation: Evaluation) -> Table:
    """Return graders, a row each: to how many answers they gave no score, and the first reason."""
    made = table("GRADER", "WITHOUT A SCORE", "FIRST")
    for one in evaluation.grader_results:
        made.add_row(one.name, lost_words(one), first_error(one))
    return made


def add_grades(made: Table, answer: ArmPrediction) -> None:
    """Add what graders made of an answer to a table of answers."""
    for name, words in grade_lines(answer):
        mark = Text("") if answer.grades[name].HasField("score") else Text("!", "red")
        made.add_row("", f"grader {name}", mark, Text(words, "dim"))
