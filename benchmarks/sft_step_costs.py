"""The time of one training step, divided into groups of operators."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

OTHER = "Python and the rest"
LOSS = "loss and vocabulary"

# An event belongs to the first group that its own name, or that of an event around it, matches; what works on a
# tensor as wide as the vocabulary belongs to the loss.
_GROUPS: tuple[tuple[str, str], ...] = (
    ("optimiser", r"Optimizer\.|clip_grad"),
    (
        LOSS,
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


def group_costs(events: Iterable[Any], seconds: float, vocab_size: int) -> Costs:
    """Divide the wall time of a profiled step.

    Args:
        events: torch.profiler's FunctionEvents; each counts for the time that no event inside it took.
        seconds: the step's wall time; what no event took is OTHER.
        vocab_size: width of the logits.
    """
    groups: dict[str, float] = defaultdict(float)
    operators: dict[str, float] = defaultdict(float)
    for event in events:
        own = event.self_cpu_time_total / 1e6
        groups[_group(event, vocab_size)] += own
        operators[event.name] += own
    groups[OTHER] += max(0.0, seconds - sum(groups.values()))
    return Costs(seconds=seconds, groups=_largest(groups, len(groups)), operators=_largest(operators, 12))


def _group(event: Any, vocab_size: int) -> str:
    shapes = getattr(event, "input_shapes", None) or []
    if (
        any(vocab_size in shape for shape in shapes if isinstance(shape, list))
        and "embedding" not in event.name
    ):
        return LOSS
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
