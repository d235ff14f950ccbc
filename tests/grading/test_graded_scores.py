"""What values the scores of a grader have is read off its message."""

from __future__ import annotations

import pytest

from luthier.grading.graded_scores import scores_of
from luthier.grading.metrics.scores import ScoreKind, find_score, score_named
from luthier.v1.grader_pb2 import (
    Grader,
    JsonMatchGrader,
    MultiGrader,
    NumberMatchGrader,
    RegexGrader,
    RemoteGrader,
    RewardModelGrader,
    ScoreRange,
    StringCheckGrader,
    TextSimilarityGrader,
)


@pytest.mark.parametrize(
    ("grader", "kind"),
    [
        (Grader(string_check=StringCheckGrader()), ScoreKind.BINARY),
        (Grader(number_match=NumberMatchGrader()), ScoreKind.BINARY),
        (Grader(regex=RegexGrader()), ScoreKind.BINARY),
        (Grader(json_match=JsonMatchGrader(whole=True)), ScoreKind.BINARY),
        (Grader(json_match=JsonMatchGrader()), ScoreKind.FRACTION),
        (Grader(text_similarity=TextSimilarityGrader()), ScoreKind.FRACTION),
        (Grader(multi=MultiGrader()), ScoreKind.FRACTION),
        (Grader(remote=RemoteGrader(range=ScoreRange(min=0.2, max=0.9))), ScoreKind.FRACTION),
        (Grader(remote=RemoteGrader(range=ScoreRange(min=-0.1, max=1))), ScoreKind.REAL),
        (Grader(multi=MultiGrader(range=ScoreRange(max=1.1))), ScoreKind.REAL),
        (Grader(reward_model=RewardModelGrader()), ScoreKind.REAL),
    ],
)
def test_a_score_has_the_kind_of_its_grader(grader: Grader, kind: ScoreKind) -> None:
    grader.name = "one"
    score = scores_of([grader])("grader.one")
    assert (score.name, score.kind, score.higher_is_better) == ("grader.one", kind, True)
    assert not score.compares_text
    assert not score.whole_answer


def test_other_scores_are_as_they_were() -> None:
    named = scores_of([Grader(name="one", regex=RegexGrader())])
    assert named("exact_match") == score_named("exact_match")
    assert named("grader.other").kind is ScoreKind.REAL
    assert find_score("grader") is None
    with pytest.raises(ValueError, match="score must be one of"):
        named("nothing")
