"""Values of whole sequences, as a reward model gives them: packed, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.lm.lora import use_adapter
from luthier.lm.packed import pack
from luthier.lm.readouts import SequenceValues, read
from luthier.training.recipes.batches import Unit, pack_first_fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Valuer:
    """A reward model at work.

    Attributes:
        model: what computes, on its device.
        head: [1, E], float32: makes values of the hidden states at last tokens.
        adapter: the one in the model that the head belongs to; None: the model's own weights are the reward model's.
    """

    model: PreTrainedModel
    head: Tensor
    adapter: str | None = None

    @torch.no_grad()
    def values(
        self,
        sequences: Sequence[tuple[int, ...]],
        limit_tokens: int,
        check: Callable[[], None] = lambda: None,
    ) -> list[float]:
        """Return the value at the last token of each sequence, a float32 number that may not be finite.

        Equal sequences go through the model once, so that they have the very same value. A pass has `limit_tokens`, or
        those of a single longer sequence; `check` is called before each. The adapter that was active stays so.
        """
        known = dict.fromkeys(sequences, 0.0)
        units = [
            Unit(number=place, rows=(place,), num_tokens=len(one), num_supervised=0)
            for place, one in enumerate(known)
        ]
        every = tuple(known)
        limit = max([limit_tokens, *map(len, every)])
        with use_adapter(self.model, self.adapter):
            for places in pack_first_fit(units, limit):
                check()
                chosen = [every[place] for place in places]
                batch = pack(chosen, {}).to(self.model.device)
                found = read(self.model, batch, SequenceValues(head=self.head)).tolist()
                known.update(zip(chosen, found, strict=True))
        return [known[one] for one in sequences]
