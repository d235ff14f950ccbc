"""Rows within a length: as they are, cut, dropped or refused; and why nothing is learnt from what is left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from luthier.text.rendering import Rendered
from luthier.text.spans import RenderingError


class LengthPolicy(StrEnum):
    """What happens to a record that is too long."""

    DROP = "DROP"
    TRUNCATE = "TRUNCATE"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthLimit:
    """The longest row in tokens, and what happens to a longer one."""

    max_tokens: int
    policy: LengthPolicy


def fit(rendered: Rendered, limit: LengthLimit) -> Rendered | None:
    """Return a row within a limit: as it is, cut at the right, or None when it is dropped.

    Raises:
        RenderingError: SEQUENCE_TOO_LONG under the policy FAIL.
    """
    length = len(rendered.input_ids)
    if length <= limit.max_tokens:
        return rendered
    if limit.policy is LengthPolicy.DROP:
        return None
    if limit.policy is LengthPolicy.FAIL:
        message = f"must have at most {limit.max_tokens} tokens, got {length}"
        raise RenderingError("SEQUENCE_TOO_LONG", message)
    return replace(
        rendered,
        input_ids=rendered.input_ids[: limit.max_tokens],
        loss_mask=rendered.loss_mask[: limit.max_tokens],
        truncated=True,
    )


def why_unsupervised(whole: Rendered, fitted: Rendered) -> str:
    """Return why no token of a row is learnt; empty when one is. `whole` is the row before it was cut."""
    if fitted.num_supervised:
        return ""
    if whole.num_supervised:
        return (
            f"no token is learnt: the first one stands at {whole.loss_mask.index(True)}, "
            f"the record is cut at {len(fitted.input_ids)} tokens"
        )
    return "no token is learnt: every assistant turn has weight 0 or is empty"
