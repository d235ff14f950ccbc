"""What a run trains: an adapter of a model, or all of its weights.

An engine asks for names and parameters, and to put changes into the model; a checkpoint asks for files. Neither knows
which of the two it has. Weights are bound to the model as it is: whoever divides a model among ranks does it before.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedModel

from luthier.errors import DataLoss, InvalidArgument, Reason
from luthier.lm import adapter_files
from luthier.lm.load import eos_token_ids
from luthier.lm.lora import activate, adapter_parameters, dropping, find_adapter, muted, use_adapter
from luthier.lm.packed import PackedBatch

MODEL_NAME = "model.safetensors"
MASTERS_NAME = "masters.safetensors"
CONFIG_NAME = "config.json"
SCORE = "score.weight"
"""Name of a reward model's head among the parameters, as transformers has it."""
_PIECE_ELEMENTS = 1 << 18


class Weights(Protocol):
    """Parameters that train, and the files that hold them.

    Attributes:
        model: what computes with them.
        parameters: what the optimiser changes: float32, by name, in sorted order. Each has a gradient from the start,
            in which autograd sums in float32.
        files: names of the files that `save` writes.
        result_files: those of them that are the run's result: what others load.
        rates: what the learning rate of some parameters is multiplied by, by name; of all others by 1.
    """

    model: PreTrainedModel
    parameters: Mapping[str, nn.Parameter]
    rates: Mapping[str, float]
    files: tuple[str, ...]
    result_files: tuple[str, ...]

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

    def save(self, folder: Path) -> None:
        """Write the files into a folder, made if missing; equal weights give equal bytes."""
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
    adapter's dropout drops. The factors B learn at `b_rate_ratio` times the rate of the factors A (LoRA+).
    """

    result_files: tuple[str, ...] = (adapter_files.CONFIG_NAME, adapter_files.WEIGHTS_NAME)
    files = result_files

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        *,
        base_model: str,
        reference: str | None = None,
        score: nn.Parameter | None = None,
        seed: int = 0,
        b_rate_ratio: float = 1.0,
    ) -> None:
        assert reference != name, "the reference is another adapter, as this one changes"
        if reference is not None:
            find_adapter(model, reference)
        self.model = model
        self._weights = adapter_parameters(model, name)
        self._masters = {
            key: weight if weight.dtype == torch.float32 else _mastered(weight)
            for key, weight in self._weights.items()
        }
        self.parameters: Mapping[str, nn.Parameter] = _with_score(self._masters, score)
        self.rates: Mapping[str, float] = (
            {key: b_rate_ratio for key in self._weights if key.endswith(".lora_B")}
            if b_rate_ratio != 1
            else {}
        )
        self._name = name
        self._score = score
        self._base_model = base_model
        self._reference = reference
        self._seed = seed
        self._dropout = find_adapter(model, name).spec.dropout
        activate(model, name)
        _with_gradients(self.parameters)

    @torch.no_grad()
    def publish(self) -> None:
        """Round each master into the model, which computes with the other parameters themselves."""
        _round(self._masters, self._weights)

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

    def save(self, folder: Path) -> None:
        """Write both files of the adapter."""
        adapter_files.save_adapter(
            *(self.model, self._name, folder),
            base_model=self._base_model,
            score=self._score,
            masters=self._masters,
        )

    def load(self, folder: Path) -> None:
        """Put an adapter's tensors in place of these. Raises DataLoss."""
        self._load(folder, self._score)

    def begin_from(self, folder: Path) -> None:
        """Put the tensors of another run's adapter in place of these; a reward model's head stays. Raises DataLoss."""
        self._load(folder, None)

    @torch.no_grad()
    def _load(self, folder: Path, score: nn.Parameter | None) -> None:
        state = adapter_files.adapter_state(self.model, self._name, score, self._masters)
        _put(_read(folder / adapter_files.WEIGHTS_NAME, state), state)
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
    rates: Mapping[str, float] = MappingProxyType({})
    _start: Mapping[str, Tensor] | None = None

    def __init__(self, model: PreTrainedModel, *, score: nn.Parameter | None = None) -> None:
        self.model = model
        model.requires_grad_(requires_grad=True)
        words: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        embedding: Any = model.get_input_embeddings()
        if score is not None and words.weight is not embedding.weight:
            words.requires_grad_(requires_grad=False)
        # A tied head is the embedding, and has its name alone.
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._weights = _with_score(trained, score)
        self._score = score
        self._has_masters = any(weight.dtype != torch.float32 for weight in self._weights.values())
        self.files: tuple[str, ...] = (
            (*self.result_files, MASTERS_NAME) if self._has_masters else self.result_files
        )
        self.parameters: Mapping[str, nn.Parameter] = {
            name: weight if weight.dtype == torch.float32 else _mastered(weight)
            for name, weight in self._weights.items()
        }
        _with_gradients(self.parameters)

    @torch.no_grad()
    def publish(self) -> None:
        """Round each master into the model."""
        _round(self.parameters, self._weights)

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

    def save(self, folder: Path) -> None:
        """Write the model in the type that it computes with, its config, and the masters where there are any."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_host(self._state()), folder / MODEL_NAME, metadata={"format": "pt"})
        config: Any = self.model.config if self._score is None else classifier_config(self.model)
        config.save_pretrained(folder)
        if self._has_masters:
            save_file(_host(self.parameters), folder / MASTERS_NAME)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Put a model's weights in place of these. Raises DataLoss."""
        if self._has_masters:
            _put(_read(folder / MASTERS_NAME, self.parameters), self.parameters)
            self.publish()
        else:
            state = self._state()
            _put(_read(folder / MODEL_NAME, state), state)

    def _state(self) -> dict[str, Tensor]:
        """All tensors of the model's state, each under one name."""
        every = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        state: dict[str, Tensor] = self.model.state_dict()
        if self._score is not None:
            state[SCORE] = self._score.detach()
        return {name: state[name] for name in sorted(state) if name in self._weights or name not in every}


def fresh_score(model: PreTrainedModel, seed: int) -> nn.Parameter:
    """Return a head [1, E] of a reward model: normal, with a variance of 1 / (E + 1) (arXiv:2009.01325)."""
    embedding: Any = model.get_input_embeddings()
    width = embedding.weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(1, width).normal_(std=1 / math.sqrt(width + 1), generator=generator)
    return nn.Parameter(values.to(model.device))


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


def pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Return a tensor's rows, some in each view: what is made of them stays in a processor's second cache.

    On a GPU, where a call costs more than what it saves, the tensor itself.
    """
    if tensor.device.type != "cpu":
        return [tensor]
    return torch.split(tensor, max(1, _PIECE_ELEMENTS // max(1, math.prod(tensor.shape[1:]))))


def _with_score(
    parameters: Mapping[str, nn.Parameter], score: nn.Parameter | None
) -> dict[str, nn.Parameter]:
    every = dict(parameters) if score is None else {**parameters, SCORE: score}
    return dict(sorted(every.items()))


def _mastered(weight: nn.Parameter) -> nn.Parameter:
    """Return a float32 copy of a weight, in whose gradient all gradients of the weight are summed."""
    master = nn.Parameter(weight.detach().float())

    def move(of_weight: Tensor) -> None:
        assert master.grad is not None
        assert of_weight.grad is not None
        # A sum of two types takes five times as long as widening some of it and adding that.
        for sums, added in zip(pieces(master.grad), pieces(of_weight.grad), strict=True):
            sums.add_(added.float())
        of_weight.grad = None

    weight.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
    return master


def _round(masters: Mapping[str, nn.Parameter], weights: Mapping[str, nn.Parameter]) -> None:
    for name, master in masters.items():
        if master is not weights[name]:
            weights[name].copy_(master)


def _with_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Give each a gradient of zero: also one that a batch does not pass through (an expert) is part of every step."""
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}"
        parameter.grad = torch.zeros_like(parameter)


def _host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def _read(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors, that have the names, shapes and types expected. Raises DataLoss."""
    try:
        found = load_file(path)
    # What safetensors raises is a class of its own for some files, and the system's for others.
    except Exception as error:
        raise DataLoss(f"{path.name} cannot be read: {error}") from error

    def form(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    if form(found) != form(expected):
        differing = sorted(form(found).items() ^ form(expected).items(), key=str)[:1]
        raise DataLoss(
            f"{path.name} must hold the tensors of this run's weights, got other ones: {differing}"
        )
    return found


def _put(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(tensors[name])
