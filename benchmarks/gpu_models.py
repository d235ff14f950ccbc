"""Whose shapes `gpu.py` takes, and how much of them: on a device, and in a dry run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle

import torch

SCALE = 2
"""Of every LoRA update."""
EPSILON = 1e-5
"""Of every norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The shapes of a model."""

    name: str
    kind: str
    hidden: int
    feed_forward: int
    vocab: int
    heads: int
    key_heads: int
    head_dim: int
    layers: int
    is_tied: bool


MODELS = (
    Model(
        name="SmolLM2-135M",
        kind="llama",
        hidden=576,
        feed_forward=1536,
        vocab=49152,
        heads=9,
        key_heads=3,
        head_dim=64,
        layers=30,
        is_tied=True,
    ),
    Model(
        name="Llama-3.2-1B",
        kind="llama",
        hidden=2048,
        feed_forward=8192,
        vocab=128256,
        heads=32,
        key_heads=8,
        head_dim=64,
        layers=16,
        is_tied=True,
    ),
    Model(
        name="Llama-3.1-8B",
        kind="llama",
        hidden=4096,
        feed_forward=14336,
        vocab=128256,
        heads=32,
        key_heads=8,
        head_dim=128,
        layers=32,
        is_tied=False,
    ),
    Model(
        name="Qwen2.5-7B",
        kind="qwen2",
        hidden=3584,
        feed_forward=18944,
        vocab=152064,
        heads=28,
        key_heads=4,
        head_dim=128,
        layers=28,
        is_tied=False,
    ),
)


def shrunk(model: Model) -> Model:
    """A model of the same kind that a processor gets through in a blink."""
    return replace(model, hidden=64, feed_forward=96, vocab=320, heads=4, key_heads=2, head_dim=16, layers=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where and how much: a device, a dtype, tokens of a step's pass, labelled rows, adapters of a batch, their rank.

    `backend` is torch.compile's.
    """

    device: str
    dtype: torch.dtype
    lengths: tuple[int, ...]
    labelled: int
    adapters: int
    rank: int
    backend: str

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)


def with_tokens(setting: Setting, tokens: int) -> Setting:
    """The setting with sequences of its lengths, over and over, of so many tokens together; the last is cut."""
    lengths: list[int] = []
    for length in cycle(setting.lengths):
        if (left := tokens - sum(lengths)) <= 0:
            return replace(setting, lengths=tuple(lengths))
        lengths.append(min(length, left))
    raise AssertionError("a setting has lengths")


ON_DEVICE = Setting(
    device="cuda",
    dtype=torch.bfloat16,
    lengths=(100, 300, 64, 512, 200, 400, 250, 222, 1024, 1024),
    labelled=2048,
    adapters=16,
    rank=16,
    backend="inductor",
)
# bfloat16 is what Triton's interpreter gets wrong.
DRY = Setting(
    device="cpu",
    dtype=torch.float16,
    lengths=(5, 19),
    labelled=12,
    adapters=3,
    rank=4,
    backend="eager",
)

STEP_TOKENS = 8192
"""Of a whole training step on a device."""
DRY_STEP_TOKENS = 48
