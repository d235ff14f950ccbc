import pytest

from luthier.errors import InvalidArgument
from luthier.lm.packed import WEIGHT, named_positions, pack


def test_pack_lays_sequences_end_to_end_and_restarts_positions() -> None:
    streams: dict[str, list[list[float]]] = {
        WEIGHT: [[False, True, True], [False]],
        "advantage": [[0.5, -1.5, 2.0], [3.0]],
    }
    batch = pack([[7, 8, 9], [4]], streams, rows=[12, 3])
    assert batch.input_ids.tolist() == [7, 8, 9, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 0]
    assert {name: stream.tolist() for name, stream in batch.streams.items()} == {
        WEIGHT: [0.0, 1.0, 1.0, 0.0],
        "advantage": [0.5, -1.5, 2.0, 3.0],
    }
    assert batch.cu_seqlens == (0, 3, 4)
    assert batch.rows == (12, 3)


def test_named_positions_stand_before_tokens_that_any_of_the_streams_names() -> None:
    streams: dict[str, list[list[float]]] = {
        "first": [[0, 0, 2.0], [1, 0, -1]],
        "second": [[0, 1, 0], [0, 0, 0]],
    }
    batch = pack([[7, 8, 9], [4, 5, 6]], streams)
    assert named_positions(batch, "first").tolist() == [1, 4]
    assert named_positions(batch, "first", "second").tolist() == [0, 1, 4]


def test_pack_refuses_nothing_and_empty_sequences() -> None:
    with pytest.raises(InvalidArgument, match="at least one sequence, got none"):
        pack([], {})
    with pytest.raises(InvalidArgument, match=r"sequence 1 .* got 0 tokens"):
        pack([[1], []], {WEIGHT: [[1], []]})


def test_pack_refuses_values_that_do_not_match_the_tokens() -> None:
    with pytest.raises(InvalidArgument, match=r"sequence 0 .* got 2 tokens and \{'weight': 1\} values"):
        pack([[1, 2]], {WEIGHT: [[True]]})


def test_a_batch_moves_to_a_device_whole() -> None:
    batch = pack([[1, 2]], {WEIGHT: [[0, 1]], "advantage": [[0, 2]]}, rows=[7]).to("meta")
    tensors = [batch.input_ids, batch.position_ids, *batch.streams.values()]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 4
    assert (batch.cu_seqlens, batch.rows) == ((0, 2), (7,))
