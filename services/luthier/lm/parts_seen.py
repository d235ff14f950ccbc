"""What was read off a model's modules, and whether it is still so: when something made of them has to be made anew.

What was decided by that alone would be decided alike as long as nothing of it has changed.
"""

from __future__ import annotations

from operator import eq, is_
from typing import Any

from torch import Tensor, nn

from luthier.kernels.dequantise import is_quantised
from luthier.kernels.dequantise.cpu import address_of


class PartsSeen:
    """Modules that were looked at, in the places where they stood, with their hooks, weights and settings.

    Every token that is made asks whether they are unchanged: lists stand beside each other, so that C goes over them.
    """

    def __init__(self) -> None:
        self._holders: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._found: list[Any] = []
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []
        self._quantised: list[Tensor] = []
        self._quantised_addresses: list[int] = []
        self._counted: list[dict[Any, Any]] = []
        self._counts: list[int] = []

    def are_unchanged(self) -> bool:
        """Whether modules stand where they stood with as many hooks, and weights are what they were, where they lay."""
        return (
            all(map(is_, map(dict.get, self._holders, self._names), self._found))
            and all(map(eq, map(len, self._counted), self._counts))
            and all(map(eq, map(Tensor.data_ptr, self._tensors), self._addresses))
            and all(map(eq, map(address_of, self._quantised), self._quantised_addresses))
        )

    def look(self, holder: dict[str, Any], name: str) -> Any:
        """Return what is held under a name, None: nothing. It has to stay that very object."""
        found = holder.get(name)
        self._holders.append(holder)
        self._names.append(name)
        self._found.append(found)
        return found

    def count(self, holder: dict[Any, Any]) -> int:
        """Return how much is held, which has to stay as much."""
        self._counted.append(holder)
        self._counts.append(len(holder))
        return len(holder)

    def weight(self, holder: dict[str, Any], name: str) -> Tensor:
        """Return a tensor that is held. It has to stay where it lies; what is written there may change."""
        found: Tensor = self.look(holder, name)
        # One of another class may stand for parts that lie elsewhere, and lie nowhere itself.
        if type(found) in (Tensor, nn.Parameter):
            self._tensors.append(found)
            self._addresses.append(found.data_ptr())
        elif is_quantised(found):
            self._quantised.append(found)
            self._quantised_addresses.append(address_of(found))
        return found

    def child(self, module: nn.Module, name: str) -> Any:
        """Return the module that stands below another one under a name, None: none does."""
        return self.look(module._modules, name)

    def is_intercepted(self, module: nn.Module) -> bool:
        """Whether others than its class have a say when a module is called: by hooks, or a forward of its own."""
        num_hooks = self.count(module._forward_hooks) + self.count(module._forward_pre_hooks)
        return num_hooks > 0 or self.look(module.__dict__, "forward") is not None
