"""A model whose weights are divided among the ranks: each holds a part of every weight, its gradient and its moments.

It is torch's FSDP2 (`fully_shard`; arXiv:2304.11277): a decoder layer is a unit, and what is left of the model another
one. A unit is whole on every rank while it computes, forward and again backward, and its gradients are summed into the
parts as soon as they are there. All that reads a pass happens inside of the root's own forward, where the head is
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from luthier.errors import FailedPrecondition, Reason
from luthier.lm.checkpointing import checkpointed_layers
from luthier.lm.memory import FilePages, give_back
from luthier.lm.packed import PackedBatch
from luthier.lm.readouts import Readout, ReadT, read
from luthier.training.recipes.collective import Collective
from luthier.training.recipes.exchanges import gather_parts, sum_parts

T = TypeVar("T")
LARGEST_KEPT_BYTES = 1 << 19
"""Blocks of memory that a processor keeps when they are freed, where ranks divide a model.

Units come and go between what layers keep. From glibc's heap, whose aligned blocks do not fit into holes of their own
size, that took more than the model has: larger blocks are mapped, each by itself.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Among whom a model is divided, and where the parts go.

    Attributes:
        collective: the ranks, of which a pass needs all.
        device: of this rank; the model may be elsewhere, and comes here unit by unit.
    """

    collective: Collective
    device: torch.device


class Shards:
    """Divides a model, in place; its parameters are DTensors then, bound to nothing that was bound before.

    What is frozen stays in its type, and what trains has to be float32. With `has_masters` what trains becomes that
    here, and computes in the type that the model had: the parts are the masters, and no other copy is kept.

    Raises:
        FailedPrecondition: SHARDING_INVALID, the model has no layers that could be units.
    """

    def __init__(self, model: PreTrainedModel, division: Division, *, has_masters: bool) -> None:
        layers: list[Any] = list(checkpointed_layers(model))
        if not layers:
            raise FailedPrecondition(
                f"a model that is divided among ranks must have decoder layers that transformers knows as such, "
                f"{type(model).__name__} has none; train it with sharding REPLICATED",
                reason=Reason.SHARDING_INVALID,
            )
        self.dtype: torch.dtype = model.dtype
        """What the model computes in."""
        self._collective = division.collective
        self._mesh = init_device_mesh(division.device.type, (division.collective.num_ranks,))
        self._layers = layers
        self._root: Any = _Root(model)
        policy = MixedPrecisionPolicy(
            # Of an adapter its factors, which no rounding may touch, and the frozen weights each in their own.
            param_dtype=self.dtype if has_masters else None,
            reduce_dtype=torch.float32,
            # Angles of rotary positions stay in float32.
            cast_forward_inputs=False,
        )
        pages = FilePages()
        for unit in (*layers, self._root):
            whole = [weight.detach() for weight in unit.parameters() if not isinstance(weight, DTensor)]
            if has_masters:
                _widen(unit)
            fully_shard(unit, mesh=self._mesh, mp_policy=policy)
            self._set_up(unit)
            # What they were mapped from stays mapped until the last of them is divided.
            for weight in whole:
                pages.give_back(weight)
            del whole
        give_back(division.device)

    def _set_up(self, unit: Any) -> None:
        # Sums are divided by counts of the whole step: a mean over ranks would divide twice. gloo knows only sums.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        # What a pass did not use on one rank (a muted adapter) it may have used on another.
        unit.set_reduce_scatter_unused_params(True)
        unit.set_custom_all_gather(_AllGather(self._collective))
        unit.set_custom_reduce_scatter(_ReduceScatter(self._collective))

    def part(self, weight: nn.Parameter) -> nn.Parameter:
        """Return what this rank has of a weight: a parameter in the same memory, and its gradient likewise.

        An optimiser that changes it changes what all ranks compute with next.
        """
        assert isinstance(weight, DTensor), "the model was divided before"
        part = nn.Parameter(_local(weight))
        part.grad = torch.zeros_like(part)
        # Where there is a gradient, FSDP adds to it: in float32, pass by pass.
        weight.grad = self.divided(part.grad, weight)
        return part

    def divided(self, part: Tensor, like: Tensor) -> DTensor:
        """Return this rank's part of something as what all ranks have of it together: in the shape of a weight."""
        assert isinstance(like, DTensor)
        return DTensor.from_local(
            part, self._mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def whole(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors, and whole what is divided, one after the other in main memory; all ranks ask together."""
        for name, tensor in tensors:
            found = tensor.detach()
            if isinstance(found, DTensor):
                found = self._put_together(found)
            yield name, found.cpu()

    def _put_together(self, tensor: DTensor) -> Tensor:
        part, num_ranks = _local(tensor), self._collective.num_ranks
        rows = -(-tensor.shape[0] // num_ranks)
        if len(part) < rows:
            part = torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])
        found = part.new_empty(num_ranks * rows, *part.shape[1:])
        gather_parts(self._collective, found.view(-1), part.reshape(-1), self._mesh.get_group())
        return found[: tensor.shape[0]]

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        """Copy what this rank has of whole tensors into divided ones; others are copied as they are."""
        for name, tensor in into.items():
            if not isinstance(tensor, DTensor):
                tensor.copy_(tensors[name])
                continue
            part = _local(tensor)
            chunks = torch.chunk(tensors[name], self._collective.num_ranks, dim=0)
            if self._collective.rank < len(chunks):
                part.copy_(chunks[self._collective.rank])

    def read(self, batch: PackedBatch, readout: Readout[ReadT]) -> ReadT:
        """Return what `lm.readouts.read` does; all ranks make a pass together."""
        found: ReadT = self._root(lambda model: _own(read(model, batch, readout)))
        if not torch.is_grad_enabled():
            # FSDP keeps it for a backward pass: that of before an update, where none came.
            self._root.reshard()
        return found

    @torch.no_grad()
    def alone(self, work: Callable[[], T]) -> T:
        """Return what `work` returns while this rank has all weights: its passes need nobody, however many it makes.

        All ranks call it, and come back when their own work is done. Takes the memory of the whole model.
        """

        def worked(_model: PreTrainedModel) -> T:
            for layer in self._layers:
                layer.unshard()
            return work()

        self._root.set_reshard_after_forward(False)
        try:
            found: T = self._root(worked)
        finally:
            self._root.reset_iter_state()
            for layer in self._layers:
                layer.set_reshard_after_forward(True, recurse=False)
        return found


class _Root(nn.Module):
    """A model whose forward is whatever is done with it: its weights that are in no layer are whole meanwhile."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[PreTrainedModel], T]) -> T:
        """Return what `work` makes of the model. Tensors that it holds are not FSDP's concern."""
        return work(self.model)


class _AllGather:
    """How a unit becomes whole; the driver sees who waits for whom."""

    def __init__(self, collective: Collective) -> None:
        self._collective = collective

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the memory of an exchange."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Put the parts of all ranks together."""
        if not async_op and output_tensor.device.type == "cpu":
            gather_parts(self._collective, output_tensor, input_tensor, group)
            return None
        # Begun and not awaited: nobody sees how long it takes.
        with self._collective.exchange(output_tensor.nbytes, is_awaited=False):
            work: dist.Work | None = dist.all_gather_single(
                output_tensor, input_tensor, group=group, async_op=async_op
            )
        return work


class _ReduceScatter:
    """How gradients are summed, each rank its part."""

    def __init__(self, collective: Collective) -> None:
        self._collective = collective

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the memory of an exchange."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Sum what all ranks have into the parts."""
        if not async_op and output_tensor.device.type == "cpu":
            sum_parts(self._collective, output_tensor, input_tensor, op, group)
            return None
        with self._collective.exchange(input_tensor.nbytes, is_awaited=False):
            work: dist.Work | None = dist.reduce_scatter_single(
                output_tensor, input_tensor, op=op, group=group, async_op=async_op
            )
        return work


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of what is divided, in the same memory."""
    found: Any = tensor.detach()
    part: Tensor = found.to_local()
    return part


def _own(found: Any) -> Any:
    """Return what a readout gave, a tensor or a named tuple of some, without views: FSDP's hooks get lost on those."""
    if isinstance(found, Tensor):
        return found.clone() if found._is_view() else found
    return type(found)(*map(_own, found)) if isinstance(found, tuple) else found


def _widen(unit: nn.Module) -> None:
    """Make what trains of a unit float32; that of units within it is divided already."""
    for weight in unit.parameters():
        if weight.requires_grad and not isinstance(weight, DTensor):
            weight.data = weight.data.float()
