"""What is asked: chosen by the seed alone, and the prefix that all prompts share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from luthier.evaluation.worker.questions import MIN_PREFIX_TOKENS, Question, choose, shared_prefix
from luthier.text.records import CompletionRecord, record_id


def questions(count: int) -> list[Question]:
    records = [CompletionRecord(prompt=str(row), completion="x") for row in range(count)]
    return [Question(row=row, record_id=record_id(one), record=one) for row, one in enumerate(records)]


@given(st.integers(0, 40), st.integers(1, 20), st.integers())
def test_choice_depends_on_the_seed_and_not_on_the_others(count: int, wanted: int, seed: int) -> None:
    pool = questions(count)
    chosen = choose(pool, wanted, seed)
    assert len(chosen) == min(wanted, count)
    assert chosen == choose(list(reversed(pool)), wanted, seed) or wanted >= count
    assert {one.row for one in choose(pool, max(1, wanted - 1), seed)} <= {one.row for one in chosen}


def test_choice_of_zero_is_everything() -> None:
    assert choose(questions(5), 0, 1) == questions(5)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30).map(tuple), min_size=1, max_size=5))
def test_shared_prefix_begins_every_prompt_and_leaves_each_a_token(rest: list[tuple[int, ...]]) -> None:
    common = tuple(range(100, 100 + MIN_PREFIX_TOKENS))
    prompts = [common + one for one in rest]
    prefix = shared_prefix(prompts)
    assert prefix[:MIN_PREFIX_TOKENS] == common
    assert all(prompt[: len(prefix)] == prefix and len(prompt) > len(prefix) for prompt in prompts)


def test_a_short_prefix_is_not_worth_it() -> None:
    assert shared_prefix([(1, 2, 3), (1, 2, 4)]) == ()
    assert shared_prefix([]) == ()
