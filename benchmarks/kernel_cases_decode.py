"""What `kernels.py` times of attention over caches: a new token of each row, as requests and evaluations have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from kernel_cases import Case, Model, Run
from torch import Tensor

from luthier.kernels.attention_decode import Cached, NewTokens, attention_decode, shape_class
from luthier.kernels.tables import Impl


class Setting(NamedTuple):
    """Rows of each cache, tokens that each holds, and tokens of the prefix that all see."""

    rows: tuple[int, ...]
    held: int
    prefix: int


SETTINGS = {
    "1 row after 200": Setting((1,), 200, 0),
    "1 row after 4,000": Setting((1,), 4000, 0),
    "32 rows after 200": Setting((32,), 200, 0),
    "64 rows after 80 behind 160": Setting((64,), 80, 160),
    "32 requests of a row after 200": Setting((1,) * 32, 200, 0),
    "2 requests of 32 rows after 80 behind 160": Setting((32, 32), 80, 160),
}


def decode_cases(dtypes: Sequence[torch.dtype], models: Sequence[Model]) -> Iterator[Case]:
    """All problems of the models' shapes."""
    for dtype in dtypes:
        for model in models:
            for name, setting in SETTINGS.items():
                yield Case(
                    op="attention_decode",
                    name=f"{model.name} decoding, {name}",
                    dtype=dtype,
                    shape_class=shape_class(len(setting.rows)),
                    make=partial(_decoding, model, dtype, setting),
                )


def _decoding(model: Model, dtype: torch.dtype, setting: Setting) -> dict[str, Run]:
    generator = torch.Generator().manual_seed(setting.held)
    heads = model.key_heads, model.head_dim

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    num_rows = sum(setting.rows)
    before = (heads[0], setting.prefix, heads[1])
    prefix = (drawn(*before), drawn(*before)) if setting.prefix else None
    room = heads[0], setting.held + 8, heads[1]
    caches = [Cached(drawn(rows, *room), drawn(rows, *room), prefix) for rows in setting.rows]
    new = NewTokens(
        drawn(num_rows, model.heads, heads[1]),
        drawn(num_rows, *heads),
        drawn(num_rows, *heads),
        (drawn(num_rows, heads[1]), drawn(num_rows, heads[1])),
    )
    spans, first = [(setting.held, setting.held + 1)] * len(caches), [row % 9 for row in range(num_rows)]

    def run(impl: Impl) -> None:
        with torch.inference_mode():
            attention_decode(new, caches, spans, first, scale=heads[1] ** -0.5, impl=impl)

    return {"cpu": partial(run, "cpu"), "eager": partial(run, "eager")}
