"""Where the text of an answer ends in its row, and what ends it begins."""

from __future__ import annotations

from luthier.text.rendering import Rendered


def text_end(row: Rendered) -> int:
    """Return the place behind the last learnt token that does not end an answer.

    What a template writes behind it, a line feed or an end of text, lies behind that place too. Of an empty answer it
    is where the answer begins.
    """
    end = max((at + 1 for at, learnt in enumerate(row.loss_mask) if learnt), default=len(row.input_ids))
    while end and row.loss_mask[end - 1] and row.input_ids[end - 1] in row.ending_ids:
        end -= 1
    return end
