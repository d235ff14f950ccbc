"""Which of several texts a model finds the likeliest to go on with.

The two ways to choose are lm-evaluation-harness's (`ConfigurableTask.process_results` for `multiple_choice`): `acc`
takes the sum of log-probabilities, `acc_norm` that sum divided by the text's characters; of equal ones the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from luthier.grading.metrics.said import Said
from luthier.grading.metrics.text_form import in_text_form


def multiple_choice(said: Said) -> dict[str, float]:
    """Return whether the right choice is chosen, by sums and by means over characters.

    Raises:
        ValueError: the reference is none of the choices, or there is not one log-probability for each.
    """
    right = choice_of(said.reference, said.choices)
    if len(said.choice_logprobs) != len(said.choices):
        raise ValueError(
            f"there must be a log-probability for each of {len(said.choices)} choices, got {len(said.choice_logprobs)}"
        )
    sums = np.asarray(said.choice_logprobs, dtype=np.float64)
    lengths = np.asarray([len(choice) for choice in said.choices], dtype=np.float64)
    return {
        "multiple_choice.accuracy": float(int(sums.argmax()) == right),
        "multiple_choice.accuracy_norm": float(int((sums / lengths).argmax()) == right),
    }


def choice_of(reference: str, choices: Sequence[str]) -> int:
    """Return which choice a reference is, white space at both ends aside.

    Raises:
        ValueError: it is none of them.
    """
    wanted = in_text_form(reference).strip()
    known = [in_text_form(choice).strip() for choice in choices]
    if wanted not in known:
        shown = ", ".join(repr(choice) for choice in known[:8])
        raise ValueError(f"the reference must be one of the choices {shown[:300]}, got {wanted[:100]!r}")
    return known.index(wanted)
