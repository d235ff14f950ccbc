"""Which models are asked: those that answer in words, here."""

from __future__ import annotations

import pytest

from luthier.errors import InvalidArgument
from luthier.evaluation.ready import require_askable
from luthier.v1.model_pb2 import Model

NAME = "projects/p/models/m"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Model.KIND_REWARD, "a reward model: it values answers"),
        (Model.KIND_EXPORT, "a file for other programs; it was made from projects/p/models/tuned"),
    ],
)
def test_a_model_that_gives_no_words_is_refused_with_what_it_is(
    kind: Model.Kind.ValueType, words: str
) -> None:
    model = Model(name=NAME, kind=kind, start_from="projects/p/models/tuned")
    with pytest.raises(InvalidArgument) as caught:
        require_askable(model, "evaluation.arms[0].model")
    (violation,) = caught.value.violations
    assert violation.field == "evaluation.arms[0].model"
    assert violation.description == f"must be a model of words, got '{NAME}', {words}"


@pytest.mark.parametrize("kind", [Model.KIND_BASE, Model.KIND_ADAPTER, Model.KIND_WEIGHTS])
def test_others_are_asked(kind: Model.Kind.ValueType) -> None:
    require_askable(Model(name=NAME, kind=kind), "model")
