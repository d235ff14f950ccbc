from __future__ import annotations

import pytest

from luthier.grading.metrics.exact_match import exact_match


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("yes", "yes", 1.0),
        (" yes\n", "yes", 1.0),
        ("yes", "\tyes ", 1.0),
        ("", "", 1.0),
        ("Yes", "yes", 0.0),
        ("yes, sir", "yes", 0.0),
        ("y es", "yes", 0.0),
        ("", "yes", 0.0),
        ("Zu\u0308rich", "Z\u00fcrich", 1.0),
        ("\u212b", "\u00c5", 1.0),
        ("10\u00b2", "102", 0.0),
        ("\ufb01n", "fin", 0.0),
        ("\uff11", "1", 0.0),
    ],
)
def test_exact_match_ignores_white_space_at_the_ends_and_ways_to_write_one_character_only(
    prediction: str, reference: str, score: float
) -> None:
    assert exact_match(prediction, reference) == score
