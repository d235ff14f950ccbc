"""A failure names the rows that were at hand, unless it names some itself or is of something else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from luthier.errors import (
    Cancelled,
    DataLoss,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    LuthierError,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from luthier.training.recipes.mixture import Mixture
from luthier.training.recipes.position import FILE_NAME, Mark
from luthier.training.worker.places import rows_named
from luthier.training.worker.whereabouts import pass_named

MIXTURE = Mixture(names=("own", "general"), first_rows=(0, 5), shares=(0.5, 0.5), measure="UNITS")


def raised(error: LuthierError, scratch: Path, *renderings: str) -> LuthierError:
    with pytest.raises(type(error)) as caught, pass_named(scratch, renderings or ("own",)):
        raise error
    return caught.value


def placed(error: LuthierError, *renderings: str) -> LuthierError:
    def places(rows: Sequence[tuple[str, int]]) -> list[str]:
        return [f"{rendering}.jsonl:{row // 2}" for rendering, row in rows]

    with pytest.raises(type(error)) as caught, rows_named(places, renderings or ("own",)):
        raise error
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        ResourceExhausted("no room", reason=Reason.OUT_OF_MEMORY, metadata={"micro_batch_tokens": "9"}),
        Unavailable("killed", reason=Reason.CRASHED),
        Unavailable("hangs", reason=Reason.STALLED),
        Unavailable("rank", reason=Reason.RANK_LOST),
        Internal("ValueError: unexpected"),
        FailedPrecondition("no numbers", reason=Reason.OUTPUT_NOT_FINITE),
    ],
)
def test_what_went_wrong_in_a_pass_names_its_step_and_rows(tmp_path: Path, error: LuthierError) -> None:
    Mark(tmp_path / FILE_NAME).begin(4, (7, 8))
    found = raised(error, tmp_path)
    assert found.message == f"{error.message}; it was at step 4, in a pass over rows 7, 8"
    assert found.reason == error.reason
    assert found.metadata == {**error.metadata, "step": "4", "rows": "7,8", "num_rows": "2"}


@pytest.mark.parametrize(
    "error",
    [
        Cancelled("stop"),
        Unavailable("the service is away"),
        Unavailable("ends", reason=Reason.SHUTTING_DOWN),
        ResourceExhausted("full", reason=Reason.DISK_FULL),
        FailedPrecondition("another has it", reason=Reason.LEASE_LOST),
        FailedPrecondition("nan", reason=Reason.LOSS_NOT_FINITE, metadata={"rows": "1"}),
        DataLoss("a flag for each token", metadata={"row": "3"}),
        InvalidArgument("field", metadata={"filename": "a", "line": "2", "row": "1"}),
    ],
)
def test_what_is_not_of_a_pass_or_names_rows_itself_stays(tmp_path: Path, error: LuthierError) -> None:
    Mark(tmp_path / FILE_NAME).begin(4, (7, 8))
    assert raised(error, tmp_path) is error


def test_where_no_rows_are_at_hand_none_are_named(tmp_path: Path) -> None:
    error = Internal("x")
    assert raised(error, tmp_path) is error
    Mark(tmp_path / FILE_NAME).leave()
    assert raised(error, tmp_path) is error


def test_rows_of_a_mixture_and_before_the_first_step(tmp_path: Path) -> None:
    Mark(tmp_path / FILE_NAME, MIXTURE).at((*range(4), *range(5, 30)))
    found = raised(Internal("x"), tmp_path, "own", "general")
    assert (
        "it was before the first step of the attempt, in a pass over rows 0, 1, 2, 3 of own; 0, 1"
        in found.message
    )
    assert found.message.endswith("15 of general and 9 more")
    assert found.metadata["renderings"].split(",") == ["own"] * 4 + ["general"] * 16
    assert found.metadata["num_rows"] == "29"


def test_of_several_ranks_that_which_is_lost_names_its_rows_or_all_do(tmp_path: Path) -> None:
    for rank in range(3):
        (tmp_path / f"rank-{rank}").mkdir()
        Mark(tmp_path / f"rank-{rank}" / FILE_NAME).begin(2, (10 * rank, 10 * rank + 1))
    lost = Unavailable("x", reason=Reason.RANK_LOST, metadata={"rank": "1"})
    assert raised(lost, tmp_path).metadata["rows"] == "10,11"
    assert raised(Internal("x"), tmp_path).metadata["rows"] == "0,1,10,11,20,21"


def test_places_are_told_once_each_and_of_any_kind_of_failure() -> None:
    violations = (FieldViolation(field="f", description="d"),)
    error = placed(InvalidArgument("x", metadata={"rows": "0,1,2,3,4,5,6,7"}, violations=violations))
    assert error.message == "x; the first of them are own.jsonl:0, own.jsonl:1, own.jsonl:2"
    assert (error.metadata["places"], error.violations) == ("own.jsonl:0,own.jsonl:1,own.jsonl:2", violations)
    single = placed(DataLoss("x", metadata={"row": "4", "rendering": "general"}), "own", "general")
    assert single.message == "x; it is general.jsonl:2"
    assert placed(InvalidArgument("x", metadata={"rows": "4", "rendering": "general"})).message.endswith(
        "general.jsonl:2"
    )
    for untold in ({"row": "4"}, {}, {"row": "4", "filename": "b"}):
        error = DataLoss("x", metadata=untold)
        assert placed(error, "own", "general") is error


def test_a_failure_stays_where_nobody_can_say_the_places() -> None:
    def away(rows: Sequence[tuple[str, int]]) -> list[str]:
        raise Unavailable("away")

    error = FailedPrecondition("x", metadata={"rows": "1"})
    with pytest.raises(FailedPrecondition) as caught, rows_named(away, ("own",)):
        raise error
    assert caught.value is error
