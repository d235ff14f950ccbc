"""What is drawn for training: its log-probabilities are those that are learnt, however it is cut or shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from luthier.errors import InvalidArgument, Reason
from luthier.lm import draw
from luthier.lm.draw import draw_rows, row_generator
from luthier.lm.engine import Engine
from luthier.lm.generate import FinishReason, GenerationRequest
from luthier.lm.lora import LoraSpec, activate, adapter_parameters, insert_lora
from luthier.lm.packed import WEIGHT, pack
from luthier.lm.passes import Pass, forward_together, plain_logits, scaled_logits
from luthier.lm.readouts import TokenLogprobs, read
from luthier.lm.sampling import Answer, sample

ModelMaker = Callable[..., Any]
PROMPTS = ((5, 9, 11, 40, 3), (8,), (17, 21, 4, 60, 61, 62, 7, 9), (90, 1, 33))


def request(**changes: Any) -> GenerationRequest:
    settings: dict[str, Any] = {
        "request_id": "r",
        "prompts": PROMPTS,
        "max_new_tokens": 12,
        "temperature": 1.0,
        "seed": 3,
        "num_samples": 3,
        "want_logprobs": True,
    }
    return GenerationRequest(**(settings | changes))


def with_adapter(model: Any, seed: int = 1) -> Any:
    insert_lora(model, LoraSpec(rank=4, alpha=8), seed=seed, name="a")
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model, "a").values():
        parameter.data.normal_(std=0.3, generator=generator)
    activate(model, "a")
    return model


def scored(model: Any, answers: list[Answer], wanted: GenerationRequest) -> list[list[float]]:
    """The log-probabilities that training reads of the same tokens, in one packed pass."""
    prompts = [prompt for prompt in wanted.prompts for _ in range(wanted.num_samples)]
    ids = [[*prompt, *answer.token_ids] for prompt, answer in zip(prompts, answers, strict=True)]
    masks = [
        [0] * len(prompt) + [1] * len(answer.token_ids)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    with torch.no_grad():
        found = read(model, pack(ids, {WEIGHT: masks}), TokenLogprobs(temperature=wanted.temperature))
    parts = torch.split(found.logprob, [len(answer.token_ids) for answer in answers])
    return [part.tolist() for part in parts]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
@pytest.mark.parametrize(("family", "softcap"), [("llama", None), ("qwen3", None), ("llama", 4.0)])
def test_log_probabilities_are_those_that_training_reads(
    tiny_model: ModelMaker, family: str, softcap: float | None, temperature: float
) -> None:
    model = with_adapter(tiny_model(family))
    model.config.final_logit_softcapping = softcap
    wanted = request(temperature=temperature)
    answers = sample(model, wanted, limit_tokens=1 << 16)
    assert len(answers) == 12
    for answer, expected in zip(answers, scored(model, answers, wanted), strict=True):
        assert len(answer.logprobs) == len(answer.token_ids) == 12
        assert answer.logprobs == pytest.approx(expected, abs=1e-4)
    assert len({answer.token_ids for answer in answers}) == 12


def test_logits_to_draw_from_are_not_rounded_to_the_type_of_the_model(tiny_model: ModelMaker) -> None:
    model = tiny_model().to(torch.bfloat16)
    hidden = (8 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    exact = hidden.double() @ model.get_output_embeddings().weight.double().T

    def worst(found: torch.Tensor) -> float:
        return float((found.double() - exact).abs().max())

    assert exact.abs().max() > 8
    assert worst(scaled_logits(model, hidden, temperature=1.0)) < 1e-4
    assert worst(plain_logits(model, hidden)) > 1e-2
    scaled = scaled_logits(model, hidden, temperature=2.0)  # which divides bfloat16 exactly
    assert worst(2 * scaled) < 1e-4


def test_the_weights_of_now_are_sampled_from(tiny_model: ModelMaker) -> None:
    model = with_adapter(tiny_model())
    wanted = request()
    before = sample(model, wanted, limit_tokens=1 << 16)
    activate(model, None)
    of_base = sample(model, wanted, limit_tokens=1 << 16)
    activate(model, "a")
    assert sample(model, wanted, limit_tokens=1 << 16) == before != of_base
    with torch.no_grad():
        for one in adapter_parameters(model, "a").values():
            one.mul_(0.5)
    after = sample(model, wanted, limit_tokens=1 << 16)
    assert after != before
    assert after[0].logprobs == pytest.approx(scored(model, after, wanted)[0], abs=1e-4)


@pytest.mark.parametrize("limit_tokens", [1, 70, 100, 1 << 16])
def test_rows_do_not_depend_on_how_they_are_cut_nor_on_what_they_share(
    tiny_model: ModelMaker, limit_tokens: int
) -> None:
    model = with_adapter(tiny_model())
    whole = sample(model, request(), limit_tokens=limit_tokens)
    for place, prompt in enumerate(PROMPTS):
        for number in range(3):
            alone = request(prompts=(prompt,), num_samples=1, first_row=3 * place + number)
            (answer,) = sample(model, alone, limit_tokens=1 << 16)
            found = whole[3 * place + number]
            assert answer.token_ids == found.token_ids
            assert answer.logprobs == pytest.approx(found.logprobs, abs=1e-4)


def test_a_prompt_is_read_once_for_all_its_samples(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    def counting_together(model: Any, wanted: list[Pass]) -> Any:
        seen.extend(tuple(one.ids.shape) for one in wanted)
        return forward_together(model, wanted)

    monkeypatch.setattr("luthier.lm.decoding.forward_together", counting_together)
    sample(tiny_model(), request(num_samples=5), limit_tokens=1 << 16)
    assert seen[0] == (4, 8)
    assert {shape for shape in seen[1:] if shape[0] == 20} == {(20, 1)}
    assert sum(rows * columns for rows, columns in seen) == 4 * 8 + 11 * 20


def test_the_token_that_stops_a_row_is_one_of_what_was_drawn(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    free = sample(model, request(), limit_tokens=1 << 16)
    stop = free[0].token_ids[4]
    wanted = request(stop_token_ids=frozenset({stop}))
    answers = sample(model, wanted, limit_tokens=1 << 16)
    for answer, unstopped in zip(answers, free, strict=True):
        ends = [place for place, token in enumerate(unstopped.token_ids) if token == stop]
        length = ends[0] + 1 if ends else 12
        assert answer.token_ids == unstopped.token_ids[:length]
        assert answer.logprobs == pytest.approx(unstopped.logprobs[:length], abs=1e-4)
        assert answer.finish_reason == (FinishReason.STOP if ends else FinishReason.LENGTH)
    assert {answer.finish_reason for answer in answers} == {FinishReason.STOP, FinishReason.LENGTH}
    events = [event for one in [Engine(model)] for event in run(one, wanted)]
    last = [event for event in events if event.finish_reason is FinishReason.STOP]
    assert all(event.token_ids == (stop,) and len(event.logprobs) == 1 for event in last)
    counted = {event.row: event.num_generated for event in events}
    assert counted == {row: len(answer.token_ids) for row, answer in enumerate(answers)}


def run(engine: Engine, wanted: GenerationRequest) -> list[Any]:
    engine.submit(wanted)
    events: list[Any] = []
    while engine.wait(0):
        events += engine.step()
    return events


def test_cancelled_rows_are_as_many_as_samples(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model())
    engine.submit(request())
    engine.cancel("r")
    assert sorted(event.row for event in engine.step()) == list(range(12))


def test_samples_of_a_greedy_request_are_the_same_answer(tiny_model: ModelMaker) -> None:
    greedy = request(temperature=0.0, want_logprobs=False)
    answers = sample(tiny_model(), greedy, limit_tokens=1 << 16)
    once = sample(tiny_model(), replace(greedy, num_samples=1), limit_tokens=1 << 16)
    assert [answer.token_ids for answer in answers] == [one.token_ids for one in once for _ in range(3)]
    assert {answer.logprobs for answer in answers} == {()}


def test_rows_that_would_outgrow_the_context_or_its_window_are_refused(tiny_model: ModelMaker) -> None:
    with pytest.raises(InvalidArgument, match="context of 256 tokens, got 258"):
        sample(tiny_model(), request(max_new_tokens=250), limit_tokens=1 << 16)
    with pytest.raises(InvalidArgument, match="context of 16 tokens, got 20") as caught:
        sample(tiny_model("mistral", sliding_window=16), request(), limit_tokens=1 << 16)
    assert caught.value.reason == Reason.SEQUENCE_TOO_LONG
    with pytest.raises(InvalidArgument, match=r"token ids must be in 0\.\.96, got 97"):
        sample(tiny_model(), request(prompts=((97,),)), limit_tokens=1 << 16)


def test_check_stops_inside_a_batch(tiny_model: ModelMaker) -> None:
    calls: list[int] = []

    def check() -> None:
        calls.append(len(calls))
        if len(calls) == 4:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        sample(tiny_model(), request(), limit_tokens=1 << 16, check=check)


def test_rows_are_drawn_some_at_a_time_as_they_are_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(1))
    whole = draw_rows(logits, [row_generator(3, row) for row in range(7)])
    parts: list[int] = []
    draw_part = draw._draw_part

    def counted(some: torch.Tensor, randoms: Any) -> tuple[list[int], list[float]]:
        parts.append(len(some))
        return draw_part(some, randoms)

    monkeypatch.setattr(draw, "_DRAWN_BYTES", 3 * 50 * draw._BYTES_OF_LOGIT)
    monkeypatch.setattr(draw, "_draw_part", counted)
    assert draw_rows(logits, [row_generator(3, row) for row in range(7)]) == whole
    assert parts == [3, 3, 1]


def test_draw_rows_follows_the_probabilities() -> None:
    logits = torch.tensor([[0.1, 0.6, 0.0, 0.3], [0.0, 0.0, 1.0, 0.0]]).log()
    logits[logits == float("-inf")] = -200.0
    generators = [row_generator(0, 0), row_generator(0, 1)]
    drawn = [draw_rows(logits, generators) for _ in range(3000)]
    first = [tokens[0] for tokens, _ in drawn]
    assert {tokens[1] for tokens, _ in drawn} == {2}
    shares = [first.count(token) / 3000 for token in range(4)]
    assert shares == pytest.approx([0.1, 0.6, 0.0, 0.3], abs=0.03)
    assert shares[2] == 0
    for tokens, logprobs in drawn[:20]:
        assert logprobs == pytest.approx(
            [float(logits[row, token]) for row, token in enumerate(tokens)], abs=1e-6
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"top_p": 0.9}, r"temperature above 0 and top_p 1, got temperature 1.0 and top_p 0.9"),
        ({"temperature": 0.0}, r"got temperature 0.0 and top_p 1.0"),
    ],
)
def test_requests_whose_log_probabilities_would_be_others_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        request(**changes)


@pytest.mark.parametrize("width", [3, 256, 257, 1000, 4096])
def test_a_token_is_found_where_the_sum_of_probabilities_passes_a_share(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    probabilities = (4 * torch.randn(40, width, generator=generator)).softmax(dim=1)
    probabilities[torch.rand(40, width, generator=generator) < 0.3] = 0.0
    probabilities[:, 1] += 0.01
    shares = torch.rand(40, 1, generator=generator, dtype=torch.float64)
    shares[:2, 0] = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    found = draw._tokens_at(probabilities, shares)
    reached = probabilities.double().cumsum(dim=1)
    wanted = torch.searchsorted(reached, shares * reached[:, -1:], right=True)
    assert (found[2:] == wanted[2:]).float().mean() > 0.97
    assert bool((probabilities.gather(1, found) > 0).all())
    # What is found passes the share, but for the rounding of sums in float32.
    above = reached.gather(1, found) / reached[:, -1:] - shares
    assert bool((above > -1e-5).all())
    assert bool((above - probabilities.gather(1, found) / reached[:, -1:] < 1e-5).all())
