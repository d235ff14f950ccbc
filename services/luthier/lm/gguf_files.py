"""GGUF files of our models: metadata, tokenizer and tensors as llama.cpp names and lays them out.

The layout is that of llama.cpp's convert_hf_to_gguf.py (version of gguf 0.19), which the `gguf` package does not have:
it has the writer, the names and the quantisation.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor

from luthier.errors import InvalidArgument, Reason
from luthier.lm.gguf_tokenizer import GgufTokenizer
from luthier.lm.made import EXPORTABLE, GgufType

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    # llama.cpp has no other: without a window it is the same model.
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_FILE_TYPES = {"F16": LlamaFileType.MOSTLY_F16, "Q8_0": LlamaFileType.MOSTLY_Q8_0}
_BLOCK = 32
_MOST_F16 = 65504.0
_QWEN3_HEAD = 128


def require_writable(config: Mapping[str, Any]) -> None:
    """Return if a model of this `config.json` can be written, and read again to be compared.

    Raises:
        InvalidArgument: EXPORT_NOT_POSSIBLE; the architecture, or a setting that GGUF, or who reads it here, has no
            place for.
    """
    architecture = (config.get("architectures") or [""])[0]
    if architecture not in EXPORTABLE:
        raise not_possible("the architecture", f"one of {', '.join(EXPORTABLE)}", architecture)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise not_possible("the rope type", "default", kind)
    if float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1) != 1:
        raise not_possible("partial_rotary_factor", "1", rope.get("partial_rotary_factor"))
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(name):
            raise not_possible(name, "false", config[name])
    if config.get("hidden_act", "silu") != "silu":
        raise not_possible("hidden_act", "silu", config["hidden_act"])
    window, context = config.get("sliding_window"), config.get("max_position_embeddings") or 0
    if architecture == "MistralForCausalLM" and window is not None and window < context:
        raise not_possible("sliding_window", f"null or at least the {context} tokens of the context", window)
    head, whole = _head_dim(config), config["hidden_size"] // config["num_attention_heads"]
    if architecture == "Qwen2ForCausalLM" and head != whole:
        raise not_possible("head_dim", f"{whole}, hidden_size / num_attention_heads", head)
    # transformers 5.24 reads no head size of this architecture, and takes its default.
    if architecture == "Qwen3ForCausalLM" and head != _QWEN3_HEAD:
        raise not_possible("head_dim", str(_QWEN3_HEAD), head)


def not_possible(what: str, right: str, value: object) -> InvalidArgument:
    """Return EXPORT_NOT_POSSIBLE for something of a model that must be otherwise."""
    return InvalidArgument(
        f"for a GGUF file {what} must be {right}, got {value!r}", reason=Reason.EXPORT_NOT_POSSIBLE
    )


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    tokenizer: GgufTokenizer,
    form: GgufType,
    title: str,
    check: Callable[[], None] = lambda: None,
) -> tuple[str, ...]:
    """Write a model into one file, one tensor after another; returns what its user should know.

    `config` is the model's, `state` its weights by transformers' names, a tied head left out. Vectors are float32;
    matrices are of `form`, of Q8_0 those whose rows are no whole blocks float16. Equal models give equal bytes.

    Raises:
        InvalidArgument: EXPORT_NOT_POSSIBLE; a weight is beyond float16, or has no name there.
    """
    architecture = _ARCHITECTURES[config["architectures"][0]]
    tensors = dict(_named(architecture, config, state))
    writer: Any = gguf.GGUFWriter(path, architecture)
    kinds = {name: _kind(tensor, form) for name, tensor in tensors.items()}
    with closing(writer):
        _add_settings(writer, config, tokenizer, form, title)
        tokenizer.add_to(writer)
        for name, tensor in tensors.items():
            _announce(writer, name, tensor, kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            check()
            writer.write_tensor_data(_bytes(name, tensor, kinds[name]))
    uneven = sum(kind == GGMLQuantizationType.F16 for kind in kinds.values())
    if form == "F16" or not uneven:
        return ()
    text = f"{uneven} matrices are in 16 bits, not in 8: their rows are no multiples of {_BLOCK} weights"
    return (text,)


def _head_dim(config: Mapping[str, Any]) -> int:
    found = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(found)


def _add_settings(
    writer: Any, config: Mapping[str, Any], tokenizer: GgufTokenizer, form: GgufType, title: str
) -> None:
    writer.add_name(title)
    writer.add_file_type(_FILE_TYPES[form])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(_head_dim(config))
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config["rope_theta"]))
    writer.add_vocab_size(len(tokenizer.tokens))


def _named(
    architecture: str, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield weights under llama.cpp's names, queries and keys in its order of rows."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config.get("num_key_value_heads") or config["num_attention_heads"],
    }
    for place, tensor in state.items():
        module, _, end = place.rpartition(".")
        name = names.get_name(module)
        if name is None:
            raise not_possible("every weight", "one that llama.cpp knows", place)
        part = name.rpartition(".")[2]
        is_rotated = architecture == "llama" and part in heads
        yield f"{name}.{end}", _interleaved(tensor, heads[part]) if is_rotated else tensor


def _interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Return rows as llama.cpp rotates them for this architecture: the two halves of a head in turn."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _kind(tensor: Tensor, form: GgufType) -> GGMLQuantizationType:
    if tensor.dim() == 1:
        return GGMLQuantizationType.F32
    if form == "Q8_0" and tensor.shape[-1] % _BLOCK == 0:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16


def _announce(writer: Any, name: str, tensor: Tensor, kind: GGMLQuantizationType) -> None:
    shape = tuple(tensor.shape)
    if kind == GGMLQuantizationType.Q8_0:
        packed = gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, packed, np.dtype(np.uint8), int(np.prod(packed)), raw_dtype=kind)
        return
    dtype = np.dtype(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)
    writer.add_tensor_info(name, shape, dtype, tensor.numel() * dtype.itemsize)


def _bytes(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> "np.ndarray[Any, Any]":
    values = tensor.float().contiguous().numpy()
    largest = float(np.abs(values).max())
    if kind != GGMLQuantizationType.F32 and not largest <= _MOST_F16:
        raise not_possible(f"every weight of {name}", f"at most {_MOST_F16:g}", largest)
    found: np.ndarray[Any, Any] = gguf.quantize(values, kind)
    return found
