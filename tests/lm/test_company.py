"""Requests that are answered at the same time: whose turn it is, and that none notices the others."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.lm.engine_requests import PROMPTS, collect, request, run, with_adapter

from luthier.errors import ResourceExhausted
from luthier.lm.blocks import use_kernels
from luthier.lm.engine import Engine

ModelMaker = Callable[..., Any]


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
    assert isinstance(failure, ResourceExhausted)
    assert failure.reason == "OUT_OF_MEMORY"
    assert "1 at a time of up to 11 and 12 tokens do not" in failure.message
    for row in range(len(PROMPTS)):
        assert answers["good", row] == expected["good", row][:4]
