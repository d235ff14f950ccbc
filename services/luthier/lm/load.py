"""Load a registered model: plain safetensors in transformers' layout, of an architecture that we compute."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from luthier.errors import InvalidArgument, NotFound, Reason
from luthier.lm.attention import IMPLEMENTATION
from luthier.lm.blocks import use_kernels

ARCHITECTURES = (
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
)
"""Classes whose forward is: embed, blocks of rotary attention and gated MLP, norm, vocabulary matmul."""


def load_model(directory: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Load a model for training adapters or generating: eval mode, frozen, with our attention.

    Files are memory-mapped; nothing but safetensors and JSON is read, and no code that comes with a model
    runs.

    Raises:
        NotFound: there is no `config.json`.
        InvalidArgument: the architecture is not one of ours, or the weights are not exactly the model's
            (reason MODEL_INVALID).
    """
    check_config(read_config(directory))
    model = load_weights(directory, dtype=dtype, attn_implementation=IMPLEMENTATION)
    model.requires_grad_(requires_grad=False)
    use_kernels(model)
    return model


def load_weights(directory: Path, **options: Any) -> PreTrainedModel:
    """`from_pretrained` without its leniencies: no download, no foreign code, no pickle, no random weight.

    Raises:
        InvalidArgument: a file cannot be read, or weights are missing, left over or of a wrong shape
            (reason MODEL_INVALID).
    """
    # A worker's standard error is its log.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            # Reported below with its name, instead of raised without.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # Parsers of foreign files fail with whatever they stumble over: struct.error, KeyError, RuntimeError.
    except Exception as error:
        raise InvalidArgument(
            f"the model's files must be readable by transformers, got {type(error).__name__}: {error}",
            reason=Reason.MODEL_INVALID,
        ) from error
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, report[kind])):
            raise InvalidArgument(
                f"the weights must be exactly those of {type(model).__name__}, got {len(keys)} "
                f"{kind.replace('_', ' ')}, the first is {keys[0]}",
                reason=Reason.MODEL_INVALID,
            )
    assert isinstance(model, PreTrainedModel)
    return model


def read_config(directory: Path) -> dict[str, Any]:
    """The contents of `config.json`.

    Raises:
        NotFound: the file is missing.
        InvalidArgument: it is not a JSON object (reason MODEL_INVALID).
    """
    path = directory / "config.json"
    if not path.is_file():
        raise NotFound(f"a model directory must hold config.json, there is none in {directory.name}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidArgument(
            f"config.json must be JSON, got {error}", reason=Reason.MODEL_INVALID
        ) from error
    if not isinstance(config, dict):
        raise InvalidArgument(
            f"config.json must hold an object, got {type(config).__name__}", reason=Reason.MODEL_INVALID
        )
    return config


def check_config(config: dict[str, Any]) -> None:
    """Refuse what we do not compute or must not run.

    Raises:
        InvalidArgument: another architecture or quantised weights (reason MODEL_INVALID), or code of its own
            (`auto_map`, reason UNSAFE_MODEL_FILE).
    """
    if "auto_map" in config:
        raise InvalidArgument(
            f"a model must not bring code of its own, config.json has auto_map={config['auto_map']}",
            reason=Reason.UNSAFE_MODEL_FILE,
        )
    if "quantization_config" in config:
        raise InvalidArgument(
            "a model directory must hold plain weights, config.json has quantization_config",
            reason=Reason.MODEL_INVALID,
        )
    architectures = config.get("architectures") or []
    if len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        raise InvalidArgument(
            f"the architecture must be one of {', '.join(ARCHITECTURES)}, got {architectures}",
            reason=Reason.MODEL_INVALID,
        )
