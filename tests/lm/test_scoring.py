from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.lm.engine_requests import with_adapter

from luthier.errors import InvalidArgument
from luthier.lm.blocks import use_kernels
from luthier.lm.lora import activate
from luthier.lm.scoring import sequence_logprobs

ModelMaker = Callable[..., Any]

SEQUENCES = [[5, 9, 11, 40, 3], [8], [17, 21, 4, 60, 61, 62, 7, 9], [90, 1, 33]]
MASKS = [
    [False, False, True, True, True],
    [True],
    [True, False, True, True, False, False, True, True],
    [True] * 3,
]


@pytest.mark.parametrize("max_tokens", [1, 6, 9, 4096])
def test_sequence_logprobs_equal_log_softmax_of_each_sequence_alone(
    tiny_model: ModelMaker, max_tokens: int
) -> None:
    model = tiny_model()
    scores = sequence_logprobs(model, SEQUENCES, MASKS, max_tokens=max_tokens)
    assert [score.num_tokens for score in scores] == [3, 0, 4, 2]
    for score, ids, mask in zip(scores, SEQUENCES, MASKS, strict=True):
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(float(logprobs[i - 1, ids[i]]) for i in range(1, len(ids)) if mask[i])
        assert score.logprob == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 4096])
def test_is_greedy_says_whether_a_greedy_answer_would_be_the_same(
    tiny_model: ModelMaker, max_tokens: int
) -> None:
    model = tiny_model()
    prompt = [5, 9, 11]
    greedy = list(prompt)
    for _ in range(3):
        greedy.append(int(model(torch.tensor([greedy])).logits[0, -1].argmax()))
    other = [*greedy[:-1], (greedy[-1] + 1) % 50]
    late = [*prompt, (greedy[3] + 1) % 50, *greedy[4:]]
    mask = [False] * 3 + [True] * 3
    scores = sequence_logprobs(
        model, [greedy, other, late], [mask] * 3, max_tokens=max_tokens, likeliest=True
    )
    assert [score.is_greedy for score in scores] == [True, False, False]
    (unasked,) = sequence_logprobs(model, [greedy], [mask])
    assert unasked.is_greedy is None
    assert unasked.logprob == scores[0].logprob


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_a_sequence_has_the_bits_that_it_has_alone_whatever_it_is_scored_with(
    tiny_model: ModelMaker, dtype: torch.dtype, *, adapted: bool
) -> None:
    model = tiny_model().to(dtype)
    use_kernels(model)
    if adapted:
        with_adapter(model, "a", 1)
        activate(model, "a")
    generator = torch.Generator().manual_seed(3)
    sequences = [
        torch.randint(3, 97, (length,), generator=generator).tolist() for length in (40, 3, 17, 90, 2, 33, 5)
    ]
    masks = [[True] * len(one) for one in sequences]
    alone = [
        *(
            sequence_logprobs(model, [ids], [mask], likeliest=True)[0]
            for ids, mask in zip(sequences, masks, strict=True)
        )
    ]
    assert len({one.logprob for one in alone}) == len(alone)
    for max_tokens in (60, 4096):
        assert sequence_logprobs(model, sequences, masks, max_tokens=max_tokens, likeliest=True) == alone
    turned = sequence_logprobs(model, sequences[::-1], masks[::-1], likeliest=True)
    assert turned == alone[::-1]


def test_sequence_logprobs_refuses_a_missing_mask(tiny_model: ModelMaker) -> None:
    with pytest.raises(InvalidArgument, match="got 1 for 2"):
        sequence_logprobs(tiny_model(), [[1, 2], [3]], [[True, True]])


def test_sequence_logprobs_of_nothing_is_nothing(tiny_model: ModelMaker) -> None:
    assert sequence_logprobs(tiny_model(), [], []) == []
