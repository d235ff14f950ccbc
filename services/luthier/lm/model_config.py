"""A model's `config.json`: read as strict JSON, and refused by name where it is nothing that we compute."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from luthier.errors import InvalidArgument, NotFound, Reason

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

_SIZES = {
    "vocab_size": 100_000_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "head_dim": 100_000,
    "max_position_embeddings": 1_000_000_000,
    "sliding_window": 1_000_000_000,
}
"""Whole numbers of at least 1, each with the most that it may be; null means not given."""
_POSITIVE = ("rms_norm_eps", "rope_theta", "partial_rotary_factor")
_ROPE = ("rope_scaling", "rope_parameters")
_NOT_NEGATIVE = ("mscale", "mscale_all_dim")
_IDENTIFIER = re.compile(r"\w{1,80}")


def read_config(directory: Path) -> dict[str, Any]:
    """The contents of `config.json`.

    Raises:
        NotFound: the file is missing.
        InvalidArgument: it is not a JSON object of finite numbers (reason MODEL_INVALID).
    """
    path = directory / "config.json"
    if not path.is_file():
        raise NotFound(f"a model directory must hold config.json, there is none in {directory.name}")
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model. What the file holds stands in no message: it may be no model's at all.

    Raises:
        InvalidArgument: it is not a JSON object of finite numbers (reason MODEL_INVALID).
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except json.JSONDecodeError as error:
        raise _invalid(f"{path.name} must be JSON, got {error.msg} at line {error.lineno}") from error
    except (ValueError, RecursionError) as error:
        raise _invalid(f"{path.name} must be JSON, got {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise _invalid(f"{path.name} must hold an object, got {type(value).__name__}")
    for place, number in _numbers(value):
        if not math.isfinite(number):
            raise _invalid(f"{path.name}: {place} must be a finite number, got {number}")
    return value


def check_config(config: dict[str, Any]) -> None:
    """Refuse what we do not compute or must not run.

    Raises:
        InvalidArgument: another architecture, quantised weights, a size or a rope setting that no model has
            (reason MODEL_INVALID), or code of its own (`auto_map`, reason UNSAFE_MODEL_FILE).
    """
    if "auto_map" in config:
        raise InvalidArgument(
            f"a model must not bring code of its own, config.json has auto_map={config['auto_map']}",
            reason=Reason.UNSAFE_MODEL_FILE,
        )
    if "quantization_config" in config:
        raise _invalid("a model directory must hold plain weights, config.json has quantization_config")
    architectures = config.get("architectures") or []
    if (
        not isinstance(architectures, list)
        or len(architectures) != 1
        or architectures[0] not in ARCHITECTURES
    ):
        raise _invalid(
            f"the architecture must be one of {', '.join(ARCHITECTURES)}, got {_shown(architectures)}"
        )
    for name, most in _SIZES.items():
        value = config.get(name)
        if value is not None and not (_is_number(value) and value == int(value) and 1 <= value <= most):
            _refuse(name, f"a whole number in 1..{most}", value)
    for name in _POSITIVE:
        if config.get(name) is not None:
            _require_positive(name, config[name])
    for name in _ROPE:
        _check_rope(name, config.get(name))
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads is not None and groups is not None and heads % groups:
        raise _invalid(
            f"config.json: num_attention_heads must be a multiple of {groups} key-value heads, got {heads}"
        )


def _check_rope(place: str, value: object) -> None:
    """Refuse a rope setting that turns positions into nothing or no numbers; settings may be kept by layer type."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_rope(f"{place}.{name}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_rope(f"{place}[{index}]", inner)
    elif _is_number(value) and not (value == 0 and place.endswith(_NOT_NEGATIVE)):
        _require_positive(place, value)


def _require_positive(place: str, value: object) -> None:
    if not _is_number(value) or not (isinstance(value, int | float) and 0 < value < math.inf):
        _refuse(place, "a positive finite number", value)


def _refuse(place: str, right: str, value: object) -> NoReturn:
    shown = value if _is_number(value) else type(value).__name__
    raise _invalid(f"config.json: {place} must be {right}, got {shown}")


def _numbers(value: object, place: str = "") -> Iterator[tuple[str, float]]:
    """Yield the floats of a JSON value with the path of each."""
    if isinstance(value, float):
        yield place, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{place}.{name}" if place else name)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{place}[{index}]")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(architectures: object) -> str:
    """Names as they are, and of anything else nothing but its type."""
    if isinstance(architectures, list) and all(
        isinstance(name, str) and _IDENTIFIER.fullmatch(name) for name in architectures
    ):
        return str(architectures)
    return type(architectures).__name__


def _invalid(message: str) -> InvalidArgument:
    return InvalidArgument(message, reason=Reason.MODEL_INVALID)
