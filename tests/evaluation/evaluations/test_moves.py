"""Which states follow which, and what a caller sends reads back."""

from __future__ import annotations

import pytest
from tests.evaluation.evaluations.test_service import NOW, draft

from luthier.errors import (
    FailedPrecondition,
)
from luthier.evaluation.evaluations.convert import (
    evaluation_from_proto,
    evaluation_to_proto,
)
from luthier.evaluation.evaluations.domain import (
    FINAL_STATES,
    TRANSITIONS,
    EvaluationState,
    check_evaluation,
    moved,
)


@pytest.mark.parametrize("state", EvaluationState)
def test_only_legal_moves_are_made(state: EvaluationState) -> None:
    for target in EvaluationState:
        evaluation = draft(name="e", state=state)
        if target in TRANSITIONS[state]:
            after = moved(evaluation, target, NOW)
            assert (after.state, after.end_time is not None) == (target, target in FINAL_STATES)
        else:
            with pytest.raises(FailedPrecondition, match=f"is {state} and cannot become {target}"):
                moved(evaluation, target, NOW)


def test_final_states_have_no_way_out() -> None:
    assert {state for state, targets in TRANSITIONS.items() if not targets} == set(FINAL_STATES)


def test_what_a_caller_sends_reads_back() -> None:
    evaluation = draft(name="projects/default/evaluations/e", max_records=5, seed=-3, display_name="x")
    again = evaluation_from_proto(evaluation_to_proto(evaluation))
    for name in ("dataset_version", "arms", "max_records", "seed", "metrics", "split", "display_name"):
        assert getattr(again, name) == getattr(evaluation, name)
    check_evaluation(again)
