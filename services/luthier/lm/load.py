"""Load a registered model: plain safetensors in transformers' layout, of an architecture that we compute."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GgufConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from luthier.errors import InvalidArgument, Reason, ResourceExhausted
from luthier.kernels.dequantise import is_quantised
from luthier.lm.attention import IMPLEMENTATION
from luthier.lm.blocks import use_kernels
from luthier.lm.model_config import check_config, read_config
from luthier.lm.precision import Precision
from luthier.lm.quantise import quantise_linears

_MAX_WORDS = 300
_CLASSIFIER = "ForSequenceClassification"
_WEIGHTS_NAME = "model.safetensors"

# `from_pretrained` changes the process while it works (torch's default dtype, whether weights are tied) and puts back
# what it found: two at a time would put back what the other one set.
_ONE_AT_A_TIME = Lock()


def load_model(
    directory: Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    precision: Precision = "BFLOAT16",
) -> PreTrainedModel:
    """Load a model for training or generating onto a device: eval mode, frozen, with our attention.

    In INT8 or NF4 its linear layers are quantised one by one, as `quantise_linears` does it: in bfloat16 they are
    never in memory together, nor on the device.

    Files are memory-mapped, and each tensor goes straight to the device; nothing but safetensors and JSON is read, and
    no code that comes with a model runs.

    Raises:
        NotFound: there is no `config.json`.
        InvalidArgument: the architecture is not one of ours, or the weights are not exactly the model's
            (reason MODEL_INVALID), or a layer cannot be quantised.
        ResourceExhausted: OUT_OF_MEMORY, they do not fit on the GPU.
    """
    check_config(read_config(directory))
    with _fitting(device):
        placed = _placed(device if precision == "BFLOAT16" else "cpu")
        options = {"dtype": dtype, "attn_implementation": IMPLEMENTATION, **placed}
        return _ready(load_weights(directory, **options), device, precision)


def load_gguf(path: Path) -> PreTrainedModel:
    """Load the model that a GGUF file holds, its weights expanded to float32, as `load_model` loads others.

    Raises:
        InvalidArgument: the file cannot be read, or has not exactly the weights of its model (reason MODEL_INVALID).
    """
    return _ready(open_gguf(path, torch.float32, attn_implementation=IMPLEMENTATION), "cpu")


def open_gguf(path: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Let transformers read a GGUF file, expanding what is quantised.

    Raises:
        InvalidArgument: as `load_gguf`.
    """
    expanded = GgufConfig(dequantize=True)
    return load_weights(
        path.parent, gguf_file=path.name, dtype=dtype, quantization_config=expanded, **options
    )


@contextmanager
def _fitting(device: torch.device | str) -> Iterator[None]:
    """Name what does not fit on a GPU: its weights, whatever is computed with them later."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        text = " ".join(str(error).split())[:_MAX_WORDS]
        raise ResourceExhausted(
            f"the model's weights must fit in the memory of {device}, they do not: {text}",
            reason=Reason.OUT_OF_MEMORY,
            metadata={"device": str(device)},
        ) from error


def _placed(device: torch.device | str) -> dict[str, Any]:
    """Options with which transformers reads each tensor of a file onto a device, without all of them on the processor.

    None for the processor itself: there the file stays mapped, and its pages come as they are used.
    """
    return {} if torch.device(device).type == "cpu" else {"device_map": {"": torch.device(device)}}


class RewardModel(NamedTuple):
    """A model without a head over words, and the head [1, E], float32, that makes values of its last hidden states."""

    model: PreTrainedModel
    score: Tensor


def load_reward_model(
    directory: Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> RewardModel:
    """Load a reward model of its own weights, a sequence classifier with one label, as `load_model` loads others.

    Raises:
        NotFound: there is no `config.json`.
        InvalidArgument: it is no classifier of one of our architectures with one label, or the weights are not exactly
            the model's (reason MODEL_INVALID).
        ResourceExhausted: OUT_OF_MEMORY, they do not fit on the GPU.
    """
    config = read_config(directory)
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or not name.endswith(_CLASSIFIER):
        raise InvalidArgument(
            f"a reward model must be one sequence classifier, got architectures {names!r}",
            reason=Reason.MODEL_INVALID,
        )
    check_config(config | {"architectures": [name.removesuffix(_CLASSIFIER) + "ForCausalLM"]})
    options = {"dtype": dtype, "attn_implementation": IMPLEMENTATION, **_placed(device)}
    with _fitting(device):
        model = _ready(load_weights(directory, AutoModelForSequenceClassification, **options), device)
    # In another type than the rest: what transformers makes of it is rounded.
    score = load_file(directory / _WEIGHTS_NAME)["score.weight"].float()
    if score.shape[0] != 1:
        raise InvalidArgument(
            f"a reward model must have one label, got {score.shape[0]}", reason=Reason.MODEL_INVALID
        )
    return RewardModel(model, score.to(device))


def _ready(
    model: PreTrainedModel, device: torch.device | str, precision: Precision = "BFLOAT16"
) -> PreTrainedModel:
    model.requires_grad_(requires_grad=False)
    if precision == "BFLOAT16":
        placed: Any = model
        placed.to(device)
    else:
        quantise_linears(model, precision, device)
        _place(model, device)
    use_kernels(model)
    return model


def _place(model: PreTrainedModel, device: torch.device | str) -> None:
    """Move to a device what is not there; `Module.to` would make quantised weights anew."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not is_quantised(parameter):
                parameter.data = parameter.data.to(device)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def load_weights(directory: Path, auto_class: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """`from_pretrained` of a class without its leniencies: no download, no foreign code, no pickle, no random weight.

    Raises:
        InvalidArgument: a file cannot be read, or weights are missing, left over or of a wrong shape
            (reason MODEL_INVALID).
    """
    # A worker's standard error is its log.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with _ONE_AT_A_TIME:
            loaded: Any = auto_class.from_pretrained(
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
