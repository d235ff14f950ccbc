"""Whether an arm's system prompt reaches its model: templates may refuse system turns, or leave them out unsaid."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from luthier.errors import InvalidArgument, Reason
from luthier.text.rendering import RenderingError
from luthier.text.templates import TemplateError

_OTHER_END = "\n?"
Render = Callable[[str], tuple[int, ...]]
"""Makes the tokens that ask for an answer to a record under a system prompt; empty: under none."""
_MOST_REFUSED = 20
"""Records that are refused under a system prompt alone, after which no other is tried."""


def require_written(arm_id: str, system_prompt: str, records: Iterable[Render]) -> None:
    """Raise InvalidArgument TEMPLATE_INVALID where a template refuses system turns, or does not write them.

    The first record that it takes under the prompt decides: system turns are written if another text gives other
    tokens. A record that is refused without a system turn too says nothing of them; where others are refused, and none
    is taken, it is the system turn that is refused.
    """
    if not system_prompt:
        return
    refusals: list[TemplateError] = []
    for render in records:
        try:
            asked, other = render(system_prompt), render(system_prompt + _OTHER_END)
        except RenderingError:
            continue
        except TemplateError as error:
            refusals += [] if _is_refused(render) else [error]
            if len(refusals) == _MOST_REFUSED:
                break
            continue
        if asked == other:
            raise _wrong(
                arm_id, "the chat template writes no system turn: its system_prompt would say nothing"
            )
        return
    if refusals:
        why = f"the chat template refuses its system_prompt ({refusals[0]})"
        raise _wrong(arm_id, why) from refusals[0]


def _is_refused(render: Render) -> bool:
    try:
        render("")
    except (RenderingError, TemplateError):
        return True
    return False


def _wrong(arm_id: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"arm {arm_id}: {why}; give the arm a chat_template that writes system turns, or leave system_prompt out",
        reason=Reason.TEMPLATE_INVALID,
        metadata={"arm_id": arm_id},
    )
