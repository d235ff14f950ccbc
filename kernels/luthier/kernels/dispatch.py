"""Which instruction set the CPU kernels run with."""

import functools
from typing import Literal, get_args

from luthier.kernels import _core

# amx_bf16 is what processors with tiles (AMX) run: bfloat16 is multiplied on them, by torch too.
Isa = Literal["plain", "avx2", "avx512", "avx512_bf16", "amx_bf16"]

_forced: Isa | None = None


@functools.cache
def available_isas() -> tuple[Isa, ...]:
    """The instruction sets this processor can run, slowest first."""
    return tuple(isa for isa in get_args(Isa) if _core.supports(isa))


def current_isa() -> Isa:
    """The forced instruction set, else the best this processor has."""
    return _forced or available_isas()[-1]


def force_isa(isa: Isa | None) -> None:
    """Run the CPU kernels of this process with `isa`; None goes back to the best.

    Raises:
        ValueError: this processor cannot run it.
    """
    global _forced  # noqa: PLW0603 - one choice per process, made by its configuration
    if isa is not None and isa not in available_isas():
        raise ValueError(f"isa must be one of {available_isas()}, got {isa!r}")
    _forced = isa
