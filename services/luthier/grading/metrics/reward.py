"""What a reward model values an answer at."""

from __future__ import annotations

from luthier.grading.metrics.said import Said


def reward(said: Said) -> dict[str, float]:
    """Return the value; nothing of an answer that has none."""
    return {} if said.reward is None else {"reward": said.reward}
