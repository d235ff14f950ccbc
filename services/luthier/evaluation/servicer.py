"""EvaluationService, put together from its families."""

from __future__ import annotations

from luthier.evaluation.evaluations.servicer import EvaluationsServicer
from luthier.evaluation.generation.servicer import GenerationServicer
from luthier.runtime.auth import Policy
from luthier.runtime.server import Registration
from luthier.v1 import evaluation_service_pb2, evaluation_service_pb2_grpc

SERVICE = evaluation_service_pb2.DESCRIPTOR.services_by_name["EvaluationService"]
POLICY: Policy = {f"/{SERVICE.full_name}/{method.name}": frozenset({"key"}) for method in SERVICE.methods}


class EvaluationServicer:
    """Every method of EvaluationService, each from the one family that has it."""

    def __init__(self, evaluations: EvaluationsServicer, generation: GenerationServicer) -> None:
        families = (evaluations, generation)
        for method in SERVICE.methods:
            found = [family for family in families if hasattr(family, method.name)]
            assert len(found) == 1, f"{method.name} must be of one family, it is of {len(found)}"
            setattr(self, method.name, getattr(found[0], method.name))


def registration(servicer: EvaluationServicer) -> Registration:
    """Return how to add the service to a server."""
    return Registration(
        add=evaluation_service_pb2_grpc.add_EvaluationServiceServicer_to_server,
        servicer=servicer,
        name=SERVICE.full_name,
    )
