import importlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from luthier.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from luthier.lm.blocks import use_kernels
from luthier.lm.engine import Engine
from luthier.lm.generate import FinishReason, GenerationRequest
from luthier.lm.lora import LoraSpec, adapter_parameters, insert_lora, use_adapter

ModelMaker = Callable[..., Any]

PROMPTS = ((5, 9, 11, 40, 3), (8,), (17, 21, 4, 60, 61, 62, 7, 9), (90, 1, 33))
FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]


def request(request_id: str = "r", **changes: Any) -> Any:
    settings: dict[str, Any] = {"request_id": request_id, "prompts": PROMPTS, "max_new_tokens": 12}
    return GenerationRequest(**(settings | changes))


def collect(events: Any, answers: Any, reasons: Any) -> None:
    for event in events:
        key = (event.request_id, event.row)
        answers.setdefault(key, []).extend(event.token_ids)
        assert event.num_generated == len(answers[key])
        if event.finish_reason is not None:
            assert key not in reasons
            reasons[key] = event.finish_reason


def run(engine: Any, *requests: GenerationRequest) -> Any:
    for one in requests:
        engine.submit(one)
    answers: dict[Any, Any] = {}
    reasons: dict[Any, Any] = {}
    while engine.wait(0):
        collect(engine.step(), answers, reasons)
    assert answers.keys() == reasons.keys()
    return answers, reasons


def with_adapter(model: Any, name: str, seed: int) -> None:
    insert_lora(model, LoraSpec(rank=4, alpha=8), seed=seed, name=name)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model, name).values():
        parameter.data.normal_(std=0.3, generator=generator)


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
    # Each is read, then all of them go on together.
    for _ in range(4):
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


def test_interactive_request_is_admitted_while_a_batch_runs(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model())
    engine.submit(request("batch", max_new_tokens=40))
    for _ in range(5):
        engine.step()
    engine.submit(request("chat", prompts=(PROMPTS[0],), max_new_tokens=3))
    order = [{event.request_id for event in engine.step()} for _ in range(4)]
    assert order == [{"chat"}, {"batch", "chat"}, {"batch", "chat"}, {"batch"}]


def test_long_prompts_are_computed_in_pieces_so_that_others_advance(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model(), prefill_tokens=8)
    engine.submit(request("long", prompts=((7,) * 64,), max_new_tokens=1))
    engine.submit(request("short", prompts=((5,),), max_new_tokens=7))
    produced = [[event.request_id for event in engine.step()] for _ in range(15)]
    # Read at once; then a piece of the long one before each token.
    assert produced == [["short"], *[[], ["short"]] * 6, [], ["long"]]


def test_short_prompts_that_keep_coming_leave_turns_to_the_others(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model(), prefill_tokens=8)
    engine.submit(request("writes", prompts=((5,),), max_new_tokens=40))
    engine.step()
    engine.submit(request("long", prompts=((7,) * 24,), max_new_tokens=1))
    for number in range(30):
        engine.submit(request(f"short {number}", prompts=((6,),), max_new_tokens=1))
    produced = [[event.request_id for event in engine.step()] for _ in range(40)]
    # Four of them, a piece of the long one, four of them, and what writes.
    assert [place for place, ids in enumerate(produced) if "writes" in ids][:3] == [8, 18, 28]
    assert produced.index(["long"]) == 14, "what is left of it is short"


def test_a_prefix_is_computed_once_for_those_who_ask_at_the_same_time(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = importlib.import_module("luthier.lm.engine")
    original, computed = module.compute_prefix, []

    def counting(model: Any, ids: Any, prefill_tokens: int) -> Any:
        computed.append(ids)
        return original(model, ids, prefill_tokens)

    model, prefix = tiny_model(), tuple(range(30, 60))
    alone, _ = run(Engine(model), request(shared_prefix=prefix))
    monkeypatch.setattr(module, "compute_prefix", counting)
    engine = Engine(model, prefill_tokens=4)
    together, _ = run(engine, *(request(name, shared_prefix=prefix) for name in "abc"))
    assert len(computed) == 1
    assert all(together[name, row] == alone["r", row] for name in "abc" for row in range(4))

    engine = Engine(model, prefill_tokens=4)
    for name in "abc":
        engine.submit(request(name, shared_prefix=prefix))
    for _ in range(3):
        engine.step()
    engine.cancel("a")
    left, _ = run(engine)
    assert len(computed) == 3, "whoever waited for one that has gone computes it"
    assert left["b", 0] == left["c", 0] == alone["r", 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [None, "a"])
def test_logits_in_company_have_the_bits_that_they_have_alone(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, adapter: str | None
) -> None:
    model = tiny_model().to(dtype)
    use_kernels(model)
    with_adapter(model, "a", 1)
    module: Any = importlib.import_module("luthier.lm.engine")
    original = module.forward_together
    seen: list[tuple[int, list[torch.Tensor]]] = []

    def noting(model: Any, passes: Any) -> Any:
        found = original(model, passes)
        seen.append((sum(len(one.ids) for one in passes), [logits.clone() for logits in found]))
        return found

    monkeypatch.setattr(module, "forward_together", noting)

    def asked(number: int) -> Any:
        prompts = PROMPTS[: number % 3 + 1]
        prefix = tuple(range(30, 33 + number)) if number % 2 else ()
        return request(
            str(number), prompts=prompts, shared_prefix=prefix, adapter=adapter, max_new_tokens=4 + number
        )

    run(Engine(model), *map(asked, range(9)))
    most = max(rows for rows, _ in seen)
    assert most == sum(number % 3 + 1 for number in range(9)), "all of them went on together"
    together = sorted(one.flatten().view(torch.int32).tolist() for _, found in seen for one in found)
    seen.clear()
    for number in range(9):
        run(Engine(model), asked(number))
    alone = sorted(one.flatten().view(torch.int32).tolist() for _, found in seen for one in found)
    assert together == alone


def test_what_fails_in_company_fails_alone_and_the_others_go_on(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    expected, _ = run(Engine(model), request("good"))
    module: Any = importlib.import_module("luthier.lm.engine")
    original = module.forward_together

    def full(model: Any, passes: Any) -> Any:
        found = original(model, passes)  # keys and values are held by then
        if any(one.cache.get_seq_length() > 12 for one in passes):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return found

    monkeypatch.setattr(module, "forward_together", full)
    engine = Engine(model)
    engine.submit(request("good", max_new_tokens=4))
    engine.submit(request("large", prompts=((7,) * 11,)))
    answers: dict[Any, Any] = {}
    while engine.wait(0):
        collect(engine.step(), answers, {})
    (failure,) = engine.take_failures().values()
    assert failure.reason == "OUT_OF_MEMORY"
    assert "1 at a time of up to 11 and 12 tokens do not" in failure.message
    for row in range(len(PROMPTS)):
        assert answers["good", row] == expected["good", row][:4]


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
    reading = Engine._reading

    def full(self: Engine, group: Any) -> Any:
        if group.request.request_id == "large":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        yield from reading(self, group)

    monkeypatch.setattr(Engine, "_reading", full)
    engine.submit(request("large", shared_prefix=(30, 31)))
    answers, _ = run(engine, request("small"))
    (failure,) = engine.take_failures().values()
    assert isinstance(failure, ResourceExhausted)
    assert failure.reason == "OUT_OF_MEMORY"
    assert "4 at a time of up to 10 and 12 tokens do not" in failure.message
    assert len(answers) == len(PROMPTS)
