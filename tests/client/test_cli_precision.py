"""What a base model is held in, and what an optimiser's moments are, on the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import Result

from luthier.v1.base_precision_pb2 import BASE_PRECISION_INT8, BASE_PRECISION_NF4, BASE_PRECISION_UNSPECIFIED
from luthier.v1.evaluation_pb2 import FINISH_REASON_STOP, Evaluation
from luthier.v1.evaluation_service_pb2 import GenerateTextResponse
from luthier.v1.fine_tuning_job_pb2 import OPTIMISER_STATES_INT8, FineTuningJob
from luthier.v1.model_pb2 import Model

Run = Callable[..., Result]


def answering(services: Any, method: str, answer: Any) -> list[Any]:
    """Let a method answer, and note what it is asked."""
    seen: list[Any] = []

    def say(request: Any, context: Any) -> Any:
        seen.append(request)
        return answer

    services.answers[method] = say
    return seen


def test_a_job_says_both(services: Any, run: Run) -> None:
    made = FineTuningJob(name="projects/default/fineTuningJobs/j", base_precision=BASE_PRECISION_NF4)
    seen = answering(services, "CreateFineTuningJob", made)
    words = ("jobs", "create", "--model", "m", "--rendering", "r")
    assert run(*words, "--base-precision", "nf4", "--optimiser-states", "int8").exit_code == 0
    assert run(*words, "--set", "base_precision=INT8").exit_code == 0
    assert run(*words).exit_code == 0
    assert [one.fine_tuning_job.base_precision for one in seen] == [
        BASE_PRECISION_NF4,
        BASE_PRECISION_INT8,
        BASE_PRECISION_UNSPECIFIED,
    ]
    assert seen[0].fine_tuning_job.hyperparameters.optimiser_states == OPTIMISER_STATES_INT8
    answering(services, "GetFineTuningJob", made)
    assert "nf4" in run("jobs", "show", "j").stdout


@pytest.mark.parametrize("flag", ["--base-precision", "--optimiser-states"])
def test_a_word_that_is_none_is_refused(services: Any, run: Run, flag: str) -> None:
    result = run("jobs", "create", "--model", "m", "--rendering", "r", flag, "int3")
    assert result.exit_code == 2
    assert "'int3' is not one of" in result.stderr


def test_a_model_shows_what_it_was_trained_beside(services: Any, run: Run) -> None:
    model = Model(
        name="projects/default/models/t", kind=Model.KIND_ADAPTER, base_precision=BASE_PRECISION_INT8
    )
    answering(services, "GetModel", model)
    assert "base precision" in (shown := run("models", "show", "t").stdout)
    assert "int8" in shown


def test_evaluations_and_generate_may_say_it(services: Any, run: Run) -> None:
    seen = answering(services, "CreateEvaluation", Evaluation(name="projects/default/evaluations/e"))
    words = ("evaluations", "create", "--version", "mine/v1", "--arm", "a=m")
    assert run(*words, "--base-precision", "int8").exit_code == 0
    assert run(*words).exit_code == 0
    assert [one.evaluation.base_precision for one in seen] == [
        BASE_PRECISION_INT8,
        BASE_PRECISION_UNSPECIFIED,
    ]
    asked: list[Any] = []

    def generate(request: Any, context: Any) -> Iterator[GenerateTextResponse]:
        asked.append(request)
        yield GenerateTextResponse(text="yes", finish_reason=FINISH_REASON_STOP)

    services.answers["GenerateText"] = generate
    assert run("generate", "--model", "m", "--base-precision", "nf4", "--seed", "3", "hi").exit_code == 0
    assert run("generate", "--model", "m", "hi").exit_code == 0
    assert [(one.base_precision, one.seed) for one in asked] == [
        (BASE_PRECISION_NF4, 3),
        (BASE_PRECISION_UNSPECIFIED, 0),
    ]
