"""Whether a model ends its answers itself."""

from __future__ import annotations

from luthier.grading.metrics.said import Said


def stop_rate(said: Said) -> dict[str, float]:
    """Return 1.0 for an answer that the model ended, 0.0 for one that was cut at its longest length."""
    return {"stop_rate": float(said.is_ended)}
