"""`luthier aliases` against fake services."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

from luthier.v1.evaluation_service_pb2 import (
    GenerateTextResponse,
    ListModelAliasesResponse,
    ListModelAliasMovesResponse,
)
from luthier.v1.model_alias_pb2 import AliasMove, Gate, GateResult, ModelAlias, ScoreGate, VerdictGate
from luthier.v1.verdict_pb2 import EvaluationVerdict

Run = Callable[..., Result]
NAME = "projects/default/modelAliases/production"
MOVE = AliasMove(
    number=2,
    model="projects/default/models/support-2",
    model_digest="ab" * 32,
    evaluation="projects/default/evaluations/e",
    gates=[GateResult(open=True, sentence="exact_match of arm tuned must be at least 90.0 %, it is 95.0 %")],
)


def test_create_reads_gates(services: Any, run: Run) -> None:
    seen: list[Any] = []

    def create(request: Any, context: Any) -> ModelAlias:
        seen.append(request)
        return ModelAlias(name=NAME, gates=request.model_alias.gates)

    services.answers["CreateModelAlias"] = create
    gates = ("field_match.record>=0.9!", "perplexity<=4", "verdict=fine-tune-wins,no-difference")
    result = run("aliases", "create", "production", *(word for gate in gates for word in ("--gate", gate)))
    assert result.exit_code == 0, result.output
    assert seen[0].model_alias_id == "production"
    assert list(seen[0].model_alias.gates) == [
        Gate(score=ScoreGate(score="field_match.record", least=0.9, whole_interval=True)),
        Gate(score=ScoreGate(score="perplexity", most=4)),
        Gate(
            verdict=VerdictGate(
                outcomes=[EvaluationVerdict.OUTCOME_FINE_TUNE_WINS, EvaluationVerdict.OUTCOME_NO_DIFFERENCE]
            )
        ),
    ]
    assert [line.strip() for line in result.stdout.splitlines() if "gate" in line] == [
        f"gate: {gate}" for gate in gates
    ]


@pytest.mark.parametrize("gate", ["exact_match", "exact_match>=much", "verdict=great", "=0.5"])
def test_create_refuses_what_is_no_gate(run: Run, gate: str) -> None:
    refused = run("aliases", "create", "production", "--gate", gate)
    assert refused.exit_code == 2
    assert f"must be SCORE>=LIMIT, SCORE<=LIMIT or verdict=OUTCOME, got '{gate}'" in refused.output


def test_move_show_list_and_history(services: Any, run: Run) -> None:
    seen: list[Any] = []
    alias = ModelAlias(name=NAME, current=MOVE)

    def move(request: Any, context: Any) -> ModelAlias:
        seen.append(request)
        return alias

    services.answers.update(
        MoveModelAlias=move,
        GetModelAlias=lambda request, context: alias,
        ListModelAliases=lambda request, context: ListModelAliasesResponse(model_aliases=[alias]),
        ListModelAliasMoves=lambda request, context: ListModelAliasMovesResponse(moves=[MOVE]),
    )
    assert run("aliases", "move", "production", "support-2", "--evaluation", "e").exit_code == 0
    assert (seen[0].name, seen[0].model, seen[0].evaluation) == (NAME, MOVE.model, MOVE.evaluation)
    assert "gate open: exact_match of arm tuned" in run("aliases", "show", "@production").stdout
    assert re.search(r"production +support-2 +e +0 +2", run("aliases", "list").stdout)
    assert re.search(r"2 +support-2 +abababababab +e", run("aliases", "history", "production").stdout)


def test_generate_asks_an_alias(services: Any, run: Run) -> None:
    seen: list[Any] = []

    def generate(request: Any, context: Any) -> Any:
        seen.append(request)
        yield GenerateTextResponse(text="yes")

    services.answers["GenerateText"] = generate
    assert run("generate", "--model", "@production", "well?").stdout == "yes\n"
    assert seen[0].model == NAME
