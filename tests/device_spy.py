"""Finds, without a GPU, what would fail on one: tensors of the processor among those of the device.

It plays that the processor is a device of its own. A tensor is on the device once it was moved there by `to`, made with
an explicit `device`, or made from one that is; all others are on the host. An operator that is given some of both, and
a tensor of the device that is taken as an array, would fail on a GPU: they are noted with their place in our code.
What is made of tensors, as torchao's quantised weights are, is where all of these are.
What autograd computes by itself is not seen: it works on the devices of what it was given.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_MOVES = frozenset({"torch.Tensor.copy_", "torch.Tensor.data.__set__", "_has_compatible_shallow_copy_type"})
"""What may be given tensors of two places: it moves them, or only looks."""
_TO_HOST = frozenset({"torch.Tensor.cpu"})
_DEVICE = "torch.Tensor.device.__get__"
_HOST = torch.device("cpu", 0)
"""What a tensor on the host says of its place, so that what is made beside it is there, too."""
_AS_ARRAY = frozenset({"torch.Tensor.numpy", "torch.Tensor.__array__"})


class DeviceSpy(TorchFunctionMode):
    """Active in a block; `found` holds what would have failed.

    Attributes:
        found: operator and place of each fault, once.
        num_on_device: calls that were given a tensor of the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, None] = {}
        self.num_on_device = 0
        self._addresses: set[int] = set()
        self._from_numpy: Callable[..., Tensor] = torch.from_numpy

    def __enter__(self) -> Self:
        torch.from_numpy = self._made_on_host  # type: ignore[assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *words: Any) -> None:
        super().__exit__(*words)  # type: ignore[no-untyped-call]
        torch.from_numpy = self._from_numpy

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch._C._current_graph_task_id() != -1:  # in a backward pass
            return func(*args, **kwargs)
        name = resolve_name(func) or getattr(func, "__name__", "")
        given = list(_tensors((args, kwargs)))
        if name == _DEVICE:
            place = func(*args, **kwargs)
            return _HOST if place.type == "cpu" and not self.is_on_device(given[0]) else place
        here = [one for one in given if self.is_on_device(one)]
        self.num_on_device += bool(here)
        self._check(name, given, here)
        result = func(*args, **kwargs)
        if name in _TO_HOST:
            return self._marked(result.clone(), on_device=False)
        if name == "torch.Tensor.to" and _names_device(args[1:], kwargs):
            return self._marked(result.clone(), on_device=True)
        on_device = bool(here) or kwargs.get("device") not in (None, _HOST)
        for one in _tensors(result):
            self._marked(one, on_device=on_device)
        return result

    def is_on_device(self, tensor: Tensor) -> bool:
        """Tell where a tensor is; an empty one is nowhere."""
        return all(_address(part) in self._addresses for part in _parts(tensor))

    def _check(self, name: str, given: list[Tensor], here: list[Tensor]) -> None:
        if here and name in _AS_ARRAY:
            self._note(f"{name} of a tensor on the device")
        if not here or name in _MOVES:
            return
        # torch takes a number of the processor anywhere.
        foreign = [one for one in given if not self.is_on_device(one) and one.dim() and one.numel()]
        if foreign:
            self._note(
                f"{name} of {len(here)} tensors on the device and one {tuple(foreign[0].shape)} that is not"
            )

    def _note(self, fault: str) -> None:
        frames = [one for one in traceback.extract_stack() if "/luthier/" in one.filename]
        place = (
            f"{frames[-1].filename.rpartition('/luthier/')[2]}:{frames[-1].lineno}" if frames else "a test"
        )
        self.found[f"{place}: {fault}"] = None

    def _marked(self, tensor: Tensor, *, on_device: bool) -> Tensor:
        for address in map(_address, _parts(tensor)):
            if address:
                (self._addresses.add if on_device else self._addresses.discard)(address)
        return tensor

    def _made_on_host(self, array: Any) -> Tensor:
        return self._marked(self._from_numpy(array), on_device=False)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield what a tensor is made of: itself, or those that one of a class of its own is put together from."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _names_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    named = (*args, kwargs.get("device"))
    return any(isinstance(one, torch.device | str) and one != _HOST for one in named)
