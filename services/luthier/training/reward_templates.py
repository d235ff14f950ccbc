"""Whether a reward model is given conversations as it was taught to read them."""

from __future__ import annotations

from luthier.v1.model_pb2 import Taught
from luthier.v1.rendering_pb2 import Rendering


def template_warning(name: str, taught: Taught, rendering: Rendering) -> str:
    """Return what to tell of a reward model that values answers to the prompts of a rendering; empty: nothing."""
    # A rendering made before it kept what rendered it says at least what it was given.
    written = rendering.effective_chat_template or rendering.chat_template
    if taught.chat_template == written:
        return ""
    return (
        f"the reward model {name} was taught by another chat template, or other dates in it, than wrote the prompts of "
        f"{rendering.name}: it values conversations as it has not seen them written"
    )
