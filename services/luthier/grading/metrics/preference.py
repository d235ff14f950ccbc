"""Which of a pair's two answers a model finds likelier, as DPO's accuracy has it with the reference model left out."""

from __future__ import annotations

from luthier.grading.metrics.said import Said


def preference(said: Said) -> dict[str, float]:
    """Return whether the chosen answer is likelier, ties being wrong, and by how many nats.

    Raises:
        ValueError: there are not two sides.
    """
    if len(said.sides) != 2:
        raise ValueError(f"PREFERENCE takes the two answers of a pair, got {len(said.sides)}")
    chosen, rejected = said.sides
    return {"preference.accuracy": float(chosen > rejected), "preference.margin": chosen - rejected}
