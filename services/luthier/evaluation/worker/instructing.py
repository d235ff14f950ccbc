"""Whether an arm's system prompt reaches its model: templates may refuse system turns, or leave them out unsaid."""

from __future__ import annotations

from collections.abc import Callable

from luthier.errors import InvalidArgument, Reason
from luthier.text.rendering import RenderingError
from luthier.text.templates import TemplateError

_OTHER_END = "\n?"
Render = Callable[[str], tuple[int, ...]]
"""Makes the tokens that ask for an answer under a system prompt; empty: under none."""


def require_written(arm_id: str, system_prompt: str, render: Render) -> None:
    """Raise InvalidArgument TEMPLATE_INVALID where a template refuses system turns, or does not write them.

    They are written if another text gives other tokens. A record that is refused without a system turn too says nothing
    of them.
    """
    if not system_prompt:
        return
    try:
        asked, other = render(system_prompt), render(system_prompt + _OTHER_END)
    except RenderingError:
        return
    except TemplateError as error:
        if _is_refused(render):
            return
        raise _wrong(arm_id, f"the chat template refuses its system_prompt ({error})") from error
    if asked == other:
        raise _wrong(arm_id, "the chat template writes no system turn: its system_prompt would say nothing")


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
