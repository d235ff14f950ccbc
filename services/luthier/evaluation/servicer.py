"""EvaluationService, put together from its families."""

from __future__ import annotations

from luthier.evaluation.aliases.servicer import AliasesServicer
from luthier.evaluation.evaluations.servicer import EvaluationsServicer
from luthier.evaluation.generation.servicer import GenerationServicer
from luthier.evaluation.grading.servicer import GradingServicer
from luthier.runtime.policies import policy_of
from luthier.runtime.server import Registration, of_families
from luthier.v1 import evaluation_service_pb2, evaluation_service_pb2_grpc

SERVICE = evaluation_service_pb2.DESCRIPTOR.services_by_name["EvaluationService"]
POLICY = policy_of(
    SERVICE,
    reads=(
        "GetEvaluation",
        "ListEvaluations",
        "WatchEvaluation",
        "ListPredictions",
        "ListEvaluationDeliveries",
        "GetModelAlias",
        "ListModelAliases",
        "ListModelAliasMoves",
    ),
    generates=("GenerateText", "ScoreTexts", "GradeSamples"),
    changes=(
        "CreateEvaluation",
        "CancelEvaluation",
        "DeleteEvaluation",
        "UndeleteEvaluation",
        "PurgeEvaluation",
        "CreateModelAlias",
        "MoveModelAlias",
        "DeleteModelAlias",
    ),
    subjects={"GenerateText": "model", "ScoreTexts": "model"},
)


def registration(
    evaluations: EvaluationsServicer,
    generation: GenerationServicer,
    grading: GradingServicer,
    aliases: AliasesServicer,
) -> Registration:
    """Return how to add the service to a server."""
    add = evaluation_service_pb2_grpc.add_EvaluationServiceServicer_to_server
    return of_families(SERVICE, add, (evaluations, generation, grading, aliases))
