"""What `kernels.py` times of weights and moments of 8 and 4 bits: making numbers of them, and updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from kernel_cases import Case, Model, Run

from luthier.kernels.adamw_8bit import Rates, adamw_8bit, fresh_moments
from luthier.kernels.dequantise import FORMATS, dequantise
from luthier.kernels.tables import Impl
from luthier.lm.precision import Precision

_PRECISIONS: dict[str, Precision] = {"int8": "INT8", "nf4": "NF4"}


def quantised_cases(dtypes: Sequence[torch.dtype], models: Sequence[Model]) -> Iterator[Case]:
    """All problems: the weight of an MLP of each model, in each format, and its update with moments of 8 bits."""
    for model in models:
        yield Case(
            op="adamw_8bit",
            name=f"{model.name} up_proj, update",
            dtype=torch.float32,
            shape_class="any",
            make=partial(_update, model),
        )
    for model in models if torch.bfloat16 in dtypes else ():
        for shape_class in FORMATS.values():
            yield Case(
                op="dequantise",
                name=f"{model.name} up_proj, {shape_class}",
                dtype=torch.bfloat16,
                shape_class=shape_class,
                make=partial(_made, model, _PRECISIONS[shape_class]),
            )


def _made(model: Model, precision: Precision) -> dict[str, Run]:
    # Not above: transformers takes `kernels`, whose cases these are, for a package of that name, and imports it.
    from luthier.lm.quantise import quantised

    generator = torch.Generator().manual_seed(model.hidden)
    given = torch.randn(model.feed_forward, model.hidden, generator=generator).mul(0.02).bfloat16()
    weight = quantised(given, precision)

    def run(impl: Impl) -> None:
        dequantise(weight, impl=impl)

    return {"cpu": partial(run, "cpu"), "eager": partial(run, "eager")}


def _update(model: Model) -> dict[str, Run]:
    rates = Rates(learning_rate=1e-4, weight_decay=0.0, betas=(0.9, 0.999), epsilon=1e-8, number=1)
    generator = torch.Generator().manual_seed(model.hidden)
    weight, grad = torch.randn(2, model.feed_forward, model.hidden, generator=generator)
    moments = fresh_moments(weight)

    def run(impl: Impl) -> None:
        adamw_8bit(weight, grad, moments, rates, impl=impl)

    return {"cpu": partial(run, "cpu"), "eager": partial(run, "eager")}
