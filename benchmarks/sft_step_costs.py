"""The time of one training step, divided into groups of operators."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

OTHER = "Python and the rest"

# An event belongs to the first group that its own name, or that of an event around it, matches.
_GROUPS: tuple[tuple[str, str], ...] = (
    ("optimiser", r"Optimizer\.|clip_grad"),
    (
        "loss and vocabulary",
        r"cross_entropy|CrossEntropy|log_?prob|LogProb|log_softmax|LogSoftmax|[nN]ll_?[lL]oss",
    ),
    ("attention", r"scaled_dot_product|ScaledDotProduct|attention|Attention"),
    (
        "matmul",
        r"lora_linear|LoraLinear|aten::(mm|addmm|addmm_|bmm|baddbmm|mkldnn_\w*|linear|matmul)$|mkldnn|onednn",
    ),
    (
        "copies and casts",
        r"aten::(copy_|_to_copy|to|contiguous|clone|cat|index|index_select|embedding\w*|stack)$",
    ),
    ("element-wise", r"^aten::|rms_norm|rope|gated|swiglu|^graph_\d|cpp_fused|triton_"),
)
_COMPILED = tuple((name, re.compile(pattern)) for name, pattern in _GROUPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds by group, the largest first, and the operators that cost the most."""

    seconds: float
    groups: dict[str, float]
    operators: dict[str, float]


def group_costs(events: Iterable[Any], seconds: float) -> Costs:
    """Divide the wall time of a profiled step.

    Args:
        events: torch.profiler's FunctionEvents; each counts for the time that no event inside it took.
        seconds: the step's wall time; what no event took is OTHER.
    """
    groups: dict[str, float] = defaultdict(float)
    operators: dict[str, float] = defaultdict(float)
    for event in events:
        own = event.self_cpu_time_total / 1e6
        groups[_group(event)] += own
        operators[event.name] += own
    groups[OTHER] += max(0.0, seconds - sum(groups.values()))
    return Costs(seconds=seconds, groups=_largest(groups, len(groups)), operators=_largest(operators, 12))


def _group(event: Any) -> str:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for group, pattern in _COMPILED:
        if any(pattern.search(name) for name in names):
            return group
    return OTHER


def _largest(times: dict[str, float], count: int) -> dict[str, float]:
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return {name: round(value, 4) for name, value in ordered[:count]}
