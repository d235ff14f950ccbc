from __future__ import annotations

import pytest

from luthier.grading.metrics.multiple_choice import multiple_choice
from luthier.grading.metrics.said import Said

CHOICES = ("no", "certainly")


def said(reference: str, *logprobs: float) -> Said:
    return Said(text="", reference=reference, choices=CHOICES, choice_logprobs=logprobs)


@pytest.mark.parametrize(
    ("reference", "logprobs", "accuracy", "normalised"),
    [
        # -4 / 2 characters is less than -9 / 9: the sum says no, the mean certainly.
        ("no", (-4.0, -9.0), 1.0, 0.0),
        ("certainly", (-4.0, -9.0), 0.0, 1.0),
        ("no", (-1.0, -9.0), 1.0, 1.0),
        ("certainly", (-9.0, -1.0), 1.0, 1.0),
        # Of equal ones the first, as numpy's argmax has it in lm-eval.
        ("no", (-3.0, -3.0), 1.0, 0.0),
        (" no\n", (-1.0, -9.0), 1.0, 1.0),
    ],
)
def test_choices_are_made_by_sums_and_by_means_over_characters(
    reference: str, logprobs: tuple[float, float], accuracy: float, normalised: float
) -> None:
    found = multiple_choice(said(reference, *logprobs))
    assert found == {"multiple_choice.accuracy": accuracy, "multiple_choice.accuracy_norm": normalised}


def test_a_reference_that_is_none_of_the_choices_is_named() -> None:
    with pytest.raises(ValueError, match="one of the choices 'no', 'certainly', got 'perhaps'"):
        multiple_choice(said("perhaps", -1.0, -2.0))


def test_a_choice_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="for each of 2 choices, got 1"):
        multiple_choice(said("no", -1.0))
