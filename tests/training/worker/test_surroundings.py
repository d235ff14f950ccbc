"""The record of a run says which attention runs on the model's device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import luthier.kernels.gpu
from luthier.kernels.attention_varlen import gpu
from luthier.kernels.dispatch import force_isa
from luthier.kernels.tables import force_impl
from luthier.training.recipes.checkpoint import CHANGED_EARLIER
from luthier.training.worker.determinism import best_effort_reason, demand_determinism
from luthier.training.worker.surroundings import run_record, surroundings
from luthier.v1 import fine_tuning_job_pb2
from luthier.worker.v1 import task_pb2

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama() -> PreTrainedModel:
    """A small model in float32."""
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def attention_of(model: PreTrainedModel) -> str:
    record = run_record(task_pb2.TrainSpec(), model)
    assert record.kernels["attention"] == surroundings(model)["attention"]
    return record.kernels["attention"]


def test_run_record_says_which_attention_runs_on_a_processor() -> None:
    force_isa("plain")
    try:
        assert attention_of(llama()) == "eager"
        assert attention_of(llama().bfloat16()) == "C++"
        force_impl("eager")
        assert attention_of(llama().bfloat16()) == "eager"
    finally:
        force_isa(None)
        force_impl("auto")


def test_run_record_says_which_attention_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "device", torch.device("cuda", 0))
    monkeypatch.setattr(gpu, "flash_attn_function", lambda: "is not installed")
    monkeypatch.setattr(gpu, "has_torch_flash", lambda: True)
    monkeypatch.setattr(gpu, "has_triton", lambda: True)
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setattr(luthier.kernels.gpu, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert attention_of(llama().bfloat16()) == "torch varlen"
    record = run_record(task_pb2.TrainSpec(), llama().bfloat16())
    assert record.device == "NVIDIA H100 (sm_90)"
    assert record.kernels["rms_norm/bfloat16/few_rows"] == "triton"
    assert "cpu" not in record.kernels.values()
    assert record.determinism == fine_tuning_job_pb2.DETERMINISM_BEST_EFFORT
    assert record.best_effort_reason == "torch was not asked for deterministic algorithms"
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=64, attn_logit_softcapping=50.0)).bfloat16()
    assert attention_of(capped) == "FlexAttention"


@pytest.fixture
def deterministic() -> Iterator[None]:
    demand_determinism(torch.device("cuda", 0))
    yield
    torch.use_deterministic_algorithms(mode=False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    ("libraries", "hip", "reason"),
    [
        (["flash-attn"], None, ""),
        (["torch varlen"], None, ""),
        ([], None, ""),
        (
            ["FlexAttention"],
            None,
            "the backward pass of attention by FlexAttention is not known to add in one order",
        ),
        (["flash-attn"], "7.0", "whether ROCm's kernels give the same bits in every run was never measured"),
    ],
)
def test_best_effort_reason_is_that_of_the_attention_that_a_gpu_takes(
    monkeypatch: pytest.MonkeyPatch, libraries: list[str], hip: str | None, reason: str
) -> None:
    monkeypatch.setattr(PreTrainedModel, "device", torch.device("cuda", 0))
    here = "flash-attn" in libraries
    monkeypatch.setattr(gpu, "flash_attn_function", lambda: len if here else "is not installed")
    monkeypatch.setattr(gpu, "has_torch_flash", lambda: "torch varlen" in libraries)
    monkeypatch.setattr(gpu, "has_triton", lambda: "FlexAttention" in libraries)
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", hip)
    assert best_effort_reason(llama().bfloat16()) == reason


def test_determinism_is_demanded_of_a_gpu_alone_and_fills_no_memory() -> None:
    demand_determinism(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    demand_determinism(torch.device("cuda", 0))
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        filling: Any = torch.utils.deterministic
        assert filling.fill_uninitialized_memory is False
    finally:
        torch.use_deterministic_algorithms(mode=False)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ([], ""),
        (["isa", "torch_version"], "isa, torch_version changed since the run began"),
        ([CHANGED_EARLIER], "something changed since the run began"),
    ],
)
def test_run_record_says_what_changed_around_a_run(changed: list[str], reason: str) -> None:
    record = run_record(task_pb2.TrainSpec(), llama(), changed=changed)
    assert record.best_effort_reason == reason
    promised = (
        fine_tuning_job_pb2.DETERMINISM_BEST_EFFORT if reason else fine_tuning_job_pb2.DETERMINISM_BITWISE
    )
    assert record.determinism == promised
