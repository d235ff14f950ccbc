"""What a row says and its logits are the same bits alone and in any company, order and pieces, from its prompt on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from tests.lm.engine_requests import request, run, with_adapter
from tests.lm.test_blocks import plain_model

from luthier.kernels.attention_decode import cpu as attention
from luthier.lm.attention import IMPLEMENTATION
from luthier.lm.blocks import use_kernels
from luthier.lm.decode_program import DecodeProgram
from luthier.lm.decoding import Batch
from luthier.lm.engine import Engine
from luthier.lm.precision import Precision
from luthier.lm.quantise import quantise_linears

ModelMaker = Callable[..., Any]
SIZES = (1, 3, 5, 64)
NEW_TOKENS = 4


def prompts_of_many_lengths(count: int = 64) -> list[tuple[int, ...]]:
    draw = random.Random(5)
    return [tuple(draw.randrange(3, 97) for _ in range(draw.randint(1, 40))) for _ in range(count)]


PROMPTS = prompts_of_many_lengths()


class Heard(NamedTuple):
    """Of each prompt, by its number: the tokens of its answer, and the logits that they were chosen by."""

    tokens: dict[int, list[int]]
    logits: dict[int, list[torch.Tensor]]


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], list[torch.Tensor]]:
    """Logits by request and row, token by token."""
    found: dict[tuple[str, int], list[torch.Tensor]] = {}
    take = Batch.take

    def noting(batch: Any, logits: torch.Tensor) -> Any:
        # There are none of a piece that is not the last.
        for row, logits_V in zip(batch._rows, logits, strict=False):
            found.setdefault((batch._request.request_id, row.index), []).append(logits_V.clone())
        return take(batch, logits)

    monkeypatch.setattr(Batch, "take", noting)
    return found


def ask(
    model: Any, noted: Any, order: Sequence[int], size: int, *, prefill_tokens: int = 2048, **changes: Any
) -> Heard:
    """Ask prompts by number, so many in a request, one request after another."""
    noted.clear()
    engine = Engine(model, prefill_tokens=prefill_tokens)
    heard = Heard({}, {})
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        one = request(
            str(start),
            prompts=tuple(PROMPTS[number] for number in numbers),
            **({"max_new_tokens": NEW_TOKENS} | changes),
        )
        answers, _ = run(engine, one)
        for row, number in enumerate(numbers):
            heard.tokens[number] = answers[str(start), row]
            heard.logits[number] = noted[str(start), row][: len(answers[str(start), row])]
    return heard


def assert_same(left: Heard, right: Heard) -> None:
    assert left.tokens == right.tokens
    for number, logits in left.logits.items():
        assert len(logits) == len(right.logits[number]) > 0
        assert all(map(torch.equal, logits, right.logits[number])), f"prompt {number}"


def assert_company_changes_nothing(model: Any, noted: Any, **changes: Any) -> None:
    every = list(range(len(PROMPTS)))
    alone = ask(model, noted, every, 1, **changes)
    assert len({tuple(said) for said in alone.tokens.values()}) > len(every) // 2, "the test says something"
    for size in SIZES[1:]:
        assert_same(ask(model, noted, every, size, **changes), alone)
    mixed = random.Random(1).sample(every, len(every))
    assert_same(ask(model, noted, mixed, 5, **changes), alone)
    assert_same(ask(model, noted, mixed[:13], 13, prefill_tokens=29, **changes), _some(alone, mixed[:13]))


def _some(heard: Heard, numbers: Sequence[int]) -> Heard:
    return Heard(
        {number: heard.tokens[number] for number in numbers},
        {number: heard.logits[number] for number in numbers},
    )


def model_of(tiny_model: ModelMaker, family: str, dtype: torch.dtype, **changes: Any) -> Any:
    """A model with kernels, wide enough for products that are cut in blocks."""
    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 320, "num_attention_heads": 6}
    if family in ("GemmaForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM"):
        model: Any = plain_model(family).requires_grad_(requires_grad=False)
        model.set_attn_implementation(IMPLEMENTATION)
        if family == "Gemma2ForCausalLM":
            for layer in model.base_model.layers:
                layer.self_attn.sliding_window = None
            model.config.sliding_window = None
    else:
        model = tiny_model(family, **(sizes | changes))
    model = model.to(dtype)
    use_kernels(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix_length", [0, 9, 150])
@pytest.mark.parametrize("adapter", [None, "lora", "dora"])
def test_answers_do_not_depend_on_who_is_asked_with_them(
    tiny_model: ModelMaker, noted: Any, adapter: str | None, prefix_length: int, dtype: torch.dtype
) -> None:
    model = model_of(tiny_model, "llama", dtype)
    if adapter is not None:
        with_adapter(model, adapter, 1, use_dora=adapter == "dora")
    prefix = tuple(3 + number % 90 for number in range(prefix_length))
    assert_company_changes_nothing(model, noted, adapter=adapter, shared_prefix=prefix)


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "mistral", "GemmaForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM"]
)
def test_no_architecture_lets_rows_know_of_each_other(
    tiny_model: ModelMaker, noted: Any, family: str
) -> None:
    model = model_of(tiny_model, family, torch.bfloat16)
    assert_company_changes_nothing(model, noted, shared_prefix=(7, 8, 9))


@pytest.mark.parametrize("precision", ["INT8", "NF4"])
def test_quantised_weights_let_no_rows_know_of_each_other(
    tiny_model: ModelMaker, noted: Any, precision: Precision
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4}
    model = tiny_model(**sizes).to(torch.bfloat16)
    quantise_linears(model, precision, "cpu")
    use_kernels(model)
    with_adapter(model, "a", 1)
    assert_company_changes_nothing(model, noted, adapter="a")


def test_samples_and_their_log_probabilities_do_not_depend_on_company(tiny_model: ModelMaker) -> None:
    model = model_of(tiny_model, "llama", torch.bfloat16)
    drawn: dict[int, Any] = {}
    for size in (64, 5, 1):
        for start in range(0, 64, size):
            for row, found in samples_of(model, start, size).items():
                assert drawn.setdefault(row, found) == found, f"row {row} of {size} together"
    assert len(drawn) == 128


def samples_of(model: Any, start: int, size: int) -> dict[int, list[Any]]:
    """Two samples of each of some prompts, by row: tokens with their log-probabilities."""
    one = request(
        prompts=tuple(PROMPTS[start : start + size]),
        max_new_tokens=NEW_TOKENS,
        temperature=1.0,
        num_samples=2,
        first_row=2 * start,
        seed=3,
        want_logprobs=True,
    )
    engine, said = Engine(model), dict[int, list[Any]]()
    engine.submit(one)
    while engine.wait(0):
        for event in engine.step():
            said.setdefault(2 * start + event.row, []).append((event.token_ids, event.logprobs))
    return said


def test_rows_of_long_angles_do_not_turn_those_of_short_ones(tiny_model: ModelMaker, noted: Any) -> None:
    scaling = {"short_factor": [1.0] * 8, "long_factor": [1.0 + place for place in range(8)]}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 16.0}
    model = model_of(
        tiny_model, "llama", torch.float32, rope_parameters=rope | scaling | {"rope_theta": 10_000.0}
    )
    assert {len(prompt) > 16 for prompt in PROMPTS} == {True, False}
    assert_company_changes_nothing(model, noted)


@pytest.mark.parametrize("as_program", [True, False])
def test_prompts_are_read_token_by_token_without_padding(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch, as_program: bool
) -> None:
    model = model_of(tiny_model, "llama", torch.float32)
    if not as_program:
        model.base_model.layers[0].mlp.register_forward_hook(lambda *_: None)
    rows: list[int] = []
    decode, together = DecodeProgram.run, attention.attention_decode_cpu

    def noting(program: Any, hidden: Any, *others: Any) -> Any:
        rows.append(len(hidden))
        return decode(program, hidden, *others)

    def noting_attention(new: Any, *others: Any) -> Any:
        rows.append(len(new.query))
        return together(new, *others)

    monkeypatch.setattr(DecodeProgram, "run", noting)
    monkeypatch.setattr(attention, "attention_decode_cpu", noting_attention)
    prompts = PROMPTS[:10]
    run(Engine(model, prefill_tokens=50), request(prompts=tuple(prompts), max_new_tokens=1))
    passes = rows if as_program else rows[::2]
    assert sum(passes) == sum(map(len, prompts))
    assert all(1 <= one <= 50 for one in passes)
    assert len(passes) >= sum(map(len, prompts)) / 50
