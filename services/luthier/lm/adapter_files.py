"""Adapters as PEFT 0.21 reads and writes them: `adapter_model.safetensors` and `adapter_config.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.errors import InvalidArgument, NotFound, Reason
from luthier.lm.lora import (
    Adapter,
    LoraSpec,
    Targets,
    adapter_parameters,
    attach,
    find_adapter,
    target_modules,
    trained_weights,
    use_adapter,
)
from luthier.lm.lora_layer import Factors, LoraLinear
from luthier.lm.module_patterns import Patterns
from luthier.lm.trained_weights import TRAINABLE, distinct, given_weights, is_tied, trainable_modules

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PEFT_VERSION = "0.21.2"

_PREFIX = "base_model.model."
SCORE_KEY = f"{_PREFIX}score.weight"
"""PEFT's name of a reward model's head."""
_MAGNITUDE = "lora_magnitude_vector"
_ENDS = {".lora_A.weight": 0, ".lora_B.weight": 1, f".{_MAGNITUDE}": 2}

# What PEFT writes for a plain LoRA; a key that differs means a feature, and is refused unless it is in _FREE.
_PLAIN: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
# Keys whose value does not change what the stored tensors mean: which modules they belong to is in their
# names.
_FREE = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)
# Other initialisations (PiSSA, OLoRA, CorDA, LoftQ) change the base weights, so the tensors alone are not
# the model.
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")


def adapter_state(
    model: PreTrainedModel,
    name: str,
    score: Tensor | None = None,
    masters: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's names, factors in float32; they share memory with the model.

    `score` [1, E] is the head of a reward model, which is a part of its adapter. `masters` stand in for
    parameters of their names, among them the weights that are trained whole; without, those have the model's type. One
    that is the embedding and the head has both names, as PEFT reads both; a reward model has no head over words.

    Raises:
        NotFound: the model has no adapter of that name.
    """
    parameters, weights = adapter_parameters(model, name), trained_weights(model, name)
    firsts = distinct(weights)
    state = {
        _PREFIX + (key if key.endswith(_MAGNITUDE) else f"{key}.weight"): masters.get(key, parameter).detach()
        for key, parameter in parameters.items()
        if key not in firsts
    }
    for module, weight in weights.items():
        if score is None or module != trainable_modules(model).get("lm_head"):
            key = next(key for key, first in firsts.items() if first is weight)
            state[f"{_PREFIX}{module}.weight"] = masters.get(key, weight).detach()
    return state if score is None else state | {SCORE_KEY: score.detach()}


def adapter_config(
    model: PreTrainedModel, name: str, *, base_model: str | None = None, is_reward: bool = False
) -> dict[str, Any]:
    """What PEFT would write to `adapter_config.json`; `base_model` is its `base_model_name_or_path`.

    That of a reward model is one of a sequence classifier, whose head is trained beside the adapter.

    Raises:
        NotFound: the model has no adapter of that name.
    """
    adapter = find_adapter(model, name)
    spec, weights = adapter.spec, trained_weights(model, name)
    saved = [*spec.trained_modules, *(["score"] if is_reward else [])]
    kind = {"task_type": "SEQ_CLS"} if is_reward else {}
    return (_PLAIN | kind) | {
        "base_model_name_or_path": base_model,
        "ensure_weight_tying": not is_reward and len(distinct(weights)) < len(weights),
        "alpha_pattern": {pattern: _shortest_number(alpha) for pattern, alpha in spec.alpha_pattern},
        "lora_alpha": _shortest_number(spec.alpha),
        "lora_dropout": spec.dropout,
        "modules_to_save": saved or None,
        "r": spec.rank,
        "rank_pattern": dict(spec.rank_pattern),
        "target_modules": _shortest_targets(model, adapter),
        "use_dora": spec.use_dora,
        "use_rslora": spec.use_rslora,
    }


def save_adapter(
    model: PreTrainedModel,
    name: str,
    directory: Path,
    *,
    base_model: str | None = None,
    score: Tensor | None = None,
    masters: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write the adapter's two files into `directory` (made if missing); equal adapters give equal bytes.

    With the `score` head [1, E] of a reward model they are those of a sequence classifier with one label. `masters` as
    in `adapter_state`.

    Raises:
        NotFound: the model has no adapter of that name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = {}
    for key, value in adapter_state(model, name, score, masters).items():
        # A file holds twice what has two names.
        is_held = any(value.data_ptr() == other.data_ptr() for other in state.values())
        state[key] = (value.clone() if is_held else value).contiguous().cpu()
    config = adapter_config(model, name, base_model=base_model, is_reward=score is not None)
    save_file(state, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    # Only the keys: of several patterns that match a module the first counts.
    text = json.dumps(dict(sorted(config.items())), indent=2)
    (directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def load_adapter(model: PreTrainedModel, directory: Path, name: str) -> Adapter:
    """Read an adapter that PEFT or `save_adapter` wrote and add it to the model under `name`, not yet active.

    Raises:
        NotFound: one of the two files is missing.
        InvalidArgument: the config asks for a feature that we do not compute (named), or the tensors do not
        fit the
            model.
        AlreadyExists: the model has an adapter of that name.
    """
    return _attached(model, name, *_read_files(directory))


def load_reward_adapter(model: PreTrainedModel, directory: Path, name: str) -> tuple[Adapter, Tensor]:
    """Read a reward model's adapter as `load_adapter` reads others; returns it and its head [1, E], float32.

    Raises:
        NotFound: one of the two files is missing.
        InvalidArgument: it has no head of this model's size, or is refused by `load_adapter`.
        AlreadyExists: the model has an adapter of that name.
    """
    config, state = _read_files(directory)
    score = state.pop(SCORE_KEY, None)
    embedding: Any = model.get_input_embeddings()
    width = embedding.weight.shape[1]
    if score is None or tuple(score.shape) != (1, width):
        found = "none" if score is None else str(tuple(score.shape))
        raise InvalidArgument(
            f"a reward model's adapter must have a head {SCORE_KEY} of shape (1, {width}), got {found}",
            reason=Reason.MODEL_INVALID,
        )
    # PEFT names every head that it looks for, and saves the one that there is; of one over words it knows none here.
    kept = [one for one in config.get("modules_to_save") or () if one not in ("score", "classifier")]
    config |= {"modules_to_save": kept or None, "ensure_weight_tying": False}
    return _attached(model, name, config, state), score.float()


def _read_files(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / file).is_file():
            raise NotFound(f"an adapter directory must hold {file}; it is missing from {directory.name}")
    config: dict[str, Any] = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    return config, load_file(directory / WEIGHTS_NAME)


def _attached(model: PreTrainedModel, name: str, config: dict[str, Any], state: dict[str, Tensor]) -> Adapter:
    spec, keeps_tied = _read_config(config), bool(config.get("ensure_weight_tying"))
    with use_adapter(model, None):
        tensors = _pop_weights(model, spec, state, keeps_tied=keeps_tied)
        weights = given_weights(model, tensors, keeps_tied=keeps_tied)
    factors = _pair_factors(state, use_dora=spec.use_dora)
    _check_factors(model, factors, spec)
    adapter = Adapter(name=name, spec=spec, modules=tuple(sorted(factors)))
    return attach(model, adapter, factors, weights)


def _pop_weights(
    model: PreTrainedModel, spec: LoraSpec, state: dict[str, Tensor], *, keeps_tied: bool
) -> dict[str, Tensor]:
    """Take those of modules that were trained whole out of a file's tensors, by the modules' full names."""
    names, found = trainable_modules(model), {}
    is_one = bool(spec.trained_modules) and keeps_tied and is_tied(model)
    for module in TRAINABLE if is_one else spec.trained_modules:
        key = f"{_PREFIX}{names.get(module, module)}.weight"
        if module not in names or key not in state:
            raise InvalidArgument(
                f"an adapter with modules_to_save={list(spec.trained_modules)} must hold {key}, which is missing from "
                f"{WEIGHTS_NAME if module in names else 'the model'}",
                reason=Reason.MODEL_INVALID,
            )
        found[names[module]] = state.pop(key)
    return found


def _read_config(config: dict[str, Any]) -> LoraSpec:
    for key, value in config.items():
        plain = _PLAIN.get(key)
        neutral = value == plain or (plain is None and not value) or (not plain and value is None)
        if key == "init_lora_weights":
            neutral = value in _PLAIN_INITIALISATIONS
        if key == "modules_to_save":
            plain, neutral = list(TRAINABLE), {_end(one) for one in value or ()} <= set(TRAINABLE)
        if key not in _FREE and not neutral:
            raise InvalidArgument(
                f"an adapter with {key}={value!r} is not supported; only plain LoRA is ({key}={plain!r})",
                reason=Reason.MODEL_INVALID,
            )
    return LoraSpec(
        rank=config["r"],
        alpha=config["lora_alpha"],
        targets=_read_targets(config.get("target_modules")),
        use_rslora=bool(config.get("use_rslora", False)),
        use_dora=bool(config.get("use_dora", False)),
        dropout=config.get("lora_dropout", 0.0),
        rank_pattern=_read_patterns(config, "rank_pattern"),
        alpha_pattern=_read_patterns(config, "alpha_pattern"),
        # PEFT adds the embedding's full name to its end, where it is tied.
        trained_modules=tuple(dict.fromkeys(_end(one) for one in config.get("modules_to_save") or ())),
    )


def _end(module: str) -> str:
    return module.rpartition(".")[2]


def _read_patterns(config: dict[str, Any], key: str) -> Patterns[Any]:
    patterns = config.get(key) or {}
    numbers = int if key == "rank_pattern" else int | float
    if not isinstance(patterns, dict) or not all(
        type(one) is not bool and isinstance(one, numbers) for one in patterns.values()
    ):
        raise InvalidArgument(
            f"{key} of an adapter must hold a number for each pattern, got {patterns!r}",
            reason=Reason.MODEL_INVALID,
        )
    return tuple(patterns.items())


def _read_targets(targets: str | list[str] | None) -> Targets:
    if targets is None or targets == "all-linear":
        return "all-linear"
    return (targets,) if isinstance(targets, str) else tuple(sorted(targets))


def _pair_factors(state: dict[str, Tensor], *, use_dora: bool) -> dict[str, Factors]:
    parts: dict[str, list[Tensor | None]] = {}
    for key, tensor in state.items():
        end = next((end for end in _ENDS if key.endswith(end)), None)
        if end is None or not key.startswith(_PREFIX):
            raise InvalidArgument(
                f"a tensor must be named {_PREFIX}<module>.lora_A.weight or .lora_B.weight, got {key}",
                reason=Reason.MODEL_INVALID,
            )
        module = key.removeprefix(_PREFIX).removesuffix(end)
        parts.setdefault(module, [None, None, None])[_ENDS[end]] = tensor
    factors = {}
    for module, (a_RI, b_OR, magnitude_O) in parts.items():
        if a_RI is None or b_OR is None:
            raise InvalidArgument(
                f"module {module} must have both lora_A and lora_B, one is missing",
                reason=Reason.MODEL_INVALID,
            )
        if (magnitude_O is not None) != use_dora:
            raise InvalidArgument(
                f"module {module} must have {_MAGNITUDE} exactly where use_dora is true, it is {str(use_dora).lower()}",
                reason=Reason.MODEL_INVALID,
            )
        factors[module] = Factors(a_RI, b_OR, magnitude_O)
    return factors


def _check_factors(model: PreTrainedModel, factors: dict[str, Factors], spec: LoraSpec) -> None:
    linear, strengths = set(target_modules(model, "all-linear")), spec.strengths(sorted(factors))
    for module, found in factors.items():
        if module not in linear:
            raise InvalidArgument(
                f"the adapter changes {module}, which is not a linear layer of the model",
                reason=Reason.MODEL_INVALID,
            )
        layer = model.get_submodule(module)
        assert isinstance(layer, nn.Linear | LoraLinear)
        rank = strengths[module].rank
        expected: list[tuple[int, ...]] = [(rank, layer.in_features), (layer.out_features, rank)]
        expected += [(layer.out_features,)] if spec.use_dora else []
        shapes = [tuple(tensor.shape) for tensor in found if tensor is not None]
        if shapes != expected:
            raise InvalidArgument(
                f"the factors of {module} must have shapes {expected}, got {shapes}",
                reason=Reason.MODEL_INVALID,
            )


def _shortest_number(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _shortest_targets(model: PreTrainedModel, adapter: Adapter) -> list[str]:
    """The last parts of the names where they pick exactly the adapter's modules, else the full names."""
    ends = sorted({_end(module) for module in adapter.modules})
    return ends if target_modules(model, tuple(ends)) == adapter.modules else list(adapter.modules)
