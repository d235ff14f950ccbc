"""Reward models beside the model that trains: loaded, and asked for the values of answers that were drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from luthier.errors import FailedPrecondition, Reason
from luthier.lm.adapter_files import load_reward_adapter
from luthier.lm.load import load_model, load_reward_model
from luthier.training.recipe_settings import is_divided, precision_of
from luthier.training.recipes.rollouts import Rollout
from luthier.training.recipes.valuing import Valuer
from luthier.training.worker.answer_ends import AnswerEnds, AskText, answer_ends
from luthier.training.worker.order import Desk
from luthier.v1.model_pb2 import ModelFile, Taught
from luthier.work.limited import Check
from luthier.worker.v1 import task_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRewardModel:
    """A reward model that is loaded.

    Attributes:
        name: as graders say it.
        valuer: gives values.
        taught: how it was taught.
    """

    name: str
    valuer: Valuer
    taught: Taught


def load_reward_models(desk: Desk, model: PreTrainedModel, device: torch.device) -> list[LoadedRewardModel]:
    """Load the reward models of a task onto a device, and before anything trains its base model.

    An adapter on the base model of a run that trains an adapter is put into that very model, whose weights stay as they
    are and are whole, if it was taught beside one that was held alike; any other one takes the memory of its own
    weights, and adapters of one base share it.

    Raises:
        LuthierError: files could not be read, or are not those of a reward model.
    """
    spec = desk.task.train
    is_apart = spec.job.HasField("full") or is_divided(spec.job)
    own = spec.base_model_digest, precision_of(spec.job.base_precision)
    bases = {} if is_apart else {own: model}
    loaded = []
    for number, one in enumerate(spec.reward_models):
        desk.progress("loading reward models", number, len(spec.reward_models), "models")
        folder = desk.scratch / f"reward-{number}"
        for file in one.files:
            desk.fetch_into(folder, file)
        if one.base_model_files:
            name = f"reward-{number}"
            base = one.base_model_digest, precision_of(one.base_precision)
            if base not in bases:
                bases[base] = _base(desk, one, device)
            on = bases[base]
            _, head = load_reward_adapter(on, folder, name)
            valuer = Valuer(model=on, head=head.to(on.device), adapter=name)
        else:
            found = load_reward_model(folder, device=device)
            valuer = Valuer(model=found.model, head=found.score)
        loaded.append(LoadedRewardModel(name=one.model, valuer=valuer, taught=one.taught))
    return loaded


def _base(desk: Desk, one: task_pb2.GraderModel, device: torch.device) -> PreTrainedModel:
    folder = _fetched(desk, one.base_model_files, desk.scratch / f"base-{one.base_model_digest}")
    return load_model(folder, device=device, precision=precision_of(one.base_precision))


def _fetched(desk: Desk, files: Iterable[ModelFile], folder: Path) -> Path:
    for file in files:
        desk.check()
        wanted = task_pb2.BlobFile(path=file.path, sha256=file.sha256, size_bytes=file.size_bytes)
        desk.fetch_into(folder, wanted)
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A reward model that values the answers of one task.

    Attributes:
        loaded: the reward model.
        ends: how the rows end that it was taught by.
        stop_token_ids: tokens that end an answer where it is drawn.
        micro_batch_tokens: of the task.
    """

    loaded: LoadedRewardModel
    ends: AnswerEnds
    stop_token_ids: frozenset[int]
    micro_batch_tokens: int

    @property
    def name(self) -> str:
        """Its name, as graders say it."""
        return self.loaded.name

    def values(
        self, rollouts: Sequence[Rollout], records: Mapping[int, str], check: Check = lambda: None
    ) -> list[float]:
        """Return the value of each answer behind the tokens that asked for it; it may not be finite.

        The tokens are those that were asked with and drawn, and for an answer that ended those that end a row, in place
        of the one that ended it. `records` are those that asked, as JSON by row.
        """
        ends = {row: self.ends.of(record).token_ids for row, record in records.items()}
        sequences = [self._sequence(one, ends[one.row]) for one in rollouts]
        return self.loaded.valuer.values(sequences, self.micro_batch_tokens, check)

    def unknown_ends(self, records: Iterable[str]) -> set[str]:
        """Return, in words, why it is not known how rows of some records end; nothing where it is."""
        return {end.unknown for end in map(self.ends.of, records) if end.unknown}

    def _sequence(self, one: Rollout, end: tuple[int, ...]) -> tuple[int, ...]:
        if one.is_truncated:
            return (*one.prompt, *one.token_ids)
        return (*one.prompt, *without_stop(one.token_ids, self.stop_token_ids), *end)

    def require_room(self, longest: int) -> None:
        """Check that it can value prompts with answers of so many tokens, the one that ends an answer among them.

        Raises FailedPrecondition SEQUENCE_TOO_LONG.
        """
        model = self.loaded.valuer.model
        most = int(getattr(model.config, "max_position_embeddings", None) or 0)
        num_tokens = longest + max(0, self.ends.most_tokens - 1)
        if most and num_tokens > most:
            raise FailedPrecondition(
                f"prompts and their answers, written to the end as rows are that {self.name} was taught by, must have "
                f"at most its {most} tokens, they may have {num_tokens}; set a smaller max_new_tokens, or create the "
                "rendering with a smaller max_tokens",
                reason=Reason.SEQUENCE_TOO_LONG,
                metadata={"name": self.name, "num_tokens": str(num_tokens)},
            )


def judges_of(
    loaded: Iterable[LoadedRewardModel], ask: AskText, stop_token_ids: frozenset[int], micro_batch_tokens: int
) -> tuple[Judge, ...]:
    """Return the reward models of a task ready to value its answers. Raises LuthierError as `answer_ends`."""
    return tuple(
        Judge(
            loaded=one,
            ends=answer_ends(ask, one.taught, stop_token_ids),
            stop_token_ids=stop_token_ids,
            micro_batch_tokens=micro_batch_tokens,
        )
        for one in loaded
    )


def without_stop(token_ids: tuple[int, ...], stop_token_ids: frozenset[int]) -> tuple[int, ...]:
    """Return an answer's tokens without the one that ended it, where it is among them."""
    return token_ids[:-1] if token_ids and token_ids[-1] in stop_token_ids else token_ids
