"""The layers of a model as one program of our kernels, for passes over caches: prompts, and tokens that follow them.

A pass of few rows is hundreds of small operators, which take longer to call than to compute. Told once as a program,
they run in one call. What modules compute is computed here too, but for the sum of a layer's input and output, which
is rounded once: so all passes of a model go through its program, whatever their size.

Shape suffixes: N rows, each a token, M the most rows, E hidden size, F feed-forward size, K inputs, O outputs, R rank
of several updates together.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.kernels.dequantise import is_quantised
from luthier.kernels.products import Term
from luthier.kernels.program import Program, Rows
from luthier.lm.blocks import Attention, GatedMlp, Linear, RmsNorm
from luthier.lm.joint_rows import JointRows
from luthier.lm.lora_layer import LoraLinear, adapter_switch
from luthier.lm.parts_seen import PartsSeen

_logger = logging.getLogger(__name__)

_LAYERS = frozenset(f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"))
"""Layers that norm their input, attend, add, norm, go through the feed-forward part, and add."""

_FEWEST_ROWS = 64
_MORE_ROWS = 256
"""What room for rows is a multiple of, where there are more than that; else it is a power of two."""
_KEPT = 4


class UnfitError(Exception):
    """A model has a part that no program knows: a layer, a kind of weight, an update, a hook."""


class DecodeProgram:
    """The layers and the last norm of a model, with the adapter that is active when it is made.

    It computes what the model does as long as nothing has changed of `seen`, which is told all that is read off the
    model, also where it turns out to be unfit. Plain settings of a module, as a norm's epsilon, are taken to stay.
    Weights of linear layers may be quantised.

    Memory: hidden states of `num_rows` rows in one layer, which programs of a model share by way of `rooms`, and the
    adapter's factors in the model's type.

    Raises:
        UnfitError: the model has a part that no program knows.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, seen: PartsSeen, rooms: "_Rooms") -> None:
        self.num_rows = num_rows
        self._seen = seen
        inner: nn.Module = seen.child(model, model.base_model_prefix)
        inner = model if inner is None else inner
        layers, norm = self._part(inner, "layers"), self._part(inner, "norm")
        self._require_plain(inner)
        self._dtype: torch.dtype = seen.weight(norm._parameters, "weight").dtype
        self._factors, self._layers = Program(self._dtype), Program(self._dtype)
        self._roundings: list[tuple[Tensor, Tensor, float]] = []
        self._windows: list[int | None] = []
        self._keys: list[Tensor] = []
        self._rooms = rooms
        # Buffers outlive the inference mode in which the first pass may come.
        with torch.inference_mode(mode=False), torch.no_grad():
            self._x_ME, self._normed_ME = (
                self._buffer(name, model.config.hidden_size) for name in ("x", "normed")
            )
            for number in range(seen.count(layers._modules)):
                self._tell_layer(self._part(layers, str(number)))
            self._tell_norm(norm, self._x_ME, self._normed_ME)
        self._factors.round_to(self._roundings)

    def run(self, hidden_NE: Tensor, joint: JointRows, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Hidden states [N, E] after the last norm, of embedded tokens; their keys and values are in the caches then.

        Raises:
            InvalidArgument: keys outnumber the sliding window of a layer.
        """
        for layer, window in enumerate(self._windows):
            joint.require_within(window, layer)
        num_layers, num_rows = len(self._windows), len(hidden_NE)
        rows = Rows(
            num_rows=num_rows,
            layers=[joint.caches(layer, key) for layer, key in enumerate(self._keys)],
            spans=[joint.spans] * num_layers,
            first=joint.first,
            angles=(angles[0].contiguous(), angles[1].contiguous()),
        )
        self._x_ME[:num_rows].copy_(hidden_NE)
        if self._roundings:
            # It rounds, and attends to nothing.
            self._factors.run(rows._replace(layers=(), spans=()))
        self._layers.run(rows)
        for layer in range(num_layers):
            joint.advance(layer)
        return self._normed_ME[:num_rows].clone()

    def _buffer(self, name: str, size: int) -> Tensor:
        """Rows of a size [M, size], the same ones for what has a name in every layer and every program of a model."""
        key = name, size, self._dtype
        if key not in self._rooms or len(self._rooms[key]) < self.num_rows:
            self._rooms[key] = torch.empty(self.num_rows, size, dtype=self._dtype, device="cpu")
        return self._rooms[key][: self.num_rows]

    def _part(self, module: nn.Module, name: str) -> Any:
        """The module of that name below another one."""
        found = self._seen.child(module, name)
        if found is None:
            raise UnfitError(f"{type(module).__name__} has no {name}")
        self._require_plain(found)
        return found

    def _require_plain(self, module: nn.Module) -> None:
        if self._seen.is_intercepted(module):
            raise UnfitError(f"{type(module).__name__} has hooks")

    def _weight(self, held: dict[str, Any], name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of a module that has to stay where it is, of the model's type unless another one is said."""
        found = self._seen.weight(held, name)
        is_known = type(found) in (Tensor, nn.Parameter) or is_quantised(found)
        is_here = found.device.type == "cpu" and found.is_contiguous()
        if not (is_known and is_here) or found.dtype != (dtype or self._dtype):
            raise UnfitError(f"{name} is a {found.dtype} {type(found).__name__} on {found.device}")
        return found

    def _tell_layer(self, layer: nn.Module) -> None:
        attention, mlp = self._part(layer, "self_attn"), self._part(layer, "mlp")
        known = type(layer).__name__ in _LAYERS and type(attention) is Attention
        if not known or type(mlp) is not GatedMlp or mlp.is_joined:
            raise UnfitError(f"a layer is {type(layer).__name__}")
        self._tell_norm(self._part(layer, "input_layernorm"), self._x_ME, self._normed_ME)
        self._tell_attention(attention)
        self._tell_norm(self._part(layer, "post_attention_layernorm"), self._x_ME, self._normed_ME)
        gate, up = self._tell_linears(
            self._normed_ME, [self._part(mlp, name) for name in ("gate_proj", "up_proj")]
        )
        self._layers.gated(gate, up, gate, gelu=mlp.activation == "gelu_tanh")
        self._tell_linears(gate, [self._part(mlp, "down_proj")], added_to=self._x_ME)

    def _tell_norm(self, norm: nn.Module, x: Tensor, out: Tensor) -> None:
        if type(norm) is not RmsNorm:
            raise UnfitError(f"a norm is {type(norm).__name__}")
        self._layers.rms_norm(x, self._weight(norm._parameters, "weight"), out, (norm.epsilon, norm.offset))

    def _tell_attention(self, attention: Attention) -> None:
        names = ("q_proj", "k_proj", "v_proj")
        projected = self._tell_linears(self._normed_ME, [self._part(attention, name) for name in names])
        query, key, value = (one.view(self.num_rows, -1, attention.head_dim) for one in projected)
        for name, heads in (("q_norm", query), ("k_norm", key)):
            if self._seen.child(attention, name) is not None:
                self._tell_norm(self._part(attention, name), heads, heads)
        out_MO = self._buffer("attended", projected[0].shape[1])
        self._layers.attend(
            (query, key, value),
            out_MO,
            len(self._windows),
            turns=attention.use_rope,
            options=(attention.scaling, attention.softcap),
        )
        self._windows.append(attention.sliding_window)
        self._keys.append(key)
        self._tell_linears(out_MO, [self._part(attention, "o_proj")], added_to=self._x_ME)

    def _tell_linears(
        self, x_MK: Tensor, linears: Sequence[nn.Module], added_to: Tensor | None = None
    ) -> list[Tensor]:
        """Linear layers of the same x, with the updates that are active; of one, what it is added to in place."""
        updates = [self._update(layer) for layer in linears]
        ranks = [0 if one is None else len(one.a) for one in updates]
        a_RK = torch.empty(sum(ranks), x_MK.shape[1], dtype=self._dtype, device="cpu")
        lowered_MR = self._buffer("lowered", sum(ranks))
        if sum(ranks):
            self._layers.product([(x_MK, a_RK, True)], lowered_MR)
        outputs = []
        parts = zip(
            linears, updates, torch.split(a_RK, ranks), torch.split(lowered_MR, ranks, dim=1), strict=True
        )
        for place, (layer, update, a, low) in enumerate(parts):
            weight_OK = self._weight(layer._parameters, "weight")
            terms: list[Term] = [(x_MK, weight_OK, True)]
            if update is not None:
                b_OR = torch.empty_like(update.b, dtype=self._dtype)
                self._roundings += [(update.a, a, 1.0), (update.b, b_OR, update.scale)]
                terms.append((low, b_OR, True))
            out_MO = self._buffer(f"output {place}", len(weight_OK)) if added_to is None else added_to
            has_bias = self._seen.look(layer._parameters, "bias") is not None
            bias_O = self._weight(layer._parameters, "bias") if has_bias else None
            self._layers.product(terms, out_MO, bias_O, added_to)
            outputs.append(out_MO)
        return outputs

    def _update(self, layer: nn.Module) -> "_Update | None":
        if type(layer) is Linear:
            return None
        if type(layer) is not LoraLinear:
            raise UnfitError(f"a linear layer is {type(layer).__name__}")
        name = layer.switch.active
        scale = None if name is None else self._seen.look(layer.scales, name)
        if name is None or scale is None:
            return None
        if self._seen.look(self._part(layer, "lora_magnitude_vector")._parameters, name) is not None:
            raise UnfitError("an update has magnitudes")
        a_RK, b_OR = (
            self._weight(self._part(layer, factors)._parameters, name, torch.float32)
            for factors in ("lora_A", "lora_B")
        )
        return _Update(a_RK, b_OR, scale)


class _Update(NamedTuple):
    a: Tensor
    b: Tensor
    scale: float


class _Made(NamedTuple):
    """A program, None: the model had a part that none knows; and what that was decided by."""

    program: DecodeProgram | None
    seen: PartsSeen


_Rooms = dict[tuple[str, int, torch.dtype], Tensor]
"""Rows by what they are for, their size and type."""

_rooms: WeakKeyDictionary[nn.Module, _Rooms] = WeakKeyDictionary()
_programs: WeakKeyDictionary[nn.Module, OrderedDict[str | None, _Made]] = WeakKeyDictionary()
"""Of each model what was made by adapter, the newest last."""


def forget(model: nn.Module, adapter: str) -> None:
    """Drop what is kept of an adapter that a model no longer has."""
    _programs.get(model, OrderedDict()).pop(adapter, None)


def decode(model: PreTrainedModel, ids_N1: Tensor, positions_N1: Tensor, joint: JointRows) -> Tensor | None:
    """Hidden states [N, E] of new tokens, after the last norm; None where no program can make them.

    That is where C++ does not attend for all rows, something is dropped or muted, or gradients are kept.
    """
    switch = adapter_switch(model)
    is_plain = switch is None or not (switch.is_muted or switch.dropout)
    inner: Any = model.base_model
    if (
        not (joint.is_one_call and is_plain)
        or torch.is_grad_enabled()
        or type(inner.embed_tokens) is not nn.Embedding
    ):
        return None
    program = _program(model, None if switch is None else switch.active, len(ids_N1))
    if program is None:
        return None
    hidden_N1E = inner.embed_tokens(ids_N1)
    angles = joint.angles
    if angles is None:
        cos, sin = inner.rotary_emb(hidden_N1E, positions_N1)
        angles = cos[:, 0], sin[:, 0]
    return program.run(hidden_N1E[:, 0], joint, angles)


def _program(model: PreTrainedModel, adapter: str | None, num_rows: int) -> DecodeProgram | None:
    made = _programs.setdefault(model, OrderedDict())
    found = made.get(adapter)
    if found is None or not found.seen.are_unchanged() or _has_too_few_rows(found.program, num_rows):
        # What others were made of may be gone as well, and would be kept by them alone.
        for name in [name for name, one in made.items() if not one.seen.are_unchanged()]:
            del made[name]
        found = made[adapter] = _made(model, num_rows)
    made.move_to_end(adapter)
    while len(made) > _KEPT:
        made.popitem(last=False)
    return found.program


def _has_too_few_rows(program: DecodeProgram | None, num_rows: int) -> bool:
    return program is not None and program.num_rows < num_rows


def _made(model: PreTrainedModel, num_rows: int) -> _Made:
    seen = PartsSeen()
    most_rows = max(_FEWEST_ROWS, 1 << (num_rows - 1).bit_length())
    if num_rows > _MORE_ROWS:
        most_rows = -(-num_rows // _MORE_ROWS) * _MORE_ROWS
    try:
        return _Made(DecodeProgram(model, most_rows, seen, _rooms.setdefault(model, {})), seen)
    except UnfitError as error:
        _logger.info("decoding goes module by module: %s", error)
        return _Made(None, seen)
