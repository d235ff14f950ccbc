import pytest

from luthier.data.datasets.rules import TRANSITIONS as VERSION
from luthier.data.renderings.rules import TRANSITIONS as RENDERING
from luthier.data.uploads.rules import TRANSITIONS as UPLOAD
from luthier.errors import FailedPrecondition, Reason
from luthier.v1.dataset_pb2 import DatasetVersion
from luthier.v1.rendering_pb2 import Rendering
from luthier.v1.upload_pb2 import Upload
from luthier.work.lifecycle import Lifecycle

TABLES = [(DatasetVersion.State, VERSION), (Rendering.State, RENDERING), (Upload.State, UPLOAD)]
S = DatasetVersion.State
LIFECYCLE = Lifecycle(DatasetVersion.State.DESCRIPTOR, VERSION)


@pytest.mark.parametrize(("states", "moves"), TABLES)
def test_every_state_stands_in_its_table_and_can_be_reached(
    states: type, moves: dict[int, tuple[int, ...]]
) -> None:
    known = set(states.values()) - {0}  # type: ignore[attr-defined]
    assert set(moves) == known
    reached = {1}  # the state that a resource is created in
    while more := {following for state in reached for following in moves[state]} - reached:
        reached |= more
    assert reached == known


def test_a_final_state_is_one_that_none_follows() -> None:
    final = {state for state in S.values() if state and LIFECYCLE.is_final(state)}
    assert final == {S.STATE_READY, S.STATE_FAILED, S.STATE_CANCELLED}


def test_a_move_that_the_table_lacks_is_refused_by_name() -> None:
    LIFECYCLE.require("n", S.STATE_QUEUED, S.STATE_BUILDING)
    with pytest.raises(FailedPrecondition, match="n is READY and never changes again") as caught:
        LIFECYCLE.require("n", S.STATE_READY, S.STATE_FAILED)
    assert caught.value.reason == Reason.WRONG_STATE
    assert caught.value.metadata == {"name": "n", "state": "READY"}
    with pytest.raises(
        FailedPrecondition, match="n is CANCELLING; it can become CANCELLED, READY, FAILED, not BUILDING"
    ):
        LIFECYCLE.require("n", S.STATE_CANCELLING, S.STATE_BUILDING)
