"""Requests that are answered at the same time: whose turn it is, and that none notices the others."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.lm.engine_requests import PROMPTS, collect, request, run, with_adapter

from luthier.errors import ResourceExhausted
from luthier.kernels.tables import force_impl
from luthier.lm.blocks import use_kernels
from luthier.lm.decoding import Batch
from luthier.lm.engine import Engine
from luthier.lm.lora import remove_adapter

ModelMaker = Callable[..., Any]


def test_interactive_request_is_admitted_while_a_batch_runs(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model())
    engine.submit(request("batch", max_new_tokens=40))
    for _ in range(5):
        engine.step()
    engine.submit(request("chat", prompts=(PROMPTS[0],), max_new_tokens=3))
    order = [{event.request_id for event in engine.step()} for _ in range(4)]
    assert order == [{"batch", "chat"}, {"batch", "chat"}, {"batch", "chat"}, {"batch"}]


def test_a_short_prompt_is_read_before_many_rows_go_on(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model())
    engine.submit(request("batch", prompts=PROMPTS * 10, max_new_tokens=40))
    engine.step()
    order = []
    for number in range(7):
        engine.submit(request(f"chat {number}", prompts=(PROMPTS[0],), max_new_tokens=1))
        order.append({event.request_id for event in engine.step()})
    alone = [{f"chat {number}"} for number in range(7)]
    # Four times in a row, then beside the others.
    assert order == [*alone[:4], {"batch", "chat 4"}, *alone[5:]]


def test_where_torch_attends_a_prompt_is_read_by_itself_and_what_is_answered_goes_on_together(
    tiny_model: ModelMaker,
) -> None:
    model = tiny_model()
    seen: list[tuple[int, ...]] = []
    model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    engine = Engine(model)
    engine.submit(request("writes", prompts=(PROMPTS[0],)))
    force_impl("eager")
    try:
        engine.step()
        for number in (1, 3):
            engine.submit(request(f"reads {number}", prompts=(PROMPTS[number],)))
        seen.clear()
        produced = [sorted(event.request_id for event in engine.step()) for _ in range(3)]
    finally:
        force_impl("auto")
    assert seen == [(1, 1), (1, len(PROMPTS[3])), (3, 1)]
    assert produced == [["reads 1"], ["reads 3"], ["reads 1", "reads 3", "writes"]]


def test_where_prompts_are_read_alone_short_ones_that_keep_coming_leave_turns_to_all(
    tiny_model: ModelMaker,
) -> None:
    engine = Engine(tiny_model(), prefill_tokens=8)
    engine.submit(request("writes", prompts=((5,),), max_new_tokens=40))
    force_impl("eager")
    try:
        engine.step()
        engine.submit(request("long", prompts=((7,) * 24,), max_new_tokens=1))
        for number in range(20):
            engine.submit(request("short" + " " * number, prompts=((6,),), max_new_tokens=1))
        produced = ["".join(event.request_id for event in engine.step()).rstrip() for _ in range(12)]
    finally:
        force_impl("auto")
    assert produced == [*["short"] * 4, "writes", ""] * 2


def test_what_is_answered_goes_on_every_other_time_however_many_adapters_read(
    tiny_model: ModelMaker,
) -> None:
    model = tiny_model()
    for seed, name in enumerate("abc"):
        with_adapter(model, name, seed)
    engine = Engine(model, prefill_tokens=8)
    engine.submit(request("writes", prompts=((5,),), max_new_tokens=40))
    engine.step()
    for name in "abc":
        engine.submit(request(name, prompts=((7,) * 64,), adapter=name))
    produced = [[event.request_id for event in engine.step()] for _ in range(12)]
    assert produced == [["writes"], []] * 6


def test_what_short_prompts_leave_of_a_pass_is_no_turn_of_a_long_one(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model(), prefill_tokens=8)
    engine.submit(request("long", prompts=((7,) * 200,), max_new_tokens=1))
    for number in range(40):
        engine.submit(request(f"short {number}", prompts=((6,) * 5,), max_new_tokens=1))
    produced = [[event.request_id for event in engine.step()] for _ in range(20)]
    assert [place for place, ids in enumerate(produced) if not ids] == [4, 9, 14, 19]


def test_a_prompt_that_fails_leaves_together_what_is_answered(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = importlib.import_module("luthier.lm.engine")
    original, together = module.forward_together, []

    def full(model: Any, passes: Any) -> Any:
        together.append(len(passes))
        found = original(model, passes)  # keys and values are held by then
        if any(one.ids.shape[1] > 7 for one in passes):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return found

    model = tiny_model()
    wanted = [request(name, prompts=(PROMPTS[0],), max_new_tokens=6) for name in "ab"]
    alone, _ = run(Engine(model), *wanted)
    monkeypatch.setattr(module, "forward_together", full)
    engine = Engine(model)
    for one in wanted:
        engine.submit(one)
    answers: dict[Any, Any] = {}
    collect(engine.step(), answers, {})
    engine.submit(request("large", prompts=((7,) * 11,)))
    while engine.wait(0):
        collect(engine.step(), answers, {})
    assert answers == alone
    assert list(engine.take_failures()) == ["large"]
    # Both are read, all fail, those that are answered go on, the prompt fails, and they are never apart.
    assert together == [2, 3, 2, 1, 2, 2, 2, 2]


def test_long_prompts_are_computed_in_pieces_so_that_others_advance(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model(), prefill_tokens=8)
    engine.submit(request("long", prompts=((7,) * 64,), max_new_tokens=1))
    engine.submit(request("short", prompts=((5,),), max_new_tokens=7))
    produced = [[event.request_id for event in engine.step()] for _ in range(9)]
    # Read at once, and a piece of the long one beside each token: of 7 tokens, and then of 8.
    assert produced == [["short"]] * 7 + [[], ["long"]]


def test_short_prompts_that_keep_coming_leave_turns_to_the_others(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model(), prefill_tokens=8)
    engine.submit(request("writes", prompts=((5,),), max_new_tokens=40))
    engine.step()
    engine.submit(request("long", prompts=((7,) * 24,), max_new_tokens=1))
    for number in range(100):
        engine.submit(request(f"short {number}", prompts=((6,),), max_new_tokens=1))
    produced = [[event.request_id for event in engine.step()] for _ in range(15)]
    # All that fits four times, then a piece of the long one; what is left of it is short in the end, and the oldest.
    assert all("writes" in ids for ids in produced)
    assert [len(ids) for ids in produced] == [9] * 4 + [1] + [9] * 4 + [1] + [2] + [9] * 4
    assert "long" in produced[10]


def test_long_prompts_take_turns_and_are_read_beside_short_ones(tiny_model: ModelMaker) -> None:
    engine = Engine(tiny_model(), prefill_tokens=8)
    for name in ("first", "second"):
        engine.submit(request(name, prompts=((7,) * 24,), max_new_tokens=1))
    for number in range(200):
        engine.submit(request(f"short {number}", prompts=((6,),), max_new_tokens=1))
    produced = [[event.request_id for event in engine.step()] for _ in range(24)]
    # A piece behind four times all short ones that fit: first, second, first, second, which have one left then.
    assert [place for place, ids in enumerate(produced) if not ids] == [4, 9, 14, 19]
    assert [produced.index([name]) for name in ("first", "second")] == [15, 20]


def test_adapters_take_turns_whoever_keeps_asking(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    with_adapter(model, "a", 1)
    engine = Engine(model)
    engine.submit(request("base", prompts=((5,),), max_new_tokens=20))
    engine.step()
    seen: list[str] = []
    for number in range(12):
        engine.submit(request(f"a{number}", prompts=((6,),), max_new_tokens=3, adapter="a"))
        seen += [event.request_id for _ in range(2) for event in engine.step()]
    assert seen.count("base") >= 5


def test_whoever_reads_a_prefix_of_an_adapter_that_leaves_hears_of_it_in_the_next_step(
    tiny_model: ModelMaker,
) -> None:
    model = tiny_model()
    with_adapter(model, "a", 1)
    wanted = request("reads", shared_prefix=tuple(range(30, 60)), adapter="a")
    engine = Engine(model, prefill_tokens=4)
    engine.submit(wanted)
    engine.step()
    engine.forget_adapter("a")
    remove_adapter(model, "a")
    assert engine.wait(0), "who asked is told in a step alone"
    assert engine.step() == []
    assert list(engine.take_failures()) == ["reads"]
    assert not engine.wait(0)

    with_adapter(model, "a", 1)
    engine.submit(wanted)
    engine.step()
    engine.forget_adapter("a")
    remove_adapter(model, "a")
    with_adapter(model, "a", 2)
    anew, _ = run(engine)
    alone, _ = run(Engine(model, prefill_tokens=4), wanted)
    assert anew == alone, "nothing of the first adapter's is read on"


def test_whoever_has_not_read_begins_anew_when_its_adapter_leaves(tiny_model: ModelMaker) -> None:
    model, prefix = tiny_model(), tuple(range(30, 36))
    with_adapter(model, "a", 1)
    engine = Engine(model, prefill_tokens=8)
    run(engine, request("before", shared_prefix=prefix, adapter="a"))
    wanted = request("waits", prompts=((9,) * 30,), shared_prefix=prefix, adapter="a")
    engine.submit(request("reads", prompts=((7,) * 30,), shared_prefix=prefix, adapter="a"))
    engine.submit(wanted)
    engine.step()
    engine.cancel("reads")
    engine.forget_adapter("a")
    remove_adapter(model, "a")
    with_adapter(model, "a", 2)
    anew, _ = run(engine)
    alone, _ = run(Engine(model, prefill_tokens=8), wanted)
    assert anew["waits", 0] == alone["waits", 0]


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
@pytest.mark.parametrize(
    ("family", "adapter"), [("llama", None), ("llama", "a"), ("llama", "dora"), ("qwen3", None)]
)
def test_logits_in_company_have_the_bits_that_they_have_alone(
    tiny_model: ModelMaker,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    family: str,
    adapter: str | None,
) -> None:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1}
    model = tiny_model(family, **sizes, num_attention_heads=9, num_key_value_heads=3).to(dtype)
    use_kernels(model)
    if adapter is not None:
        with_adapter(model, adapter, 1, use_dora=adapter == "dora")
    rows: list[int] = []
    seen: dict[str, list[torch.Tensor]] = {}
    module: Any = importlib.import_module("luthier.lm.engine")
    together, take = module.forward_together, Batch.take

    def counting(model: Any, passes: Any) -> Any:
        rows.append(sum(len(one.ids) for one in passes))
        return together(model, passes)

    def noting(batch: Any, logits: torch.Tensor) -> Any:
        seen.setdefault(batch._request.request_id, []).append(logits.clone())
        return take(batch, logits)

    monkeypatch.setattr(module, "forward_together", counting)
    monkeypatch.setattr(Batch, "take", noting)

    def asked(number: int) -> Any:
        prompts = PROMPTS[:3] * (22 if number == 4 else 1) if number % 3 else PROMPTS[:1]
        prefix = tuple(range(30, 33 + number)) if number % 2 else ()
        return request(
            str(number), prompts=prompts, shared_prefix=prefix, adapter=adapter, max_new_tokens=4 + number
        )

    every = [asked(number) for number in range(7)]
    run(Engine(model), *every)
    assert max(rows) == sum(len(one.prompts) for one in every) > 64, "all of them went on together"
    in_company, seen = seen, {}
    for one in every:
        run(Engine(model), one)
    for one in every:
        pairs = zip(in_company[one.request_id], seen[one.request_id], strict=True)
        assert all(torch.equal(left, right) for left, right in pairs), one.request_id


def test_a_long_request_turns_no_keys_of_a_short_one(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0], "rope_theta": 10_000.0}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 16.0} | scaling
    model = tiny_model(rope_parameters=rope)
    use_kernels(model)
    seen: dict[str, list[torch.Tensor]] = {}
    take = Batch.take

    def noting(batch: Any, logits: torch.Tensor) -> Any:
        seen.setdefault(batch._request.request_id, []).append(logits.clone())
        return take(batch, logits)

    monkeypatch.setattr(Batch, "take", noting)
    short = request("short", prompts=((5, 9, 11),), max_new_tokens=8)
    long = request("long", prompts=((7,) * 40,))
    run(Engine(model), short, long)
    in_company, seen = seen, {}
    for one in (long, short):
        run(Engine(model), one)
    for name, logits in seen.items():
        assert all(map(torch.equal, in_company[name], logits)), name


def test_what_fails_in_company_fails_alone_and_the_others_go_on(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    expected, _ = run(Engine(model), request("good"))
    module: Any = importlib.import_module("luthier.lm.engine")
    original, together = module.forward_together, []

    def full(model: Any, passes: Any) -> Any:
        together.append(len(passes))
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
    assert isinstance(failure, ResourceExhausted)
    assert failure.reason == "OUT_OF_MEMORY"
    assert "1 at a time of up to 11 and 12 tokens do not" in failure.message
    assert together.count(2) == 3, "they are read together, and who failed together goes on alone"
    for row in range(len(PROMPTS)):
        assert answers["good", row] == expected["good", row][:4]
