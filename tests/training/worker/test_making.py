"""Merges and exports by a worker of a real Training service: from an adapter to files that others load."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.lm.made_models import TEMPLATE
from tests.lm.made_models import model_folder as bpe_folder
from tests.training.worker.conftest import PARENT, Site, job_of
from tests.training.worker.test_weights import downloaded, ended, full_job, going_on
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from luthier.errors import Reason
from luthier.errors.status import status_to_failure
from luthier.lm.adapter_files import load_adapter
from luthier.lm.load import load_model
from luthier.lm.lora import use_adapter
from luthier.lm.lora_layer import LoraLinear
from luthier.v1 import model_pb2, model_service_pb2
from luthier.v1.base_precision_pb2 import BASE_PRECISION_NF4
from luthier.v1.fine_tuning_job_pb2 import LoraConfig
from luthier.v1.model_pb2 import EXPORT_FORMAT_GGUF_F16, EXPORT_FORMAT_GGUF_Q8_0, Model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
IDS = torch.tensor([[5, 9, 11, 40, 3, 17, 60, 2]])


@pytest.fixture(autouse=True)
def few_scored() -> None:
    """Score as many held-out tokens as a real job."""


@pytest.fixture
async def worked(
    site: Site, tmp_path: Path, tiny_llama: Callable[..., PreTrainedModel]
) -> AsyncIterator[Site]:
    """The site with a worker, a base model whose tokenizer GGUF can hold, and an adapter `one` on it."""
    folder = bpe_folder(tiny_llama(vocab_size=270), tmp_path / "home" / "models" / "bpe")
    async with site.worker():
        base = await site.register(folder)
        assert base.state == Model.STATE_READY, base.error
        site.data.tokenizer_digest = base.tokenizer_digest
        site.data.chat_template = TEMPLATE
        await ended(site, "one", lora_job())
        yield site


@pytest.fixture
def words_folder(model_folder: Path) -> Path:
    """A model whose tokenizer knows words alone."""
    return model_folder


def lora_job(**changes: Any) -> Any:
    job = job_of(learning_rate=2e-2)
    job.lora.CopyFrom(LoraConfig(**{"rank": 4, "target_modules": ["q_proj", "down_proj"], **changes}))
    return job


async def export(site: Site, name: str, model_id: str, form: Any = EXPORT_FORMAT_GGUF_F16) -> model_pb2.Model:
    request = model_service_pb2.ExportModelRequest(name=name, model_id=model_id, format=form)
    return await site.made((await site.models.ExportModel(request, metadata=site.metadata)).name)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


async def test_a_merged_model_computes_what_its_adapter_does_and_is_a_base_for_more(
    worked: Site, tmp_path: Path
) -> None:
    merged = await worked.merge(f"{PARENT}/models/one", "merged")
    assert merged.state == Model.STATE_READY, merged.error
    assert merged.check.effect > 3 * merged.check.difference
    base, adapter, whole = [
        await downloaded(worked, f"{PARENT}/models/{name}", tmp_path / name)
        for name in ("tiny", "one", "merged")
    ]
    with_adapter = logits(PeftModel.from_pretrained(loaded(base), str(adapter)))
    distance = (logits(loaded(whole)) - with_adapter).norm() / (logits(loaded(base)) - with_adapter).norm()
    assert distance < 0.3
    assert AutoTokenizer.from_pretrained(whole).encode("the end") == AutoTokenizer.from_pretrained(
        base
    ).encode("the end")
    generation = "generation_config.json"
    assert (whole / generation).read_bytes() == (base / generation).read_bytes(), "it was taught no other end"
    # All that a base is good for: an adapter on it, all weights from it, and that again merged.
    on_top = await ended(worked, "two", going_on(merged.name))
    assert on_top.base_model == merged.name
    again = await worked.merge(on_top.tuned_model, "again")
    assert again.state == Model.STATE_READY, again.error
    further = full_job()
    further.base_model = again.name
    assert (await ended(worked, "three", further)).tuned_model


async def test_an_adapter_that_was_trained_beside_four_bits_is_merged_as_it_was_trained(
    worked: Site, tmp_path: Path
) -> None:
    job = lora_job()
    job.base_precision = BASE_PRECISION_NF4
    await ended(worked, "four", job)
    merged = await worked.merge(f"{PARENT}/models/four", "merged")
    assert merged.state == Model.STATE_READY, merged.error
    assert merged.check.base_precision == BASE_PRECISION_NF4
    assert merged.check.base_difference > 0.01
    assert any("was trained beside a base in NF4" in warning for warning in merged.warnings)
    base, adapter, whole = [
        await downloaded(worked, f"{PARENT}/models/{name}", tmp_path / name)
        for name in ("tiny", "four", "merged")
    ]
    as_trained = load_model(base, precision="NF4")
    load_adapter(as_trained, adapter, "four")
    with use_adapter(as_trained, "four"):
        expected = logits(as_trained).float()
    on_other_numbers = logits(PeftModel.from_pretrained(loaded(base), str(adapter)))
    assert (logits(loaded(whole)) - expected).norm() < 0.5 * (on_other_numbers - expected).norm()
    file = await export(worked, f"{PARENT}/models/four", "file")
    assert file.check.base_precision == BASE_PRECISION_NF4
    assert file.check.base_difference == pytest.approx(merged.check.base_difference)


async def test_a_checkpoint_and_an_adapter_gone_on_with_are_merged(worked: Site) -> None:
    checkpoint = (await worked.checkpoints(f"{PARENT}/fineTuningJobs/one"))[0].name
    merged = await worked.merge(checkpoint, "halfway")
    assert (merged.state, merged.start_from) == (Model.STATE_READY, checkpoint)
    chain = await ended(worked, "two", going_on(f"{PARENT}/models/one", learning_rate=1e-3, max_steps=3))
    last = await worked.merge(chain.tuned_model, "last")
    assert (last.state, last.start_from) == (Model.STATE_READY, chain.tuned_model)


async def test_an_export_is_downloaded_and_registers_again(worked: Site, tmp_path: Path) -> None:
    for form, name in (
        (EXPORT_FORMAT_GGUF_F16, "model-f16.gguf"),
        (EXPORT_FORMAT_GGUF_Q8_0, "model-q8_0.gguf"),
    ):
        made = await export(worked, f"{PARENT}/models/one", name[6:-5].replace("_", "-"), form)
        assert made.state == Model.STATE_READY, made.error
        assert made.check.num_greedy_tokens == 64
        if form == EXPORT_FORMAT_GGUF_F16:
            assert made.check.num_equal_greedy_tokens == 64
        folder = await downloaded(worked, made.name, tmp_path / "home" / "models" / name)
        assert [path.name for path in folder.iterdir()] == [name]
        source = model_pb2.Model(gguf_path=str(folder / name))
        again = await worked.register_from(source, f"again-{name[6:-5].replace('_', '-')}")
        assert again.state == Model.STATE_READY, again.error
        assert again.has_chat_template
    whole = await downloaded(worked, (await worked.merge(f"{PARENT}/models/one", "m")).name, tmp_path / "m")
    back = await downloaded(worked, f"{PARENT}/models/again-f16", tmp_path / "back")
    assert torch.equal(logits(loaded(whole)).argmax(-1), logits(loaded(back)).argmax(-1))


async def test_a_tokenizer_that_gguf_has_no_place_for_fails_the_export(
    site: Site,
    words_folder: Path,
) -> None:
    async with site.worker():
        base = await site.register(words_folder)
        made = await export(site, base.name, "new")
    assert made.state == Model.STATE_FAILED
    failure = status_to_failure(made.error)
    assert failure.reason == Reason.EXPORT_NOT_POSSIBLE
    assert "the tokenizer must be a byte-level BPE, got WordLevel" in failure.message


async def test_a_merge_that_computes_something_else_is_not_published(
    worked: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LoraLinear.merged_weight
    monkeypatch.setattr(LoraLinear, "merged_weight", lambda layer, name: 1.05 * right(layer, name))
    made = await worked.merge(f"{PARENT}/models/one", "wrong")
    assert made.state == Model.STATE_FAILED
    assert status_to_failure(made.error).reason == Reason.WEIGHTS_DIFFER
    assert not made.digest


async def test_the_same_request_merges_once(worked: Site) -> None:
    request = model_service_pb2.MergeModelRequest(
        name=f"{PARENT}/models/one", request_id="7c5a2f6e-59ab-4c3b-9f3c-52c3f18f1f10"
    )
    first, second = [await worked.models.MergeModel(request, metadata=worked.metadata) for _ in range(2)]
    assert first.name == second.name
    listed = await worked.models.ListModels(
        model_service_pb2.ListModelsRequest(parent=PARENT, filter='kind = "WEIGHTS"'),
        metadata=worked.metadata,
    )
    assert [model.name for model in listed.models] == [first.name]


async def test_the_same_held_out_tokens_are_scored_by_every_engine(worked: Site, tmp_path: Path) -> None:
    job = await worked.ended(f"{PARENT}/fineTuningJobs/one")
    held_out = job.run_record.held_out
    assert held_out.step == job.progress.completed
    trained = [value for row in held_out.rows for value in row.trainer_logprobs]
    sampled = [value for row in held_out.rows for value in row.sampler_logprobs]
    assert len(trained) == len(sampled) == 64
    assert 0 < held_out.mean_difference < 0.05
    validation = {row.input_ids for row in worked.data.rows if row.split == "VALIDATION"}
    assert all(tuple(row.token_ids) in validation for row in held_out.rows)
    base, adapter = [
        await downloaded(worked, f"{PARENT}/models/{name}", tmp_path / name) for name in ("tiny", "one")
    ]
    model: Any = PeftModel.from_pretrained(loaded(base), str(adapter))
    expected = []
    with torch.no_grad():
        for row in held_out.rows:
            logprobs = model(torch.tensor([list(row.token_ids)])).logits[0].log_softmax(-1)
            expected += [float(logprobs[place - 1, row.token_ids[place]]) for place in row.positions]
    assert trained == pytest.approx(expected, abs=0.2)
    for made in (
        await worked.merge(f"{PARENT}/models/one", "m"),
        await export(worked, f"{PARENT}/models/one", "e"),
    ):
        assert made.state == Model.STATE_READY, made.error
        assert list(made.check.held_out_logprobs) == pytest.approx(expected, abs=0.1)
        assert 0 < made.check.held_out_difference < 0.05
    # Of another step than the one that was scored nothing is compared.
    checkpoint = (await worked.checkpoints(job.name))[0]
    assert checkpoint.step != held_out.step
    assert not (await worked.merge(checkpoint.name, "earlier")).check.held_out_logprobs
