"""What a run trains: an adapter of a model, or all of its weights.

An engine asks for names and parameters, and to put changes into the model; a checkpoint asks for files. Neither knows
which of the two it has. Weights of a model that is divided among ranks are its parts: an adapter divides its model
before it is bound to it, all weights have a class of their own (`divided_weights`).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedModel

from luthier.errors import InvalidArgument, Reason
from luthier.lm import adapter_files
from luthier.lm.head import output_head
from luthier.lm.load import eos_token_ids
from luthier.lm.lora import (
    activate,
    adapter_parameters,
    dropping,
    find_adapter,
    muted,
    trained_weights,
    use_adapter,
)
from luthier.lm.packed import PackedBatch
from luthier.lm.trained_weights import is_tied
from luthier.training.recipes.masters import (
    mastered,
    on_host,
    put,
    read_tensors,
    round_into,
    with_gradients,
)
from luthier.training.recipes.parts import is_part, part_files, read_parts
from luthier.training.recipes.shards import Division, Shards

MODEL_NAME = "model.safetensors"
MASTERS_NAME = "masters.safetensors"
MASTERS = "masters"
"""Stem of the files that hold parts of masters."""
CONFIG_NAME = "config.json"
SCORE = "score.weight"
"""Name of a reward model's head among the parameters, as transformers has it."""


class Weights(Protocol):
    """Parameters that train, and the files that hold them.

    Attributes:
        model: what computes with them.
        parameters: what the optimiser changes: float32, by name, in sorted order. Each has a gradient from the start,
            in which autograd sums in float32. Of a divided model they are this rank's parts.
        result_files: names of those files of `save` that are the run's result: what others load.
        keeps_parts: whether each rank writes its parts into files of its own.
        rates: what the learning rate of some parameters is multiplied by, by name; of all others by 1.
    """

    model: PreTrainedModel
    parameters: Mapping[str, nn.Parameter]
    rates: Mapping[str, float]
    result_files: tuple[str, ...]
    keeps_parts: bool

    @property
    def shards(self) -> Shards | None:
        """How the model is divided among ranks; None: each has all of it."""
        ...

    @property
    def divided(self) -> Mapping[str, Tensor]:
        """Of parameters that are parts the whole, as all ranks have it together; their gradients come summed."""
        ...

    def publish(self) -> None:
        """Let the model compute with what the parameters are now."""
        ...

    def reference(self) -> AbstractContextManager[None] | None:
        """Return a block in which the model computes as it did before training; None where nothing is kept of that."""
        ...

    def dropping(self, batch: PackedBatch, step: int) -> AbstractContextManager[None]:
        """Return a block in which the model computes a pass of a step that learns, with whatever dropout that has.

        What is dropped of a row depends on the step (a number) and the row, not on the other rows of the batch.
        """
        ...

    def save(self, folder: Path, rank: int = 0) -> list[Path]:
        """Write files into a folder, made if missing, and return those; equal weights give equal bytes.

        Of a divided model all ranks call it, each with a folder of its own; else the first one.
        """
        ...

    def needs(self, name: str) -> bool:
        """Whether `load` reads a file of this name."""
        ...

    def load(self, folder: Path) -> None:
        """Put the parameters that `save` wrote into the model.

        Raises:
            DataLoss: a file is not as `save` writes it for this model.
        """
        ...


class Adapter:
    """One adapter of a model, and active in it, whose base stays as it is; as PEFT writes it.

    Weights that it trains whole have float32 masters, as all weights have: what the files hold. `base_model` is the
    name that PEFT's config gives the base, `reference` that of the adapter that it began as: a second one in the model,
    which nobody trains; None: it began as nothing. `score` is the head of a reward model. `seed` decides what the
    adapter's dropout drops.
    """

    result_files: tuple[str, ...] = (adapter_files.CONFIG_NAME, adapter_files.WEIGHTS_NAME)
    keeps_parts = False

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        *,
        base_model: str,
        reference: str | None = None,
        score: nn.Parameter | None = None,
        seed: int = 0,
        division: Division | None = None,
    ) -> None:
        assert reference != name, "the reference is another adapter, as this one changes"
        if reference is not None:
            find_adapter(model, reference)
        self.model = model
        self.shards = None if division is None else _divided_beside(model, name, reference, division)
        self._weights = adapter_parameters(model, name)
        self.divided: Mapping[str, Tensor] = {} if self.shards is None else self._weights
        self._masters = {key: self._master(weight) for key, weight in self._weights.items()}
        self.parameters: Mapping[str, nn.Parameter] = with_score(self._masters, score)
        self.rates: Mapping[str, float] = {}
        self._name = name
        self._score = score
        self._base_model = base_model
        self._reference = reference
        self._seed = seed
        self._dropout = find_adapter(model, name).spec.dropout
        activate(model, name)
        with_gradients(self.parameters)

    def hasten(self, b_rate_ratio: float) -> None:
        """Have the factors B learn at so many times the rate of the factors A (LoRA+, arXiv:2402.12354)."""
        self.rates = {key: b_rate_ratio for key in self._weights if key.endswith(".lora_B")}

    def _master(self, weight: nn.Parameter) -> nn.Parameter:
        if self.shards is not None:
            return self.shards.part(weight)
        return weight if weight.dtype == torch.float32 else mastered(weight)

    @torch.no_grad()
    def publish(self) -> None:
        """Round each master into the model, which computes with the other parameters themselves, or with parts."""
        if self.shards is None:
            round_into(self._masters, self._weights)

    def reference(self) -> AbstractContextManager[None]:
        """Return a block in which the adapter that this one began as is active, or the base alone."""
        return muted(self.model) if self._reference is None else use_adapter(self.model, self._reference)

    def dropping(self, batch: PackedBatch, step: int) -> AbstractContextManager[None]:
        """Return a block with the adapter's dropout."""
        if not self._dropout:
            return nullcontext()
        digest = hashlib.sha256(f"{self._seed}/{step}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1
        return dropping(self.model, batch, self._dropout, seed)

    def save(self, folder: Path, rank: int = 0) -> list[Path]:
        """Write both files of the adapter: of a divided one the first rank does, which has it whole for that."""
        masters: Mapping[str, Tensor] = self._masters
        if self.shards is not None:
            masters = dict(self.shards.whole(self._weights.items()))
        if rank:
            return []
        adapter_files.save_adapter(
            *(self.model, self._name, folder),
            base_model=self._base_model,
            score=self._score,
            masters=masters,
        )
        return [folder / name for name in self.result_files]

    @classmethod
    def needs(cls, name: str) -> bool:
        """Whether `load` reads a file of this name."""
        return name in cls.result_files

    def load(self, folder: Path) -> None:
        """Put an adapter's tensors in place of these. Raises DataLoss."""
        self._load(folder, self._score)

    def begin_from(self, folder: Path) -> None:
        """Put the tensors of another run's adapter in place of these; a reward model's head stays. Raises DataLoss."""
        self._load(folder, None)

    @torch.no_grad()
    def _load(self, folder: Path, score: nn.Parameter | None) -> None:
        if self.shards is not None:
            # As all ranks have them together: of that shape is what the file holds.
            state = adapter_files.adapter_state(self.model, self._name, score)
            self.shards.put(read_tensors(folder / adapter_files.WEIGHTS_NAME, state), state)
            return
        state = adapter_files.adapter_state(self.model, self._name, score, self._masters)
        put(read_tensors(folder / adapter_files.WEIGHTS_NAME, state), state)
        self.publish()


class AllWeights:
    """Every weight of a model, with float32 masters beside those that the model computes with in another type.

    A master adds up its gradient over the passes of a step, each of them in the model's type; after an update the
    model's weight is the rounded master. `model.safetensors` and `config.json` are what transformers loads, the
    masters are kept for resuming. Memory besides activations: 16 bytes a weight, and the model itself where it is not
    float32.

    With a `score` head it is a reward model: the head over words, where it is not the embedding, is no part of it.
    """

    result_files: tuple[str, ...] = (CONFIG_NAME, MODEL_NAME)
    shards: Shards | None = None
    divided: Mapping[str, Tensor] = MappingProxyType({})
    keeps_parts = False
    rates: Mapping[str, float] = MappingProxyType({})
    _start: Mapping[str, Tensor] | None = None

    def __init__(self, model: PreTrainedModel, *, score: nn.Parameter | None = None) -> None:
        self.model = model
        train_all(model, has_score=score is not None)
        # A tied head is the embedding, and has its name alone.
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._weights = with_score(trained, score)
        self._score = score
        self._has_masters = any(weight.dtype != torch.float32 for weight in self._weights.values())
        self.parameters: Mapping[str, nn.Parameter] = {
            name: weight if weight.dtype == torch.float32 else mastered(weight)
            for name, weight in self._weights.items()
        }
        with_gradients(self.parameters)

    @torch.no_grad()
    def publish(self) -> None:
        """Round each master into the model."""
        round_into(self.parameters, self._weights)

    @torch.no_grad()
    def keep_start(self) -> None:
        """Keep what the weights are now, a copy in the model's type, as the reference."""
        self._start = {name: weight.detach().clone() for name, weight in self._weights.items()}

    def reference(self) -> AbstractContextManager[None] | None:
        """Return a block in which the model has the weights of `keep_start`; None where they were not kept.

        Without them, what the weights were is gone with the first step.
        """
        return None if self._start is None else self._exchanged(self._start)

    @contextmanager
    def _exchanged(self, start: Mapping[str, Tensor]) -> Iterator[None]:
        now = {name: weight.data for name, weight in self._weights.items()}
        try:
            for name, weight in self._weights.items():
                weight.data = start[name]
            yield
        finally:
            for name, weight in self._weights.items():
                weight.data = now[name]

    def dropping(self, batch: PackedBatch, step: int) -> AbstractContextManager[None]:  # noqa: ARG002
        """Return a block that drops nothing."""
        return nullcontext()

    def save(self, folder: Path, rank: int = 0) -> list[Path]:
        """Write the model in the type that it computes with, its config, and the masters where there are any."""
        assert rank == 0, "the first rank writes for all"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(on_host(self._state()), folder / MODEL_NAME, metadata={"format": "pt"})
        config: Any = self.model.config if self._score is None else classifier_config(self.model)
        config.save_pretrained(folder)
        names = self.result_files
        if self._has_masters:
            save_file(on_host(self.parameters), folder / MASTERS_NAME)
            names = (*names, MASTERS_NAME)
        return [folder / name for name in names]

    def needs(self, name: str) -> bool:
        """Whether `load` reads a file of this name."""
        return name in (*self.result_files, MASTERS_NAME) or is_part(name, MASTERS)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Put a model's weights in place of these, also those that ranks wrote in parts. Raises DataLoss."""
        if parts := part_files(folder, MASTERS):
            read_parts(parts, self.parameters)
            self.publish()
        elif self._has_masters:
            put(read_tensors(folder / MASTERS_NAME, self.parameters), self.parameters)
            self.publish()
        else:
            state = self._state()
            put(read_tensors(folder / MODEL_NAME, state), state)

    def _state(self) -> dict[str, Tensor]:
        return model_state(self.model, self._weights, self._score)


def train_all(model: PreTrainedModel, *, has_score: bool) -> None:
    """Let all weights of a model have gradients; with a `score` head not a head over words of its own."""
    model.requires_grad_(requires_grad=True)
    words = output_head(model)
    if has_score and words is not None and not is_tied(model):
        words.requires_grad_(requires_grad=False)


def model_state(
    model: PreTrainedModel, trained: Mapping[str, nn.Parameter], score: nn.Parameter | None
) -> dict[str, Tensor]:
    """Return all tensors of a model's state, each under one name, without parameters that are not trained."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state: dict[str, Tensor] = model.state_dict()
    if score is not None:
        state[SCORE] = score.detach()
    return {name: state[name] for name in sorted(state) if name in trained or name not in every}


def _divided_beside(model: PreTrainedModel, name: str, reference: str | None, division: Division) -> Shards:
    """Divide a model of which one adapter is trained, and another one that it began as is not."""
    if trained_weights(model, name):
        raise InvalidArgument(
            f"an adapter of a model that is divided among ranks must train no module whole, {name!r} trains "
            f"{sorted(trained_weights(model, name))}; train it with sharding REPLICATED",
            reason=Reason.SHARDING_INVALID,
        )
    if reference is not None:
        for weight in adapter_parameters(model, reference).values():
            weight.requires_grad = False
    return Shards(model, division, has_masters=False)


def fresh_score(model: PreTrainedModel, seed: int, device: torch.device | None = None) -> nn.Parameter:
    """Return a head [1, E] of a reward model: normal, with a variance of 1 / (E + 1) (arXiv:2009.01325).

    It is on `device`; None: on the model's.
    """
    embedding: Any = model.get_input_embeddings()
    width = embedding.weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(1, width).normal_(std=1 / math.sqrt(width + 1), generator=generator)
    return nn.Parameter(values.to(device or model.device))


def classifier_config(model: PreTrainedModel) -> Any:
    """Return the config with which transformers loads a reward model: a sequence classifier with one label.

    It takes the score at the last token that is not padding. Where the padding token also ends texts, it would take an
    earlier one than we do: then none is named, and transformers asks for one before it scores several texts at once.

    Raises:
        InvalidArgument: transformers has no sequence classifier of this architecture (reason MODEL_INVALID).
    """
    config: Any = copy.deepcopy(model.config)
    classifiers: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in classifiers:
        raise InvalidArgument(
            f"transformers must have a sequence classifier of {type(model).__name__}, it has none",
            reason=Reason.MODEL_INVALID,
        )
    config.architectures = [classifiers[type(config)].__name__]
    config.num_labels = 1
    if config.pad_token_id in eos_token_ids(model):
        config.pad_token_id = None
    return config


def with_score(parameters: Mapping[str, nn.Parameter], score: nn.Parameter | None) -> dict[str, nn.Parameter]:
    """Return parameters in the order of their names, with the head of a reward model where there is one."""
    every = dict(parameters) if score is None else {**parameters, SCORE: score}
    return dict(sorted(every.items()))
