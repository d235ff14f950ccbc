"""Validation rows that training rows repeat: what is measured on them tells nothing of what was not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from luthier.training.recipes.corpus import Corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """What was found.

    Attributes:
        num_rows: validation rows whose tokens a training row has too.
        num_validation_rows: all validation rows.
        validation_row: the first of them.
        training_row: the first training row with its tokens.
    """

    num_rows: int
    num_validation_rows: int
    validation_row: int
    training_row: int

    def text(self, named: Callable[[int], str]) -> str:
        """Return the warning; `named` says how people know a row."""
        return (
            f"{self.num_rows} of {self.num_validation_rows} validation rows have the tokens of training rows, the "
            f"first is row {named(self.validation_row)}, which is row {named(self.training_row)} in training: "
            "validations measure in part what was trained on"
        )


def overlap(corpus: Corpus) -> Overlap | None:
    """Compare the rows of both splits, token by token; None where they have none in common.

    A version has no record in two splits. Mixed renderings may be of any two versions, and different records may have
    the same tokens.
    """
    waiting: dict[bytes, list[int]] = {}
    for row, tokens in corpus.rows("VALIDATION"):
        waiting.setdefault(tokens, []).append(row)
    num_rows = sum(map(len, waiting.values()))
    found = dict(_repeated(corpus, waiting))
    if not found:
        return None
    first = min(found)
    return Overlap(
        num_rows=len(found),
        num_validation_rows=num_rows,
        validation_row=first,
        training_row=found[first],
    )


def _repeated(corpus: Corpus, waiting: dict[bytes, list[int]]) -> Iterator[tuple[int, int]]:
    """Yield validation rows with the first training row of the same tokens."""
    sizes = {len(tokens) for tokens in waiting}
    for training_row, tokens in corpus.rows("TRAIN", sizes):
        for validation_row in waiting.pop(tokens, ()):
            yield validation_row, training_row
