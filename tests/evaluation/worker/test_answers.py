"""Interactive answers from a real worker: what is said, and that nobody's leaving holds anything up."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.evaluation.conftest import Site
from tests.evaluation.peer_servers import thing
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from luthier.errors import FailedPrecondition, InvalidArgument, Reason, ResourceExhausted, Unavailable
from luthier.evaluation.worker.answers import SLOTS
from luthier.evaluation.worker.room import Room
from luthier.lm import engine as engine_module
from luthier.lm.adapter_files import WEIGHTS_NAME
from luthier.lm.engine import Engine
from luthier.lm.generate import GenerationRequest
from luthier.lm.load import load_model
from luthier.text.rendering import Renderer
from luthier.text.tokenizer import TokenizerBundle
from luthier.v1 import chat_pb2, evaluation_pb2, evaluation_service_pb2, model_pb2
from luthier.work.peers import bearer

OWN = (
    "{{ strftime_now('%d %b %Y') }}{% for message in messages %}[{{ message.role }}] {{ message.content }}"
    "<|endoftext|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDED = (evaluation_pb2.FINISH_REASON_STOP, evaluation_pb2.FINISH_REASON_LENGTH)


def request(site: Any, model: str = "base", **fields: Any) -> evaluation_service_pb2.GenerateTextRequest:
    return evaluation_service_pb2.GenerateTextRequest(model=f"{site.PARENT}/models/{model}", **fields)


async def begun(site: Any, wanted: evaluation_service_pb2.GenerateTextRequest) -> Any:
    """A call whose first piece has come."""
    call = site.stub.GenerateText(wanted, metadata=bearer(site.keys.api_key))
    assert await call.read() != grpc.aio.EOF
    return call


@asynccontextmanager
async def running_site(home: Path, folders: dict[str, Path]) -> AsyncIterator[Site]:
    """A service with models of the test's own."""
    site = Site(home, folders)
    await site.start()
    try:
        yield site
    finally:
        await site.stop()


def greedy_tokens(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    engine = Engine(model)
    engine.submit(GenerationRequest(request_id="greedy", prompts=(tuple(prompt),), max_new_tokens=count))
    said: list[int] = []
    while engine.wait(0):
        said += [token for event in engine.step() for token in event.token_ids]
    return said


async def drain(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def until_handed_out(site: Site, orders: int) -> None:
    """Wait until workers have so many orders."""
    async with asyncio.timeout(8):
        while sum(len(taker.active) for taker in site._exchange._takers) < orders:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_conversation_is_answered_and_the_last_piece_says_how_it_ended(site: Any) -> None:
    asked = request(site, max_new_tokens=8)
    asked.conversation.messages.append(chat_pb2.ChatMessage(role="user", content="what colour"))
    async with site.worker():
        pieces = [piece async for piece in site.stream("GenerateText", asked)]
    assert pieces[-1].finish_reason in ENDED
    assert not any(piece.finish_reason for piece in pieces[:-1])
    assert pieces[-1].num_generated_tokens <= 8
    assert pieces[-1].num_prompt_tokens > len(["what", "colour"])


async def test_adapters_and_seeds_and_bases_change_what_is_said(site: Any) -> None:
    async with site.worker():
        models = ("base", "tuned", "other", "base")
        greedy = [await site.said(model, "what colour", max_new_tokens=16) for model in models]
        drawn = [
            await site.said("base", "what", max_new_tokens=16, temperature=1.5, seed=seed)
            for seed in (1, 2, 1)
        ]
    assert greedy[0] == greedy[3], "a base that was taken out of memory and back says the same"
    assert len(set(greedy)) == 3
    assert drawn[0] == drawn[2] != drawn[1]
    assert list((site.home / "laid-out").iterdir()) == []


async def test_a_prompt_that_is_too_long_is_the_callers_fault(site: Any) -> None:
    async with site.worker():
        with pytest.raises(InvalidArgument, match="context of 1024 tokens") as caught:
            await site.said("base", "colour " * 1100)
        assert caught.value.reason == Reason.SEQUENCE_TOO_LONG
        wanted = request(site)
        wanted.conversation.messages.append(chat_pb2.ChatMessage(role="user", content="q"))
        wanted.conversation.tools_json = "{}"
        with pytest.raises(InvalidArgument, match=r"tools_json must be a JSON array, got '\{\}'"):
            await anext(site.stream("GenerateText", wanted))
        await site.said("base", "what", max_new_tokens=2)  # the worker goes on


async def test_callers_that_go_free_their_slots(site: Any) -> None:
    async with site.worker():
        for _ in range(2 * SLOTS):
            (await begun(site, request(site, prompt="what", max_new_tokens=900, temperature=2.0))).cancel()
        began = time.monotonic()
        await site.said("base", "what", max_new_tokens=2)
        assert time.monotonic() - began < 5


async def test_callers_that_give_up_waiting_for_another_base_free_their_slots(site: Any) -> None:
    async with site.worker():
        made = await site.evaluate(
            arms=[(f"arm-{number}", "base", 0) for number in range(16)], max_new_tokens=900
        )
        await site.until_running(made.name)
        waiting = [
            site.stub.GenerateText(request(site, "other", prompt="what"), metadata=bearer(site.keys.api_key))
            for _ in range(SLOTS)
        ]
        await asyncio.sleep(0.5)
        for call in waiting:
            call.cancel()
        async with asyncio.timeout(10):
            await site.said("base", "what", max_new_tokens=2)
        assert (await site.get(made.name)).state == evaluation_pb2.Evaluation.STATE_RUNNING


async def test_orders_for_another_base_leave_slots_to_those_for_the_loaded_one(site: Any) -> None:
    async with site.worker():
        made = await site.evaluate(
            arms=[(f"arm-{number}", "base", 0) for number in range(16)], max_new_tokens=900
        )
        await site.until_running(made.name)
        others = [asyncio.create_task(site.said("other", "what", max_new_tokens=2)) for _ in range(2 * SLOTS)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(10):
            await site.said("base", "what", max_new_tokens=2)
            refused = await asyncio.gather(*others, return_exceptions=True)
        assert (await site.get(made.name)).state == evaluation_pb2.Evaluation.STATE_RUNNING
    for error in refused:
        assert isinstance(error, ResourceExhausted), error
        assert (error.reason, error.retry_after_seconds) == (Reason.OVERLOADED, 5.0)


async def test_four_calls_of_a_model_whose_own_template_never_ends_hold_up_no_other_and_no_stop(
    tmp_path: Path, model_folders: dict[str, Path]
) -> None:
    endless = tmp_path / "endless"
    shutil.copytree(model_folders["base"], endless)
    (endless / "chat_template.jinja").write_text(LOOPS)
    roomy = Room(fits=lambda needed_bytes, held_bytes: True, is_short=lambda: False)
    async with running_site(tmp_path / "home", {**model_folders, "endless": endless}) as site:
        asked = request(site, "endless", max_new_tokens=2)
        asked.conversation.messages.add(role="user", content="what colour")
        async with site.worker(room=roomy):
            for model in ("other", "tuned"):
                await site.said(model, "what", max_new_tokens=2)  # which loads it
            calls = [site.stub.GenerateText(asked, metadata=bearer(site.keys.api_key)) for _ in range(SLOTS)]
            hanging = [asyncio.create_task(drain(call)) for call in calls]
            await until_handed_out(site, SLOTS - 1)
            await asyncio.sleep(1)  # by which their prompts are being made
            for model in ("other", "tuned", "base"):
                await asyncio.wait_for(site.said(model, "what", max_new_tokens=2), 8)
            assert not any(call.done() for call in calls), "they are answered while the prompts are made"
            began = time.monotonic()
        assert time.monotonic() - began < 5
        await asyncio.wait(hanging)
    assert [await call.code() for call in calls] == [grpc.StatusCode.UNAVAILABLE] * SLOTS
    assert all(isinstance(one.exception(), grpc.aio.AioRpcError) for one in hanging)


async def test_a_worker_that_stops_does_not_finish_long_answers_first(site: Any) -> None:
    async with site.worker():
        call = await begun(site, request(site, prompt="what", max_new_tokens=1000, temperature=2.0))
        began = time.monotonic()
    assert time.monotonic() - began < 5
    with pytest.raises(grpc.aio.AioRpcError, match="the worker went away"):
        await drain(call)
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(Unavailable, match="no evaluation worker takes orders"):
        await site.said("base", "what")


async def test_every_end_of_sequence_of_the_model_ends_an_answer(
    tmp_path: Path, model_folders: dict[str, Path]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folders["base"], base)
    prompt = TokenizerBundle.load(base).encode("what colour").ids
    model = load_model(base)
    said = greedy_tokens(model, prompt, 8)
    ending = next(token for token in said[1:] if token != said[0])
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [2, ending]}))
    async with running_site(tmp_path / "home", {**model_folders, "base": base}) as site, site.worker():
        wanted = request(site, prompt="what colour", max_new_tokens=8)
        pieces = [piece async for piece in site.stream("GenerateText", wanted)]
    assert pieces[-1].finish_reason == evaluation_pb2.FINISH_REASON_STOP
    assert pieces[-1].num_generated_tokens == said.index(ending)


async def test_what_the_resources_show_is_what_ends_an_answer(
    tmp_path: Path, model_folders: dict[str, Path]
) -> None:
    """Files, base model and tuned model name other tokens each; those of the files end nothing."""
    base = tmp_path / "base"
    shutil.copytree(model_folders["base"], base)
    prompt = TokenizerBundle.load(base).encode("what colour").ids
    said = greedy_tokens(load_model(base), prompt, 12)
    fresh = [token for place, token in enumerate(said) if token not in said[:place]]
    first, second, third = fresh[1:4]
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(settings | {"eos_token_id": first}))
    async with running_site(tmp_path / "home", {**model_folders, "base": base}) as site, site.worker():

        async def num_generated(model: str) -> int:
            wanted = request(site, model, prompt="what colour", max_new_tokens=12)
            pieces = [piece async for piece in site.stream("GenerateText", wanted)]
            assert pieces[-1].finish_reason == evaluation_pb2.FINISH_REASON_STOP
            return int(pieces[-1].num_generated_tokens)

        assert await num_generated("base") == said.index(first)  # registered before its resource said any
        site.models.eos_token_ids["base"] = [2, third]
        assert await num_generated("base") == said.index(third)
        site.models.eos_token_ids["base"] = [2, third, second]
        assert await num_generated("base") == said.index(second)


async def test_a_raw_prompt_begins_as_the_tokenizer_says(
    tmp_path: Path, model_folders: dict[str, Path]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folders["base"], base)
    core = Tokenizer.from_file(str(base / "tokenizer.json"))
    core.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    core.save(str(base / "tokenizer.json"))
    asked = AutoTokenizer.from_pretrained(base)("what colour")["input_ids"]
    assert asked[0] == 0
    async with running_site(tmp_path / "home", {**model_folders, "base": base}) as site, site.worker():
        wanted = request(site, prompt="what colour", max_new_tokens=8)
        pieces = [piece async for piece in site.stream("GenerateText", wanted)]
    assert pieces[-1].num_prompt_tokens == len(asked)
    bundle = TokenizerBundle.load(base)
    ids = greedy_tokens(load_model(base), tuple(asked), pieces[-1].num_generated_tokens)
    assert "".join(piece.text for piece in pieces) == bundle.decode(ids)


async def test_a_tuned_model_is_asked_with_the_ids_of_the_rows_that_taught_it(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = TokenizerBundle.load(site.models.folders["base"])
    taught = Renderer(bundle, today=date(2026, 3, 9), template=OWN)
    site.models.taught["tuned"] = model_pb2.Taught(
        chat_template=taught.effective_template, template_date="2026-03-09"
    )
    submit, asked = Engine.submit, []

    def noted(engine: Engine, wanted: GenerationRequest) -> None:
        asked.append(wanted.prompts)
        submit(engine, wanted)

    monkeypatch.setattr(Engine, "submit", noted)
    async with site.worker():
        for model in ("tuned", "base"):
            wanted = request(site, model, max_new_tokens=2)
            wanted.conversation.messages.add(role="user", content=thing(0).messages[0].content)
            _ = [piece async for piece in site.stream("GenerateText", wanted)]
    row = taught.render(thing(0))
    first_learnt = row.loss_mask.index(True)
    own = Renderer(bundle, today=date(2026, 3, 9)).prompt(thing(0))
    assert asked == [(row.input_ids[:first_learnt],), (own,)]
    assert row.input_ids[:first_learnt] != own


async def test_an_adapter_that_gives_no_numbers_gives_no_text(
    tmp_path: Path, model_folders: dict[str, Path]
) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(model_folders["tuned"], tuned)
    weights = load_file(tuned / WEIGHTS_NAME)
    save_file(
        {name: torch.full_like(tensor, float("nan")) for name, tensor in weights.items()},
        tuned / WEIGHTS_NAME,
    )
    async with running_site(tmp_path / "home", {**model_folders, "tuned": tuned}) as site, site.worker():
        with pytest.raises(FailedPrecondition, match="logits must be finite numbers") as caught:
            await site.said("tuned", "what colour", max_new_tokens=4)
        assert caught.value.reason == Reason.OUTPUT_NOT_FINITE
        await site.said("base", "what", max_new_tokens=2)  # the worker goes on


async def test_what_is_too_large_for_the_memory_is_said_so_and_not_to_be_tried_again(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's process goes on: another call is answered, this one would fail again."""

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    async with site.worker():
        await site.said("base", "what", max_new_tokens=2)
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "Batch", full)
            with pytest.raises(ResourceExhausted, match="ask for fewer or shorter ones") as caught:
                await site.said("base", "what", max_new_tokens=2)
        assert (caught.value.reason, caught.value.retry_after_seconds) == (Reason.OUT_OF_MEMORY, None)
        await site.said("base", "what", max_new_tokens=2)
