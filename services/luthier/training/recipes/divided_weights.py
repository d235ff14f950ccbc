"""All weights of a model that is divided among ranks: each changes its parts, and writes them into its own files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.lm.packed import PackedBatch
from luthier.training.recipes.masters import with_gradients
from luthier.training.recipes.parts import is_part, part_files, read_parts, write_parts
from luthier.training.recipes.shards import Division, Shards
from luthier.training.recipes.weights import (
    CONFIG_NAME,
    MASTERS,
    MASTERS_NAME,
    MODEL_NAME,
    SCORE,
    classifier_config,
    model_state,
    train_all,
    with_score,
)
from luthier.training.recipes.whole_file import write_whole


class DividedWeights:
    """Every weight of a model that it divides, as float32 masters, which are rounded on their way into a pass.

    Memory besides activations: 16 bytes a weight, divided by the ranks, and some layers and what is in no layer whole.
    `model.safetensors` and `config.json` are what transformers loads, put together by the first rank one tensor at a
    time; masters are written by each rank. With a `score` head it is a reward model; each rank has that whole.
    """

    result_files: tuple[str, ...] = (CONFIG_NAME, MODEL_NAME)
    keeps_parts = True
    rates: Mapping[str, float] = MappingProxyType({})
    _start: Mapping[str, Tensor] | None = None

    def __init__(
        self, model: PreTrainedModel, division: Division, *, score: nn.Parameter | None = None
    ) -> None:
        self.model = model
        train_all(model, has_score=score is not None)
        self.shards = Shards(model, division, has_masters=True)
        self._score = score
        # A tied head is the embedding, and has its name alone.
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.divided: Mapping[str, nn.Parameter] = dict(sorted(trained.items()))
        parts = {name: self.shards.part(weight) for name, weight in self.divided.items()}
        self.parameters: Mapping[str, nn.Parameter] = with_score(parts, score)
        with_gradients(self.parameters)

    def publish(self) -> None:
        """Leave the model as it is: its next pass takes what the parts are then."""

    @torch.no_grad()
    def keep_start(self) -> None:
        """Keep what the weights are now, a copy of the parts in the model's type, as the reference."""
        self._start = {name: part.to(self.shards.dtype, copy=True) for name, part in self.parameters.items()}

    def reference(self) -> AbstractContextManager[None] | None:
        """Return a block in which the model has the weights of `keep_start`; None where they were not kept."""
        return None if self._start is None else self._exchanged(self._start)

    @contextmanager
    def _exchanged(self, start: Mapping[str, Tensor]) -> Iterator[None]:
        now = {name: part.detach().clone() for name, part in self.parameters.items()}
        try:
            self._copy(start)
            yield
        finally:
            self._copy(now)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, part in self.parameters.items():
            part.copy_(values[name])

    def dropping(self, batch: PackedBatch, step: int) -> AbstractContextManager[None]:  # noqa: ARG002
        """Return a block that drops nothing."""
        return nullcontext()

    def save(self, folder: Path, rank: int = 0) -> list[Path]:
        """Write this rank's masters; the first one also the model in the type that it computes with, and its config."""
        folder.mkdir(parents=True, exist_ok=True)
        masters: dict[str, Tensor] = {name: weight.detach() for name, weight in self.divided.items()}
        if self._score is not None and rank == 0:
            masters[SCORE] = self._score.detach()
        return [*self._save_whole(folder, rank), *write_parts(folder, MASTERS, masters, rank)]

    def _save_whole(self, folder: Path, rank: int) -> list[Path]:
        state = model_state(self.model, self.parameters, self._score)
        forms = {
            name: (tensor.shape, self.shards.dtype if name in self.divided else tensor.dtype)
            for name, tensor in sorted(state.items(), key=self._place)
        }
        every = self.shards.whole(
            (name, state[name].detach().to(dtype)) for name, (_, dtype) in forms.items()
        )
        if rank:
            for _ in every:
                pass
            return []
        write_whole(folder / MODEL_NAME, forms, every)
        config: Any = self.model.config if self._score is None else classifier_config(self.model)
        config.save_pretrained(folder)
        return [folder / name for name in self.result_files]

    def _place(self, named: tuple[str, Tensor]) -> tuple[int, str]:
        """Return where a tensor stands in the file: as safetensors has it, wide ones first."""
        name, tensor = named
        dtype = self.shards.dtype if name in self.divided else tensor.dtype
        return -dtype.itemsize, name

    def needs(self, name: str) -> bool:
        """Whether `load` reads a file of this name."""
        return name in (*self.result_files, MASTERS_NAME) or is_part(name, MASTERS)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Put masters in place of these parts, also those that one rank wrote whole. Raises DataLoss."""
        # A model that computes in float32 is its masters.
        whole = [path for name in (MASTERS_NAME, MODEL_NAME) if (path := folder / name).exists()]
        files = part_files(folder, MASTERS) or whole[:1]
        into: dict[str, Tensor] = dict(self.divided)
        if self._score is not None:
            into[SCORE] = self._score
        read_parts(files, into)
