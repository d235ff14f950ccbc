"""Rules of evaluations: every fault is named at once, and no move but the legal ones is made."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.evaluation.judged import evaluated

from luthier.errors import FailedPrecondition, InvalidArgument
from luthier.evaluation.evaluations.rules import (
    MAX_ARMS,
    MAX_NEW_TOKENS,
    MAX_SHOTS,
    MAX_SYSTEM_CHARACTERS,
    TRANSITIONS,
    State,
    check,
    judged,
    resolved,
    scored,
    spec,
)
from luthier.evaluation.evaluations.verdict_rules import set_roles
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate
from luthier.v1.dataset_pb2 import SPLIT_TEST, SPLIT_VALIDATION
from luthier.v1.evaluation_pb2 import (
    CORRECTNESS_RIGHT,
    CORRECTNESS_UNSPECIFIED,
    CORRECTNESS_WRONG,
    EVALUATION_METRIC_EXACT_MATCH,
    EVALUATION_METRIC_FIELD_MATCH,
    EVALUATION_METRIC_PERPLEXITY,
    EVALUATION_METRIC_UNSPECIFIED,
    ArmResult,
    Comparison,
    DriftProbe,
    DriftResult,
    Evaluation,
    EvaluationArm,
    Prediction,
    ScoreEstimate,
)
from luthier.v1.model_pb2 import Model
from luthier.v1.verdict_pb2 import EvaluationVerdict, Guard, ScoreGuard
from luthier.work.lifecycle import Lifecycle
from luthier.worker.v1.task_pb2 import Asking, BlobFile, EvaluateResult

STATES = [number for number in State.values() if number]
FINAL = {State.STATE_CANCELLED, State.STATE_SUCCEEDED, State.STATE_FAILED}
LIFECYCLE = Lifecycle(State.DESCRIPTOR, TRANSITIONS)


def wanted(**changes: object) -> Evaluation:
    fields = {"dataset_version": "v", "arms": [EvaluationArm(arm_id="zero", model="m")], **changes}
    return Evaluation(**fields)  # type: ignore[arg-type]


def test_every_fault_is_named_at_once_with_value_and_rule() -> None:
    arms = [
        EvaluationArm(arm_id="a", model="m", num_shots=-1),
        EvaluationArm(arm_id="a", model="m", num_shots=MAX_SHOTS + 1),
    ]
    twice = [EVALUATION_METRIC_PERPLEXITY, EVALUATION_METRIC_PERPLEXITY]
    bad = wanted(
        arms=arms,
        max_records=-2,
        metrics=twice,
        labels={"Bad Key": "x"},
        display_name="a\x1b",
        max_new_tokens=0,
    )
    with pytest.raises(InvalidArgument) as caught:
        check(bad)
    named = [(violation.field, violation.description) for violation in caught.value.violations]
    assert named[:4] == [
        ("evaluation.arms[0].num_shots", "must be in 0..64, got -1"),
        ("evaluation.arms[1].num_shots", "must be in 0..64, got 65"),
        ("evaluation.max_records", "must not be negative, got -2"),
        ("evaluation.max_new_tokens", "must be in 1..8192, got 0"),
    ]
    assert named[4][0] == "evaluation.display_name"
    assert named[5:7] == [
        ("evaluation.arms", "arm_id must be unique, got 'a' 2 times"),
        ("evaluation.metrics", "must not name a metric twice"),
    ]
    assert [field for field, _ in named[7:]] == ["evaluation.labels"]


@pytest.mark.parametrize(
    ("system_prompt", "description"),
    [
        (" \n", "must hold more than white space, got ' \\n'; leave it out to ask as records do"),
        ("a" * (MAX_SYSTEM_CHARACTERS + 1), "must be at most 32768 characters, got 32769"),
    ],
)
def test_a_system_prompt_says_something_and_is_no_book(system_prompt: str, description: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(
            wanted(arms=[EvaluationArm(arm_id="a", model="m", system_prompt=system_prompt)], max_new_tokens=1)
        )
    assert [(one.field, one.description) for one in caught.value.violations] == [
        ("evaluation.arms[0].system_prompt", description)
    ]
    check(
        wanted(
            arms=[EvaluationArm(arm_id="a", model="m", system_prompt="a" * MAX_SYSTEM_CHARACTERS)],
            max_new_tokens=1,
        )
    )


@given(
    st.integers(-2, MAX_ARMS + 2),
    st.integers(-2, MAX_SHOTS + 2),
    st.integers(-2, MAX_NEW_TOKENS + 2),
    st.integers(-2, 2),
)
def test_exactly_what_is_within_its_limits_passes(arms: int, shots: int, tokens: int, records: int) -> None:
    evaluation = wanted(
        arms=[EvaluationArm(arm_id=f"arm-{number}", model="m", num_shots=shots) for number in range(arms)],
        max_new_tokens=tokens,
        max_records=records,
    )
    wrong = {
        "evaluation.arms": not 1 <= arms <= MAX_ARMS or not 0 <= shots <= MAX_SHOTS,
        "evaluation.max_new_tokens": not 1 <= tokens <= MAX_NEW_TOKENS,
        "evaluation.max_records": records < 0,
    }
    if not any(wrong.values()):
        check(evaluation)
        return
    with pytest.raises(InvalidArgument) as caught:
        check(evaluation)
    named = {violation.field.partition("[")[0] for violation in caught.value.violations}
    assert named == {field for field, is_wrong in wrong.items() if is_wrong}


def test_a_metric_without_a_name_is_the_callers_fault() -> None:
    bad = resolved(wanted(metrics=[EVALUATION_METRIC_UNSPECIFIED]))
    said = r"evaluation\.metrics\[0\]: must be one of EXACT_MATCH, FIELD_MATCH, PERPLEXITY, .*, got number 0"
    with pytest.raises(InvalidArgument, match=said):
        check(bad)


def test_what_is_not_set_has_its_default_and_what_is_set_stays() -> None:
    empty = Evaluation()
    filled = resolved(empty)
    assert (filled.split, list(filled.metrics), filled.max_new_tokens, filled.state) == (
        SPLIT_TEST,
        [EVALUATION_METRIC_EXACT_MATCH, EVALUATION_METRIC_PERPLEXITY],
        256,
        State.STATE_QUEUED,
    )
    assert filled.primary_score == "exact_match"
    assert empty == Evaluation(), "a message is never changed in place"
    assert resolved(wanted(metrics=[EVALUATION_METRIC_FIELD_MATCH])).primary_score == "field_match.record"
    chosen = wanted(
        primary_score="perplexity",
        split=SPLIT_VALIDATION,
        metrics=[EVALUATION_METRIC_PERPLEXITY],
        max_new_tokens=33,
        max_records=5,
        max_workers=3,
        seed=-3,
        display_name="x",
        state=State.STATE_QUEUED,
    )
    assert resolved(chosen) == chosen
    check(chosen)


@pytest.mark.parametrize("state", STATES)
def test_only_legal_moves_are_made(state: int) -> None:
    for following in STATES:
        if following in TRANSITIONS[state]:
            LIFECYCLE.require("e", state, following)
        else:
            with pytest.raises(FailedPrecondition, match=f"e is {LIFECYCLE.name(state)}") as caught:
                LIFECYCLE.require("e", state, following)
            assert caught.value.metadata == {"name": "e", "state": LIFECYCLE.name(state)}


def test_the_moves_are_these() -> None:
    named = {
        LIFECYCLE.name(state): sorted(map(LIFECYCLE.name, following))
        for state, following in TRANSITIONS.items()
    }
    assert named == {
        "QUEUED": ["CANCELLED", "CANCELLING", "FAILED", "RUNNING"],
        "RUNNING": ["CANCELLED", "CANCELLING", "FAILED", "QUEUED", "SUCCEEDED"],
        "CANCELLING": ["CANCELLED", "FAILED", "SUCCEEDED"],
        "CANCELLED": [],
        "SUCCEEDED": [],
        "FAILED": [],
    }
    assert {state for state in STATES if LIFECYCLE.is_final(state)} == FINAL


def test_an_end_can_be_reached_from_everywhere_but_the_end() -> None:
    for state in set(STATES) - FINAL:
        assert set(TRANSITIONS[state]) >= {State.STATE_CANCELLED, State.STATE_FAILED}
    assert State.STATE_SUCCEEDED not in TRANSITIONS[State.STATE_QUEUED]
    assert set(TRANSITIONS[State.STATE_CANCELLING]) == FINAL, "a cancelled evaluation is never queued again"


def test_a_spec_gives_an_adapter_to_the_arms_that_have_one() -> None:
    evaluation = wanted(
        arms=[
            EvaluationArm(arm_id="zero", model="base"),
            EvaluationArm(arm_id="few", model="tuned", num_shots=3),
        ],
        model_digests={"base": "db", "tuned": "dt"},
        split=SPLIT_VALIDATION,
    )
    private = EvaluationPrivate(base_model="base", askings=[Asking(chat_template=one) for one in "ab"])
    made = spec(evaluation, private, [BlobFile(path="a", sha256="f" * 64, size_bytes=3)])
    assert (made.base_model.name, made.base_model.digest) == ("base", "db")
    assert [arm.HasField("adapter") for arm in made.arms] == [False, True]
    assert (made.arms[1].adapter.name, made.arms[1].adapter.digest) == ("tuned", "dt")
    assert [(arm.arm.arm_id, arm.arm.num_shots) for arm in made.arms] == [("zero", 0), ("few", 3)]
    assert [arm.asking.chat_template for arm in made.arms] == ["a", "b"]
    assert [(file.path, file.size_bytes) for file in made.checkpoint_files] == [("a", 3)]
    assert made.evaluation.split == SPLIT_VALIDATION
    old = spec(evaluation, EvaluationPrivate(base_model="base"), ())
    assert not any(arm.HasField("asking") for arm in old.arms)


def test_an_outcome_says_which_scores_judge_a_whole_answer() -> None:
    names = ["exact_match", "field_match.record", "field_match.fields", "perplexity", "bleu"]
    result = EvaluateResult(
        arm_results=[ArmResult(arm_id="zero", scores=[ScoreEstimate(score=name) for name in names])],
        comparisons=[
            Comparison(score=name, candidate_arm_id="zero", baseline_arm_id="zero") for name in names
        ],
        num_records=3,
        warnings=["w"],
    )
    done = scored(wanted(), result)
    whole = [True, True, False, False, False]
    assert [one.whole_answer for one in done.arm_results[0].scores] == whole
    assert [one.whole_answer for one in done.comparisons] == whole
    assert (done.num_records, list(done.warnings)) == (3, ["w"])


@pytest.mark.parametrize(
    ("arms", "compared", "said"),
    [
        ([], ("b", "a"), "arm_results: must be of the arms a, b, got none"),
        (["a"], ("b", "a"), "arm_results: must be of the arms a, b, got a"),
        (["b", "a"], ("b", "a"), "arm_results: must be of the arms a, b, got b, a"),
        (["a", "b"], ("c", "a"), r"comparisons\[0\]: must be of the arms a, b, got c"),
        (["a", "b"], ("b", "d"), r"comparisons\[0\]: must be of the arms a, b, got d"),
    ],
)
def test_an_outcome_is_of_the_arms_that_were_asked(
    arms: list[str], compared: tuple[str, str], said: str
) -> None:
    evaluation = wanted(arms=[EvaluationArm(arm_id=one, model="m") for one in "ab"])
    candidate, baseline = compared
    result = EvaluateResult(
        arm_results=[ArmResult(arm_id=one) for one in arms],
        comparisons=[Comparison(candidate_arm_id=candidate, baseline_arm_id=baseline)],
    )
    with pytest.raises(InvalidArgument, match=said):
        scored(evaluation, result)


@pytest.mark.parametrize(
    ("wants", "found", "said"),
    [
        (True, [("b", "a"), ("c", "a")], None),
        (True, [], r"drift_results: must be of b from a, c from a, got none"),
        (True, [("b", "a")], r"drift_results: must be of b from a, c from a, got b from a"),
        (True, [("c", "a"), ("b", "a")], r"got c from a, b from a"),
        (True, [("b", "a"), ("c", "b")], r"got b from a, c from b"),
        (True, [("a", "a"), ("b", "a"), ("c", "a")], r"got a from a, b from a, c from a"),
        (False, [], None),
        (False, [("b", "a")], r"drift_results: must be of none, got b from a"),
    ],
)
def test_an_outcome_has_the_drift_that_was_wanted_and_no_other(
    wants: bool, found: list[tuple[str, str]], said: str | None
) -> None:
    arms = [EvaluationArm(arm_id=one, model="m", tuned=one != "a") for one in "abc"]
    evaluation = wanted(arms=arms, drift=DriftProbe(baseline_arm_id="a") if wants else None)
    result = EvaluateResult(
        arm_results=[ArmResult(arm_id=one) for one in "abc"],
        drift_results=[DriftResult(arm_id=arm, baseline_arm_id=baseline) for arm, baseline in found],
    )
    if said is None:
        assert len(scored(evaluation, result).drift_results) == len(found)
        return
    with pytest.raises(InvalidArgument, match=said):
        scored(evaluation, result)


def test_a_stored_prediction_says_whether_its_answers_are_right() -> None:
    """Whatever the scores are called, and however old it is."""
    stored = Prediction()
    for name, value in (("exact_match", 1.0), ("field_match.record", 0.0), ("perplexity", 1.0)):
        stored.answers.add(scores={name: value})
    found = [one.correctness for one in judged(stored).answers]
    assert found == [CORRECTNESS_RIGHT, CORRECTNESS_WRONG, CORRECTNESS_UNSPECIFIED]


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        (
            {"primary_score": "field_match.record"},
            "evaluation.primary_score",
            "must be a score that the metrics give (exact_match, perplexity), got 'field_match.record'",
        ),
        (
            {"metrics": [EVALUATION_METRIC_FIELD_MATCH], "primary_score": "field_match.field"},
            "evaluation.primary_score",
            "must be a score that the metrics give (field_match.fields, field_match.record, field_match.parsed, "
            "field_match.field.NAME), got 'field_match.field'",
        ),
        (
            {"smallest_difference": -0.1},
            "evaluation.smallest_difference",
            "must be a number of at least 0, got -0.1",
        ),
        (
            {"candidate_arm_id": "none"},
            "evaluation.candidate_arm_id",
            "must be one of the arms zero, got 'none'",
        ),
        (
            {"guards": [Guard(score=ScoreGuard(score="bleu", max_loss=1))]},
            "evaluation.guards[0].score.score",
            "must be a score that the metrics give (exact_match, perplexity), got 'bleu'",
        ),
        (
            {"guards": [Guard(score=ScoreGuard(score="exact_match", baseline_arm_id="x"))]},
            "evaluation.guards[0].score.baseline_arm_id",
            "must be one of the arms zero, got 'x'",
        ),
        ({"guards": [Guard()]}, "evaluation.guards[0]", "must be one of score and drift, got none"),
    ],
)
def test_a_verdict_about_what_is_not_there_is_refused(
    changes: dict[str, object], field: str, said: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(resolved(wanted(**changes)))
    assert [(one.field, one.description) for one in caught.value.violations] == [(field, said)]


ROLES = {
    "base": Model(name="base"),
    "adapter": Model(name="adapter", base_model="base"),
    "whole": Model(name="whole", fine_tuning_job="j"),
    "on-whole": Model(name="on-whole", base_model="whole"),
}


@pytest.mark.parametrize(
    ("models", "tuned"),
    [
        (["base", "adapter"], ["adapter"]),
        (["base", "whole"], ["whole"]),
        (["whole"], ["whole"]),
        (["whole", "on-whole"], ["on-whole"]),
        (["base", "whole", "on-whole"], ["whole", "on-whole"]),
        (["on-whole", "whole", "base"], ["on-whole", "whole"]),
        (["base", "base"], []),
    ],
)
def test_an_arm_is_tuned_where_a_job_made_its_model_of_what_others_are(
    models: list[str], tuned: list[str]
) -> None:
    evaluation = wanted(
        arms=[EvaluationArm(arm_id=f"{name}-{index}", model=name) for index, name in enumerate(models)]
    )
    set_roles(evaluation, ROLES)
    assert [arm.model for arm in evaluation.arms if arm.tuned] == tuned
    last = [arm.arm_id for arm in evaluation.arms if arm.tuned][-1:]
    assert evaluation.candidate_arm_id == "".join(last)


def test_only_a_tuned_arm_is_judged_and_none_is_held_against_itself() -> None:
    arms = [EvaluationArm(arm_id="zero", model="base"), EvaluationArm(arm_id="tuned", model="adapter")]
    with pytest.raises(InvalidArgument, match=r"must be an arm of a tuned model \(tuned\), got 'zero'"):
        set_roles(wanted(arms=arms, candidate_arm_id="zero"), ROLES)
    guards = [Guard(score=ScoreGuard(score="exact_match", baseline_arm_id="tuned"))]
    with pytest.raises(InvalidArgument, match="must be another arm than the one that is judged, got 'tuned'"):
        set_roles(wanted(arms=arms, guards=guards), ROLES)


def test_an_outcome_carries_its_verdict_and_an_older_evaluation_has_none() -> None:
    evaluation = evaluated({"zero": 0}, tuned=30, count=48)
    arms = [ArmResult(arm_id=arm.arm_id) for arm in evaluation.arms]
    result = EvaluateResult(arm_results=arms, comparisons=evaluation.comparisons)
    del evaluation.comparisons[:]
    assert scored(evaluation, result).verdict.outcome == EvaluationVerdict.OUTCOME_FINE_TUNE_WINS
    evaluation.primary_score = ""
    assert not scored(evaluation, result).HasField("verdict")
