from __future__ import annotations

import pytest

from luthier.grading.metrics.preference import preference
from luthier.grading.metrics.said import Said


@pytest.mark.parametrize(
    ("sides", "accuracy", "margin"),
    [((-3.0, -5.0), 1.0, 2.0), ((-5.0, -3.0), 0.0, -2.0), ((-4.0, -4.0), 0.0, 0.0)],
)
def test_the_likelier_side_is_preferred_and_a_tie_is_no_preference(
    sides: tuple[float, float], accuracy: float, margin: float
) -> None:
    found = preference(Said(text="", reference="", sides=sides))
    assert found == {"preference.accuracy": accuracy, "preference.margin": margin}


def test_other_than_two_sides_are_refused() -> None:
    with pytest.raises(ValueError, match="takes the two answers of a pair, got 0"):
        preference(Said(text="", reference=""))
