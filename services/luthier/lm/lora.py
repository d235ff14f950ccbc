"""LoRA (arXiv:2106.09685) on the linear layers of a frozen model; several named adapters on one base.

Shape suffixes: I inputs, O outputs, R rank.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.errors import AlreadyExists, InvalidArgument, NotFound
from luthier.kernels.lora_linear import Dropout, token_number
from luthier.lm.decode_program import forget
from luthier.lm.head import output_head
from luthier.lm.lora_layer import SWITCH, AdapterSwitch, Factors, LoraLinear, adapter_switch, row_lengths
from luthier.lm.module_patterns import Patterns, assigned, require_one_value, targeted
from luthier.lm.packed import PackedBatch
from luthier.lm.trained_weights import distinct, fresh_weights

MAX_RANK = 512

Targets = tuple[str, ...] | Literal["all-linear"]


class Strength(NamedTuple):
    """Rank of one module's update, and the factor that it is multiplied by."""

    rank: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """What to adapt and how strongly.

    `targets` are module names or their ends (`q_proj`, `mlp.up_proj`), or "all-linear": every linear layer
    except the vocabulary head. The update is scaled by alpha / rank, with `use_rslora` by alpha / sqrt(rank)
    (arXiv:2312.03732); modules that a pattern matches have the rank, or the alpha, that stands there.
    `dropout` is the share of inputs that are dropped where it is trained, see `dropping`. `trained_modules` are those
    of `TRAINABLE` whose weight is trained whole. With `use_dora` (arXiv:2402.09353) each module has the lengths of its
    weight's rows as parameters, and the update changes their directions.

    Raises:
        InvalidArgument: a rank outside 1..512, an alpha not positive, no target, or dropout outside [0, 1).
    """

    rank: int
    alpha: float
    targets: Targets = "all-linear"
    use_rslora: bool = False
    dropout: float = 0.0
    rank_pattern: Patterns[int] = ()
    alpha_pattern: Patterns[float] = ()
    trained_modules: tuple[str, ...] = ()
    use_dora: bool = False

    def __post_init__(self) -> None:
        for rank in (self.rank, *(rank for _, rank in self.rank_pattern)):
            if not 1 <= rank <= MAX_RANK:
                raise InvalidArgument(f"rank must be in 1..{MAX_RANK}, got {rank}")
        for alpha in (self.alpha, *(alpha for _, alpha in self.alpha_pattern)):
            if not (math.isfinite(alpha) and alpha > 0):
                raise InvalidArgument(f"alpha must be a positive finite number, got {alpha}")
        if not self.targets:
            raise InvalidArgument("targets must name at least one module or be 'all-linear', got none")
        if not 0 <= self.dropout < 1:
            raise InvalidArgument(f"dropout must be in [0, 1), got {self.dropout}")

    def strengths(self, modules: Sequence[str]) -> dict[str, Strength]:
        """Return the strength of each of the modules that are adapted.

        Raises:
            InvalidArgument: a pattern cannot be read or matches none of them (reason MODULE_PATTERN_INVALID).
        """
        ranks = assigned("rank_pattern", self.rank_pattern, modules)
        alphas = assigned("alpha_pattern", self.alpha_pattern, modules)
        found = {}
        for module in modules:
            rank, alpha = ranks.get(module, self.rank), alphas.get(module, self.alpha)
            found[module] = Strength(rank, alpha / (math.sqrt(rank) if self.use_rslora else rank))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One adapter in a model: its spec and the full names of the modules that it changes, sorted."""

    name: str
    spec: LoraSpec
    modules: tuple[str, ...]


def insert_lora(model: PreTrainedModel, spec: LoraSpec, *, seed: int, name: str = "default") -> Adapter:
    """Add a fresh adapter: A as PEFT draws it (Kaiming uniform, a = sqrt(5)), B zero, base frozen.

    Each module's A is drawn from its own generator, keyed by seed and module name: the result does not
    depend on the order of modules nor on the other targets. Weights that are trained whole begin as the base's. The
    adapter is not active until `activate` or `use_adapter`.

    Raises:
        InvalidArgument: a target matches no linear layer, a pattern matches none of the targets or says of one what
            another does not (reason MODULE_PATTERN_INVALID), the model has no such module to train whole
            (TRAINED_MODULE_INVALID), or the name is not [A-Za-z0-9_-]+.
        AlreadyExists: the model has an adapter of that name.
    """
    modules, factors = target_modules(model, spec.targets), {}
    require_one_value("rank_pattern", spec.rank_pattern, modules)
    require_one_value("alpha_pattern", spec.alpha_pattern, modules)
    for module, strength in spec.strengths(modules).items():
        linear = model.get_submodule(module)
        assert isinstance(linear, nn.Linear | LoraLinear)
        digest = hashlib.sha256(f"{seed}/{module}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        a_RI = torch.empty(strength.rank, linear.in_features)
        nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
        b_OR = torch.zeros(linear.out_features, strength.rank)
        factors[module] = Factors(a_RI, b_OR, _lengths(linear.weight, a_RI, b_OR) if spec.use_dora else None)
    with use_adapter(model, None):
        weights = fresh_weights(model, spec.trained_modules)
    return attach(model, Adapter(name=name, spec=spec, modules=tuple(sorted(factors))), factors, weights)


def attach(
    model: PreTrainedModel,
    adapter: Adapter,
    factors: Mapping[str, Factors],
    weights: Mapping[str, nn.Parameter],
) -> Adapter:
    """Put given factors, by module name, into the model under the adapter's name.

    `weights` are those that it has in place of the base's, by module name, in the type of the base's.

    Raises:
        InvalidArgument: the name is not [A-Za-z0-9_-]+, or a pattern fits none of its modules.
        AlreadyExists: the model has an adapter of that name.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", adapter.name):
        raise InvalidArgument(f"an adapter's name must match [A-Za-z0-9_-]+, got {adapter.name!r}")
    switch = adapter_switch(model) or AdapterSwitch()
    if adapter.name in switch.adapters:
        raise AlreadyExists(f"the model already has an adapter named {adapter.name!r}")
    strengths = adapter.spec.strengths(adapter.modules)
    model.__dict__[SWITCH] = switch
    with use_adapter(model, None):
        model.requires_grad_(requires_grad=False)
        for module, strength in strengths.items():
            linear = model.get_submodule(module)
            if isinstance(linear, nn.Linear):
                model.set_submodule(module, LoraLinear(linear, switch, module))
            _lora_linear(model, module).add(adapter.name, factors[module], strength.scale)
        switch.weights.add(model, adapter.name, weights)
    switch.adapters[adapter.name] = adapter
    for name in switch.adapters:
        for parameter in adapter_parameters(model, name).values():
            parameter.requires_grad_()
    return adapter


def _lengths(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """The lengths [O] with which DoRA begins, computed where they are computed again at each pass."""
    return row_lengths(weight_OI, a_RI.to(weight_OI.device), b_OR.to(weight_OI.device), 1.0)


def remove_adapter(model: PreTrainedModel, name: str) -> None:
    """Take an adapter out of the model and free its memory; the base becomes active if it was active.

    Raises:
        NotFound: the model has no adapter of that name.
    """
    adapter = find_adapter(model, name)
    switch = adapter_switch(model)
    assert switch is not None
    if switch.active == name:
        switch.choose(None)
    for module in adapter.modules:
        _lora_linear(model, module).remove(name)
    switch.weights.remove(name)
    del switch.adapters[name]
    forget(model, name)


def find_adapter(model: PreTrainedModel, name: str) -> Adapter:
    """The adapter of that name.

    Raises:
        NotFound: the model has no such adapter; the message lists those it has.
    """
    switch = adapter_switch(model)
    adapters = {} if switch is None else switch.adapters
    if name not in adapters:
        raise NotFound(f"the model has no adapter {name!r}; it has {sorted(adapters)}")
    return adapters[name]


def activate(model: PreTrainedModel, name: str | None) -> None:
    """Let every forward from now on use adapter `name`; None is the base model.

    Raises:
        NotFound: the model has no adapter of that name.
    """
    if name is not None:
        find_adapter(model, name)
    switch = adapter_switch(model)
    if switch is not None:
        switch.choose(name)


@contextmanager
def use_adapter(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Use adapter `name` (None: the base) in the block and the previous one after it. One thread at a time.

    Raises:
        NotFound: the model has no adapter of that name.
    """
    switch = adapter_switch(model)
    before = None if switch is None else switch.active
    activate(model, name)
    try:
        yield
    finally:
        if switch is not None:
            switch.choose(before)


@contextmanager
def muted(model: PreTrainedModel) -> Iterator[None]:
    """Compute what the base computes in the block, in the kernels that the active adapter has; one thread at a time.

    An update of zero has the very same bits.
    """
    switch = adapter_switch(model)
    assert switch is not None, "the model has an adapter"
    switch.mute(is_muted=True)
    try:
        yield
    finally:
        switch.mute(is_muted=False)


@contextmanager
def dropping(model: PreTrainedModel, batch: PackedBatch, probability: float, seed: int) -> Iterator[None]:
    """Drop inputs of the updates in the block, by seed, row, token, layer and column; one thread at a time.

    A token's mask is the same whatever its row is packed with. Layers that take the same input in one pass, as query,
    key and value do, share a mask.
    """
    switch = adapter_switch(model)
    assert switch is not None, "the model has an adapter"
    first, *others = zip(batch.cu_seqlens, batch.rows, strict=False)
    switch.dropout = Dropout(
        probability=probability,
        seed=seed,
        row0=token_number(first[1]),
        restarts=tuple((place, token_number(row)) for place, row in others),
    )
    try:
        yield
    finally:
        switch.dropout = None


def adapter_parameters(model: PreTrainedModel, name: str) -> dict[str, nn.Parameter]:
    """Every trainable tensor of an adapter, keyed `<module>.lora_A` and `<module>.lora_B`, in sorted order.

    With DoRA there is `<module>.lora_magnitude_vector` too. Behind them those that it trains whole, keyed
    `<module>.weight`, one for the embedding and the head if it is both.

    Raises:
        NotFound: the model has no adapter of that name.
    """
    parameters = {}
    for module in find_adapter(model, name).modules:
        layer = _lora_linear(model, module)
        parameters[f"{module}.lora_A"] = layer.lora_A[name]
        parameters[f"{module}.lora_B"] = layer.lora_B[name]
        if name in layer.lora_magnitude_vector:
            parameters[f"{module}.lora_magnitude_vector"] = layer.lora_magnitude_vector[name]
    return parameters | distinct(trained_weights(model, name))


def trained_weights(model: PreTrainedModel, name: str) -> Mapping[str, nn.Parameter]:
    """The weights [V, E] that an adapter has in place of the base's, by the full name of their module.

    Raises:
        NotFound: the model has no adapter of that name.
    """
    return _lora_linear(model, find_adapter(model, name).modules[0]).switch.weights.of(name)


def target_modules(model: PreTrainedModel, targets: Targets) -> tuple[str, ...]:
    """Full names of the linear layers that `targets` pick, sorted.

    Raises:
        InvalidArgument: a target matches no linear layer; the message lists the ends that would match.
    """
    head = output_head(model)
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | LoraLinear) and module is not head
    ]
    if targets == "all-linear":
        return tuple(sorted(linear))
    return targeted(targets, linear)


def _lora_linear(model: PreTrainedModel, module: str) -> LoraLinear:
    layer = model.get_submodule(module)
    assert isinstance(layer, LoraLinear)
    return layer
