"""Load a registered model: plain safetensors in transformers' layout, of an architecture that we compute."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from luthier.errors import InvalidArgument, Reason
from luthier.lm.attention import IMPLEMENTATION
from luthier.lm.blocks import use_kernels
from luthier.lm.model_config import check_config, read_config

_MAX_WORDS = 300


def load_model(
    directory: Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a model for training or generating onto a device: eval mode, frozen, with our attention.

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
    placed: Any = model
    placed.to(device)
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
            f"the model's files must be readable by transformers, got {type(error).__name__}: "
            f"{_words(error, directory)}",
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


def _words(error: Exception, directory: Path) -> str:
    """What an error says, on one line, without the folder that only the worker knows."""
    text = str(error).replace(f"{directory}/", "").replace(str(directory), "its folder")
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:_MAX_WORDS]


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Each token that ends a text of the model, by `config.json` and `generation_config.json`, one or several each.

    Raises:
        InvalidArgument: one of them is no token id (reason MODEL_INVALID).
    """
    declared = [getattr(model.config, "eos_token_id", None)]
    if model.generation_config is not None:
        declared.append(model.generation_config.eos_token_id)
    found: set[int] = set()
    for ids in declared:
        found.update(
            _token_id(token)
            for token in (ids if isinstance(ids, list | tuple) else (ids,))
            if token is not None
        )
    return frozenset(found)


def _token_id(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidArgument(
            f"eos_token_id must be a token's id or a list of them, got {type(value).__name__}",
            reason=Reason.MODEL_INVALID,
        )
    return value
