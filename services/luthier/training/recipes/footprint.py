"""How much memory and time a run takes, from sizes alone: a pure function that a plan and a worker share.

Letters: E hidden size, L layers, H query heads, G key/value heads, D head size, F size between the MLP's products,
V vocabulary, T tokens of the largest pass, N tokens that are scored in it, P weights, A weights of an adapter's
factors, R ranks of all its modules together, O outputs of all modules whose rows' lengths are trained (DoRA), W weights
that an adapter trains whole, S ranks that divide the model, U weights of a layer or of what is in none. An element of
the model and of activations has 2 bytes (bfloat16).

Memory, in bytes:

    weights         2 P; a reference that is kept beside all weights 2 P more. Of a base in INT8 or NF4 2 for what is no
                    linear layer's, `lm.precision.weight_bytes` for each of those; and on a GPU, and with SELECTIVE, 2
                    for each weight that one product has at a time: those of layers with one input (gate and up)
    adapters        4 A + 2 W
    gradients       4 (A + W), or 4 P of all weights, which are summed in float32
    optimiser       8 (A + W) of moments and 4 W of masters; 12 P of all weights; 2.03 in place of 8 where
                    moments have 8 bits; where those of a GPU are in main memory 8 for each weight of the largest
                    tensor, whose update they are there for
    activations     2 T L times what a layer keeps of a token, and once what is passing through a layer
      NONE          4 E + 2 H D + 2 G D + 3 F: both norms' inputs and outputs, turned queries and keys, values, what
                    attention gave, gate, up and their product; E more for each norm behind a block (Gemma 2), H D + G D
                    where heads are normed (Qwen 3); 8 H bytes of attention's statistics; R / L of low ranks; 4 O / L
                    bytes of what lengths are multiplied with; F more where plain torch activates gates on a processor
      SELECTIVE     3 E + 2 H D + 2 G D + 2 F: the input, and what products and attention gave
      FULL          E: the input
      trained norms 6 E bytes more for each norm of a layer, which plain torch computes in float32
      passing       gradients of the MLP, 3 F + 3 E; where layers are computed again what NONE keeps besides, once
    logits          N positions' hidden states in 2 bytes, and a gradient in 4 for each number that is read of them: our
                    kernels hold no logits. Of a trained head V E float32 sums, again where they are scaled, and 2 V E
                    of its own; where plain torch makes logits, 16 V bytes for each of as many rows as fit in 512 MiB
    cache           4 L G D for each token whose keys and values are held while answers are drawn, which is before a
                    pass is made: what counts is the larger of the two
      holes         on a processor glibc leaves some memory unused between what is kept and what is freed: `_HOLES`
    runtime         the libraries, and 9 bytes a token of the rows

Of a model that S ranks divide, each of them holds an S-th of weights, adapters, gradients, optimiser and a reference,
and besides:

    weights         what is in no layer whole, 2 U, and three layers: one that computes, one that comes, and what it
                    comes in, on a processor one more, which gloo puts together; of all weights no other copy than
                    these, as the masters are the parts
    gradients       of all weights 8 U of the largest unit: as autograd made them, in float32 on their way, and the sums
    holes           none: what is freed goes back to the system (`shards.LARGEST_KEPT_BYTES`)
    cache           2 P while answers are drawn, for which each rank has all of the model
    reference       4 P / S while all weights make room for those that they began from

Time is products, in floating-point operations, over the rate of products, and bytes over the rate of memory:

    products        a token's pass forward 2 times the weights of its linear layers, and 4 H D for each token that it
                    sees; backward as much again for its gradient, 2.5 times of attention; a third time for weights that
                    are trained. A scored position 2 V E forward, as much for its gradient, again for a trained head.
                    FULL computes layers forward a second time, a reference once more
    bytes           what layers keep without checkpointing, as often as a device moves it for all that is no product,
                    again where it is computed again; 30 bytes for each weight that an update changes; all weights once
                    for each token of an answer that is drawn. Quantised ones are read besides, on a GPU and
                    with SELECTIVE also written in bfloat16: for each such token, and twice a step, which has one pass
                    at least

Sources: activations as autograd keeps them for the operators of `luthier.kernels`; the way of counting is that of
arXiv:2205.05198 (activations), arXiv:1910.02054 (optimiser) and arXiv:2001.08361 (operations). What was
measured (`_HOLES`, `_ATTENTION`, `_QUICK`, rates) is held by `tests/benchmarks/test_calibration.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from luthier.lm.kept import Checkpointing
from luthier.lm.precision import Precision, weight_bytes
from luthier.lm.shape import ModelShape

Read = Literal["LOSS", "LOGPROBS", "LOGPROBS_AND_ENTROPIES", "VALUES"]
"""What a method reads at the end of a pass."""
Place = Literal["CPU", "GPU"]
_ELEMENT = 2
_BUDGET_BYTES = 512 * 2**20
"""As `kernels.linear_cross_entropy.DEFAULT_BUDGET_BYTES`."""
_LOGIT_BYTES = 16
"""As `kernels.linear_cross_entropy.BYTES_OF_LOGIT`."""
_LAYERS_IN_FLIGHT = {"CPU": 4, "GPU": 3}
"""Of a model that ranks divide."""
_RUNTIME_BYTES = {"CPU": 480 * 2**20, "GPU": 700 * 2**20}
"""Libraries that are loaded; on a GPU its context and the kernels, not what is in main memory."""
_ROW_TOKEN_BYTES = 9
_OVERHEAD = 1.05
"""What torch's allocator on a GPU holds over what it was asked for."""
_HOLES: Mapping[Checkpointing, tuple[float, float]] = {
    "NONE": (0.12, 0.0),
    "SELECTIVE": (0.0, 0.15),
    "FULL": (0.0, 0.3),
}
"""What glibc leaves unused between what layers keep, of what NONE keeps of a layer and of what passes through one."""
_PLAIN_HOLES, _QUANTISED_HOLES = 0.2, 0.1
"""With FULL what passes through a layer leaves more where plain torch activates gates, and beside a quantised base."""
_ATTENTION = 1.6
"""How much longer an operation of attention takes than one of a product."""
_MOMENT_BLOCK = 256
"""As `kernels.adamw_8bit.BLOCK`."""
_LEAST_IN_8_BITS = 4096
"""Weights of a tensor whose moments may have 8 bits, as bitsandbytes and torchao have it."""
_QUICK = 0.7
"""Of what is not products: what SELECTIVE computes again."""
_UPDATE_BYTES = 30
"""For a weight that an update changes: gradient, master and moments read and written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a run trains, and how.

    Attributes:
        shape: of the model.
        is_whole: whether all weights are trained; else an adapter is.
        precision: what the base model's linear layers are held in.
        num_factors: A.
        sum_of_ranks: R.
        num_scaled: O.
        num_whole: W.
        num_in_8_bits: weights whose moments have 8 bits.
        offloads_moments: whether a GPU has moments only while it changes their weights.
        has_trained_head: whether the matrix that makes logits is trained.
        read: what is read at the end of a pass.
        holds_logits: whether plain torch makes the logits of a frozen head on a processor, as our kernels hold none.
        keeps_gates: whether plain torch activates an MLP's gates on a processor, which keeps them activated too.
        has_reference: whether what is learnt is compared with the weights that the run began from: a pass more.
        keeps_reference: whether these are kept beside those that train.
        other_bytes: of reward models that are loaded beside.
        num_parts: S; 1: each rank has all of the model.
        num_samples: answers drawn to a prompt; 0: none is.
        max_new_tokens: of each of them.
    """

    shape: ModelShape
    is_whole: bool
    precision: Precision = "BFLOAT16"
    num_factors: int = 0
    sum_of_ranks: int = 0
    num_scaled: int = 0
    num_whole: int = 0
    num_in_8_bits: int = 0
    offloads_moments: bool = False
    has_trained_head: bool = False
    read: Read = "LOSS"
    holds_logits: bool = False
    keeps_gates: bool = False
    has_reference: bool = False
    keeps_reference: bool = False
    other_bytes: int = 0
    num_parts: int = 1
    num_samples: int = 0
    max_new_tokens: int = 0

    @property
    def num_trained(self) -> int:
        """Weights that an update changes."""
        return self.shape.num_parameters if self.is_whole else self.num_factors + self.num_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestPass:
    """The largest pass of a run.

    Attributes:
        num_tokens: T.
        num_scored: N.
        num_cached: tokens whose keys and values are held while answers are drawn.
    """

    num_tokens: int
    num_scored: int
    num_cached: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Most memory that a run takes at a time, in bytes; see the module for each."""

    weights: int
    adapters: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    cache: int
    runtime: int

    @property
    def peak(self) -> int:
        """All that is there at once: a pass, or answers that are drawn."""
        lasting = self.weights + self.adapters + self.gradients + self.optimiser + self.runtime
        return lasting + max(self.activations + self.logits, self.cache)


def footprint(
    trained: Trained,
    largest: LargestPass,
    kept: Checkpointing,
    place: Place = "CPU",
    num_row_tokens: int = 0,
) -> Footprint:
    """Return what a run takes whose layers keep so much; `num_row_tokens` are those of all its rows."""
    shape, P, S = trained.shape, trained.shape.num_parameters, trained.num_parts
    A, W = trained.num_factors, trained.num_whole
    cache = 2 * _ELEMENT * shape.layers * shape.key_heads * shape.head_size * largest.num_cached
    if S > 1 and trained.num_samples:
        cache += _ELEMENT * P
    in_flight = 8 * max(_units(shape)) if S > 1 and trained.is_whole else 0
    return Footprint(
        weights=_weights_bytes(trained, kept, place) + trained.other_bytes,
        adapters=0 if trained.is_whole else (4 * A + _ELEMENT * W) // S,
        gradients=4 * trained.num_trained // S + in_flight,
        optimiser=(moments_bytes(trained, place) + 4 * (P if trained.is_whole else W)) // S,
        activations=activation_bytes(trained, largest.num_tokens, kept, place),
        logits=_logits_bytes(trained, largest.num_scored, place),
        cache=cache,
        runtime=_RUNTIME_BYTES[place] + _ROW_TOKEN_BYTES * num_row_tokens,
    )


def has_8_bits(num_weights: int) -> bool:
    """Whether moments of 8 bits are worth it for a tensor of so many weights: there are many, and whole blocks."""
    return num_weights >= _LEAST_IN_8_BITS and num_weights % _MOMENT_BLOCK == 0


def moments_bytes(trained: Trained, place: Place) -> int:
    """Return the most bytes of moments, both of each weight that an update changes, that are there at once."""
    if trained.offloads_moments and place == "GPU":
        shape = trained.shape
        return 8 * max(shape.vocabulary * shape.hidden, *(one.inputs * one.outputs for one in shape.linears))
    in_8_bits = trained.num_in_8_bits
    return 8 * (trained.num_trained - in_8_bits) + 2 * (in_8_bits + 4 * in_8_bits // _MOMENT_BLOCK)


def _weights_bytes(trained: Trained, kept: Checkpointing, place: Place) -> int:
    """Return what is there of the model to compute with, and of a reference."""
    P, S = trained.shape.num_parameters, trained.num_parts
    if S == 1:
        held = _held_bytes(trained, makes_numbers=place == "GPU" or kept == "SELECTIVE")
        return held * (2 if trained.keeps_reference else 1)
    layer, rest = _units(trained.shape)
    parts = 0 if trained.is_whole else _ELEMENT * P // S
    reference = (_ELEMENT + 4) * P // S if trained.keeps_reference else 0
    return parts + reference + _ELEMENT * (_LAYERS_IN_FLIGHT[place] * layer + rest)


def _units(shape: ModelShape) -> tuple[int, int]:
    """Return U: the weights of a layer, and those that are in none."""
    rest = shape.vocabulary * shape.hidden * (1 if shape.is_tied else 2) + shape.hidden
    return (shape.num_parameters - rest) // shape.layers, rest


def _held_bytes(trained: Trained, *, makes_numbers: bool) -> int:
    """Return the bytes of the model's weights, and of the numbers that are made of quantised ones for a product.

    Our own products make them in pieces that lie in a cache (`makes_numbers` false).
    """
    shape = trained.shape
    if trained.precision == "BFLOAT16":
        return _ELEMENT * shape.num_parameters
    kept = _ELEMENT * (shape.num_parameters - shape.num_products) + _quantised_bytes(trained)
    if not makes_numbers:
        return kept
    together: dict[tuple[str, int], int] = {}
    for one in shape.linears:
        block = one.name.partition(".")[0], one.inputs
        together[block] = together.get(block, 0) + one.inputs * one.outputs
    return kept + _ELEMENT * max(together.values())


def _quantised_bytes(trained: Trained) -> int:
    """Return the bytes of the linear layers as they are held."""
    linears = trained.shape.linears
    return trained.shape.layers * sum(
        weight_bytes(trained.precision, one.outputs, one.inputs) for one in linears
    )


def activation_bytes(trained: Trained, num_tokens: int, kept: Checkpointing, place: Place) -> int:
    """Return what the layers keep of so many tokens, and what is passing through one of them."""
    shape = trained.shape
    E, F, queries, keys = _widths(shape)
    once = _kept_by_none(trained) + (_ELEMENT * F if place == "CPU" and trained.keeps_gates else 0)
    gradients = _ELEMENT * (3 * F + 3 * E)
    low_ranks = _ELEMENT * trained.sum_of_ranks // shape.layers
    match kept:
        case "NONE":
            layer, again = once, 0
        case "SELECTIVE":
            statistics = 8 * shape.heads
            layer = _ELEMENT * (3 * E + 2 * queries + 2 * keys + 2 * F) + statistics + low_ranks
            again = once - _ELEMENT * (E + queries + keys + 2 * F) - statistics - low_ranks
        case "FULL":
            layer = _ELEMENT * E
            again = once - layer
    of_once, of_gradients = _HOLES[kept]
    if kept == "FULL":
        of_gradients += _PLAIN_HOLES * trained.keeps_gates
        of_gradients += _QUANTISED_HOLES * (trained.precision != "BFLOAT16")
    holes = of_once * once + of_gradients * gradients if trained.num_parts == 1 else 0
    if place == "GPU":
        holes = (_OVERHEAD - 1) * layer
    ends = _ELEMENT * 3 * E
    return round(num_tokens * (shape.layers * (layer + holes) + again + gradients + ends))


def _widths(shape: ModelShape) -> tuple[int, int, int, int]:
    """Return E, F, H D and G D."""
    return shape.hidden, shape.inner, shape.heads * shape.head_size, shape.key_heads * shape.head_size


def _kept_by_none(trained: Trained) -> int:
    """Return the bytes that a layer keeps of a token whose gradient needs all of them."""
    shape = trained.shape
    E, F, queries, keys = _widths(shape)
    elements = 4 * E + 2 * queries + 2 * keys + 3 * F
    elements += (shape.norms - 2) * E + (queries + keys if shape.has_head_norms else 0)
    elements += trained.sum_of_ranks // shape.layers
    # In float32 what goes in and what is normed; what goes in is then not kept besides.
    norms = 6 * E * shape.norms if trained.is_whole else 0
    return _ELEMENT * elements + norms + 8 * shape.heads + 4 * trained.num_scaled // shape.layers


def _logits_bytes(trained: Trained, num_scored: int, place: Place) -> int:
    E, V = trained.shape.hidden, trained.shape.vocabulary
    if trained.read == "VALUES":
        return 0
    gradients = {"LOSS": 1, "LOGPROBS": 1, "LOGPROBS_AND_ENTROPIES": 2}[trained.read]
    rows = num_scored * E * (_ELEMENT + 4 * gradients)
    if not trained.has_trained_head:
        is_held = place == "GPU" or trained.holds_logits
        chunk = min(_BUDGET_BYTES, _LOGIT_BYTES * V * num_scored) if is_held else 0
        return rows + chunk
    chunk = min(_BUDGET_BYTES, _LOGIT_BYTES * V * num_scored)
    head = V * E * (4 + 4 + _ELEMENT if trained.read == "LOSS" else _ELEMENT)
    return rows + max(chunk + 4 * V * E, head)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the steps of a run pass through.

    Attributes:
        num_tokens: tokens of all steps' rows.
        num_scored: of them those that are scored.
        num_seen: for each token those of its row up to itself, added up.
        num_steps: updates.
        num_drawn: tokens of answers that are drawn, one after another.
    """

    num_tokens: int
    num_scored: int
    num_seen: int
    num_steps: int
    num_drawn: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What a device reaches.

    Attributes:
        operations: a second, of products in bfloat16.
        trained_head: the same of those of a head that is trained, whose logits are held.
        bytes: that memory moves a second.
        moves: how often what a layer keeps is moved; 0: `operations` allows for it.
        makes_numbers: whether a product first writes to memory what a quantised weight stands for.
    """

    operations: float
    trained_head: float
    bytes: float
    moves: float = 0.0
    makes_numbers: bool = False


def seconds(trained: Trained, work: Work, kept: Checkpointing, speed: Speed) -> float:
    """Return how long the steps of a run take; loading, validations and checkpoints are not counted."""
    shape = trained.shape
    layers = 2 * shape.num_products * work.num_tokens
    seen = _ATTENTION * 4 * shape.layers * shape.heads * shape.head_size * work.num_seen
    head = 0 if trained.read == "VALUES" else 2 * shape.vocabulary * shape.hidden * work.num_scored
    forward, again = layers + seen, {"NONE": 0.0, "SELECTIVE": _QUICK, "FULL": 1.0}[kept]
    passes = forward + layers + 2.5 * seen
    passes += layers if trained.is_whole else 6 * trained.num_factors * work.num_tokens
    passes += forward if kept == "FULL" else 0
    if trained.has_reference:
        passes += forward + head
    heads = 3 * head / speed.trained_head if trained.has_trained_head else 2 * head / speed.operations
    # Forward and backward, and forward once more for what is computed again and for a reference.
    more = (again + trained.has_reference) / 3
    moved = speed.moves * (1 + more) * shape.layers * _kept_by_none(trained) * work.num_tokens
    moved += _UPDATE_BYTES * trained.num_trained * work.num_steps
    moved += _ELEMENT * shape.num_parameters * work.num_drawn
    if trained.precision != "BFLOAT16":
        made = _ELEMENT * shape.num_products if speed.makes_numbers or kept == "SELECTIVE" else 0
        moved += (_quantised_bytes(trained) + made) * (2 * work.num_steps + work.num_drawn)
    return passes / speed.operations + heads + moved / speed.bytes
