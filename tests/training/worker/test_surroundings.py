"""The record of a run says which attention runs on the model's device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import luthier.kernels.gpu
from luthier.kernels.attention_varlen import gpu
from luthier.kernels.dispatch import force_isa
from luthier.kernels.tables import force_impl
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
    record = run_record(task_pb2.TrainSpec(), model, bitwise=True)
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
    record = run_record(task_pb2.TrainSpec(), llama().bfloat16(), bitwise=True)
    assert record.device == "NVIDIA H100 (sm_90)"
    assert record.kernels["rms_norm/bfloat16/few_rows"] == "triton"
    assert "cpu" not in record.kernels.values()
    assert record.determinism == fine_tuning_job_pb2.DETERMINISM_BEST_EFFORT
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=64, attn_logit_softcapping=50.0)).bfloat16()
    assert attention_of(capped) == "FlexAttention"
