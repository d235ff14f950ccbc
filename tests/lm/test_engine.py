import importlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.lm.engine_requests import PROMPTS, collect, request, run, with_adapter

from luthier.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from luthier.lm.engine import Engine
from luthier.lm.generate import FinishReason
from luthier.lm.lora import adapter_parameters, use_adapter

ModelMaker = Callable[..., Any]

FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]


def greedy_by_transformers(model: Any, prompt: Any, new_tokens: Any) -> Any:
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_batch_equals_transformers_generate_of_each_prompt(
    tiny_model: ModelMaker, family: str
) -> None:
    answers, reasons = run(Engine(tiny_model(family)), request())
    plain = tiny_model(family, attention="eager")
    for row, prompt in enumerate(PROMPTS):
        assert answers["r", row] == greedy_by_transformers(plain, prompt, 12)
    assert set(reasons.values()) == {FinishReason.LENGTH}
    assert len({tuple(answer) for answer in answers.values()}) > 1


@pytest.mark.parametrize("prefill_tokens", [1, 5, 2048])
@pytest.mark.parametrize("prefix_length", [1, 7])
def test_shared_prefix_equals_the_full_prompt(
    tiny_model: ModelMaker, prefill_tokens: int, prefix_length: int
) -> None:
    prefix = tuple(range(30, 30 + prefix_length))
    engine = Engine(tiny_model(), prefill_tokens=prefill_tokens)
    shared, _ = run(engine, request(shared_prefix=prefix))
    full, _ = run(engine, request(prompts=tuple(prefix + prompt for prompt in PROMPTS)))
    without, _ = run(engine, request())
    assert shared == full
    assert shared != without


def test_shared_prefix_is_computed_once_per_adapter(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> Any:
    module: Any = importlib.import_module("luthier.lm.engine")

    model, computed = tiny_model(), []
    with_adapter(model, "a", 1)
    original = module.compute_prefix

    def counting(model: Any, ids: Any, prefill_tokens: int) -> Any:
        computed.append(ids)
        return original(model, ids, prefill_tokens)

    monkeypatch.setattr(module, "compute_prefix", counting)
    engine = Engine(model)
    for name in (None, None, "a", "a", None):
        run(engine, request(shared_prefix=(30, 31, 32), adapter=name))
    assert len(computed) == 2
    engine.forget_adapter("a")
    run(engine, request(shared_prefix=(30, 31, 32), adapter="a"))
    assert len(computed) == 3


def test_stop_tokens_end_rows_at_different_times_without_changing_the_others(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model())
    free, _ = run(engine, request())
    stop = frozenset({free["r", 0][1], free["r", 2][4]})
    stopped, reasons = run(engine, request(stop_token_ids=stop))
    for key, tokens in free.items():
        ends = [place for place, token in enumerate(tokens) if token in stop]
        assert stopped[key] == (tokens[: ends[0]] if ends else tokens)
        assert reasons[key] == (FinishReason.STOP if ends else FinishReason.LENGTH)
    assert FinishReason.STOP in reasons.values()
    assert len({len(tokens) for tokens in stopped.values()}) > 1


def test_engine_runs_base_and_adapters_side_by_side_on_one_model(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    for seed, adapter in enumerate(("a", "b")):
        with_adapter(model, adapter, seed)
    together, _ = run(Engine(model), *(request(str(name), adapter=name) for name in (None, "a", "b")))
    names: tuple[str | None, ...] = (None, "a", "b")
    for name in names:
        alone, _ = run(Engine(model), request(str(name), adapter=name))
        assert alone.items() <= together.items()
        with use_adapter(model, name):
            assert alone[str(name), 0] == greedy_by_transformers(model, PROMPTS[0], 12)
    assert together["a", 0] != together["b", 0] != together["None", 0]


def test_sampling_is_reproducible_and_independent_of_the_batch(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model())
    sampled = request(temperature=1.0, top_p=0.9, seed=3)
    first, _ = run(engine, sampled)
    again, _ = run(engine, sampled)
    other, _ = run(engine, request(temperature=1.0, top_p=0.9, seed=4))
    part, _ = run(engine, request(temperature=1.0, top_p=0.9, seed=3, prompts=PROMPTS[2:], first_row=2))
    assert first == again
    assert first != other
    assert [part["r", 0], part["r", 1]] == [first["r", 2], first["r", 3]]


def test_cancel_ends_a_request_before_the_next_step_and_leaves_the_others(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model())
    alone, _ = run(engine, request("kept"))
    engine.submit(request("kept"))
    engine.submit(request("gone"))
    answers: dict[Any, Any] = {}
    reasons: dict[Any, Any] = {}
    # Both are read, then all of them go on together.
    for _ in range(3):
        collect(engine.step(), answers, reasons)
    engine.cancel("gone")
    engine.cancel("unknown")
    events = engine.step()
    gone = [event for event in events if event.request_id == "gone"]
    assert [event.finish_reason for event in gone] == [FinishReason.CANCELLED] * 4
    assert all(event.token_ids == () and event.num_generated == 3 for event in gone)
    collect(events, answers, reasons)
    while engine.wait(0):
        collect(engine.step(), answers, reasons)
    assert {key: answers[key] for key in alone} == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_no_answer(
    tiny_model: ModelMaker, value: float, temperature: float
) -> None:
    model = tiny_model(tie_word_embeddings=False)
    # One token's row of the head, so that a greedy choice has every other token to take.
    head = model.get_output_embeddings().weight
    head.data[50] = torch.full_like(head.data[50], value)
    engine = Engine(model)
    answers: dict[Any, Any] = {}
    engine.submit(request(temperature=temperature))
    while engine.wait(0):
        collect(engine.step(), answers, {})
    (error,) = engine.take_failures().values()
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "OUTPUT_NOT_FINITE"
    assert "those of row 0 after 0 new tokens are not" in error.message
    assert answers == {}


def test_a_row_that_has_ended_does_not_end_the_others(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    alone, _ = run(Engine(model), request())
    engine = Engine(model)
    engine.submit(request(stop_token_ids=frozenset(alone["r", 0][:1])))
    answers: dict[Any, Any] = {}
    reasons: dict[Any, Any] = {}
    collect(engine.step(), answers, reasons)
    ended = [row for (_, row) in reasons]
    assert ended
    monkeypatch.setattr("luthier.lm.decoding.Batch._compact", lambda batch: list(range(len(batch._rows))))
    forward = importlib.import_module("luthier.lm.passes").forward_together

    def broken(*inputs: Any) -> Any:
        (logits,) = forward(*inputs)
        logits[ended] = float("nan")
        return [logits]

    monkeypatch.setattr("luthier.lm.engine.forward_together", broken)
    while engine.wait(0):
        collect(engine.step(), answers, reasons)
    assert engine.take_failures() == {}
    for row in {0, 1, 2, 3}.difference(ended):
        said = answers["r", row]
        assert said
        assert said == alone["r", row][: len(said)]


def test_a_request_that_fails_takes_nothing_from_the_others(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    alone, _ = run(Engine(model), request("good"))
    with_adapter(model, "broken", 3)
    next(iter(adapter_parameters(model, "broken").values())).data.fill_(float("nan"))
    engine = Engine(model)
    engine.submit(request("bad", adapter="broken", temperature=1.0))
    together, _ = run(engine, request("good"))
    assert together == alone
    failures = engine.take_failures()
    assert list(failures) == ["bad"]
    assert isinstance(failures["bad"], FailedPrecondition)
    assert "must be finite numbers" in str(failures["bad"])
    assert engine.take_failures() == {}


def test_the_smallest_temperature_takes_the_likeliest_token(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model())
    greedy, _ = run(engine, request())
    cold, _ = run(engine, request(temperature=1e-38))
    assert cold == greedy


def test_cancel_before_the_first_step_answers_every_row(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model())
    engine.submit(request())
    engine.cancel("r")
    assert [event.finish_reason for event in engine.step()] == [FinishReason.CANCELLED] * 4
    assert not engine.wait(0)


def test_events_carry_text_that_adds_up(tiny_model: ModelMaker) -> Any:
    def decode(ids: Any) -> Any:
        return "".join(f"<{token}>" for token in ids)

    engine = Engine(tiny_model(), decode=decode)
    engine.submit(request())
    texts: dict[int, str] = {}
    tokens: dict[int, list[int]] = {}
    while engine.wait(0):
        for event in engine.step():
            texts[event.row] = texts.get(event.row, "") + event.text
            tokens.setdefault(event.row, []).extend(event.token_ids)
    assert texts == {row: decode(ids) for row, ids in tokens.items()}


def test_submit_refuses_what_cannot_run(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model())
    with pytest.raises(InvalidArgument, match="context of 256 tokens, got 308"):
        engine.submit(request(max_new_tokens=300))
    with pytest.raises(InvalidArgument, match=r"token ids must be in 0\.\.96, got 97"):
        engine.submit(request(prompts=((1, 97),)))
    with pytest.raises(NotFound, match="no adapter 'x'"):
        engine.submit(request(adapter="x"))
    engine.submit(request())
    with pytest.raises(AlreadyExists, match="'r' is running"):
        engine.submit(request())


def test_submit_from_another_thread_wakes_the_waiting_one(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model())
    timer = threading.Timer(0.05, lambda: engine.submit(request()))
    timer.start()
    assert engine.wait(10)
    timer.join()
    assert not Engine(tiny_model()).wait(0)


def test_a_request_that_does_not_fit_on_a_gpu_is_named_and_the_others_go_on(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny_model())

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        yield

    monkeypatch.setattr("luthier.lm.engine.compute_prefix", full)
    engine.submit(request("large", shared_prefix=(30, 31)))
    answers, _ = run(engine, request("small"))
    (failure,) = engine.take_failures().values()
    assert isinstance(failure, ResourceExhausted)
    assert failure.reason == "OUT_OF_MEMORY"
    assert "4 at a time of up to 10 and 12 tokens do not" in failure.message
    assert len(answers) == len(PROMPTS)
