import hashlib
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from luthier.data.splits import assign_split
from luthier.v1.dataset_pb2 import SPLIT_TEST, SPLIT_TRAIN, SPLIT_VALIDATION, SplitSettings

RECORD_IDS = st.binary(min_size=1, max_size=8).map(lambda data: hashlib.sha256(data).hexdigest())
SHARES = st.floats(min_value=0.0, max_value=0.49)


def settings(validation: float, test: float, seed: int = 0) -> SplitSettings:
    return SplitSettings(validation_fraction=validation, test_fraction=test, seed=seed)


@given(
    st.lists(RECORD_IDS, unique=True, max_size=40),
    st.lists(RECORD_IDS, unique=True, max_size=40),
    SHARES,
    SHARES,
    st.integers(min_value=-(2**63), max_value=2**63 - 1),
)
def test_assign_split_of_old_records_stays_when_records_are_added(
    old: list[str], added: list[str], validation: float, test: float, seed: int
) -> None:
    chosen = settings(validation, test, seed)
    before = {record: assign_split(record, chosen) for record in old}
    after = {record: assign_split(record, chosen) for record in [*added, *old]}
    assert {record: after[record] for record in old} == before


@given(RECORD_IDS, SHARES, SHARES)
def test_assign_split_with_a_greater_test_share_never_moves_a_record_out_of_test(
    record: str, smaller: float, more: float
) -> None:
    if assign_split(record, settings(0.0, smaller)) == SPLIT_TEST:
        assert assign_split(record, settings(0.0, min(smaller + more, 0.99))) == SPLIT_TEST


def test_assign_split_comes_close_to_the_shares() -> None:
    records = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(10_000)]
    found = Counter(assign_split(record, settings(0.2, 0.1, seed=7)) for record in records)
    assert abs(found[SPLIT_TEST] - 1000) < 120
    assert abs(found[SPLIT_VALIDATION] - 2000) < 160


def test_assign_split_depends_on_the_seed() -> None:
    records = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(200)]
    one = [assign_split(record, settings(0.3, 0.3, seed=1)) for record in records]
    two = [assign_split(record, settings(0.3, 0.3, seed=2)) for record in records]
    assert one != two


def test_assign_split_is_the_documented_hash() -> None:
    digest = hashlib.sha256(b"3\nabc").digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    at, after = settings(0.0, position, seed=3), settings(0.0, position + 1e-9, seed=3)
    assert assign_split("abc", at) == SPLIT_TRAIN
    assert assign_split("abc", after) == SPLIT_TEST


def test_assign_split_without_shares_trains_on_everything() -> None:
    assert assign_split("abc", SplitSettings()) == SPLIT_TRAIN
