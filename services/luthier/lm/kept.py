"""How much layers keep of a pass for its gradient. Imports no torch: services plan by it."""

from typing import Literal

Checkpointing = Literal["NONE", "SELECTIVE", "FULL"]
"""All that gradients need; a layer's input and what its products and its attention gave; its input."""
CHECKPOINTINGS: tuple[Checkpointing, ...] = ("NONE", "SELECTIVE", "FULL")
"""From the fastest to the one that takes the least memory."""
