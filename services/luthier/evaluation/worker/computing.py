"""A loaded base model that answers requests, as `luthier.evaluation.worker.order` names them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from luthier.errors import (
    Cancelled,
    Internal,
    LuthierError,
    NotFound,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from luthier.evaluation.worker.engine_thread import EngineThread
from luthier.evaluation.worker.order import (
    COMPARE,
    DISTRIBUTE,
    GENERATE,
    LOAD_ADAPTER,
    LOAD_REWARD,
    MEASURE,
    REMOVE_ADAPTER,
    UNFIT,
    VALUES,
    Facts,
    LoadOrder,
    Measured,
    Said,
    Valued,
)
from luthier.lm.adapter_files import load_adapter, load_reward_adapter
from luthier.lm.decoding import Events
from luthier.lm.divergence import divergences, write_distributions
from luthier.lm.engine import Engine
from luthier.lm.failures import device_failed, is_for_memory, is_of_device
from luthier.lm.generate import GenerationRequest
from luthier.lm.load import eos_token_ids, load_model, load_reward_model
from luthier.lm.lora import find_adapter, remove_adapter, use_adapter
from luthier.lm.score import SequenceDivergence, SequenceScore
from luthier.lm.scoring import sequence_logprobs, sequence_values
from luthier.work.standing_child import Part, Request

_logger = logging.getLogger(__name__)


class Teller(Protocol):
    """Who is told parts of answers, from any thread; `luthier.work.standing_child.Speaker` is one."""

    def say(self, parts: Sequence[Part]) -> None:
        """Hear parts of answers."""
        ...

    def step(self, parts: Sequence[Part]) -> None:
        """Hear that a piece of the work is done, and the parts of answers that it made, if any."""
        ...

    def idle(self) -> None:
        """Hear that there is nothing to do."""
        ...


class Computing:
    """Computes with a base model and its adapters for many who ask at once.

    Args:
        model: loaded, with no adapter.
        teller: hears the answers.
        head: of a reward model with all its weights, [1, E] in float32; None: it makes words.
        ended: called when nothing can be answered any more: the engine's thread has ended, of itself too, or the
            device has failed, which is said before.

    Attributes:
        model: as given.
        engine: what generates with it.
        thread: the one that touches both.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teller: Teller,
        ended: Callable[[], None],
        head: torch.Tensor | None = None,
    ) -> None:
        self.model = model
        self._heads: dict[str | None, torch.Tensor] = {} if head is None else {None: head}
        self.engine = Engine(model)
        self.ended = ended
        self._teller = teller
        self._lock = threading.Lock()
        self._open_rows: dict[int, int] = {}
        self._waiting: set[int] = set()
        self._has_failed = False
        self._at_once: Mapping[str, Callable[..., Any]] = {UNFIT: self._unfit}
        self._in_turn: Mapping[str, Callable[..., Any]] = {
            MEASURE: self._measured,
            DISTRIBUTE: self._distribute,
            COMPARE: self._compared,
            VALUES: self._valued,
            LOAD_REWARD: self._load_reward,
            LOAD_ADAPTER: self._load_adapter,
            REMOVE_ADAPTER: self._remove_adapter,
        }
        self.thread = EngineThread(self.engine, self)

    def ask(self, request: Request) -> None:
        """Begin to answer a request. What cannot be is said in a part of the answer."""
        number = request.number
        if request.name == GENERATE:
            self._generate(number, *request.arguments)
        elif request.name in self._at_once:
            self._teller.say([self._part(number, self._at_once[request.name], request.arguments)])
        else:
            with self._lock:
                self._waiting.add(number)
            self.thread.run(lambda: self._take(number, self._in_turn[request.name], request.arguments))

    def stop(self, number: int) -> None:
        """Let go of a request. What is not begun is not done; what is being done in one piece is done first."""
        with self._lock:
            self._waiting.discard(number)
        self.engine.cancel(str(number))

    def stepped(self, events: Events, failures: Mapping[str, Exception]) -> None:
        """Say what a step produced."""
        found: dict[int, list[Said]] = {}
        for event in events:
            said = Said(event.row, event.token_ids, event.num_generated, event.finish_reason)
            found.setdefault(int(event.request_id), []).append(said)
        parts = [Part(number, said, self._is_last(number, said)) for number, said in found.items()]
        for request_id, error in failures.items():
            with self._lock:
                self._open_rows.pop(int(request_id), None)
            parts.append(self._failed(int(request_id), error))
        self._teller.step(parts)
        self._end_if_failed()

    def idle(self) -> None:
        """Say that there is nothing to do."""
        self._teller.idle()

    def _generate(self, number: int, request: GenerationRequest) -> None:
        with self._lock:
            self._open_rows[number] = len(request.prompts) * request.num_samples
        try:
            self.engine.submit(replace(request, request_id=str(number)))
        except Exception as error:  # it belongs to whoever asked
            with self._lock:
                del self._open_rows[number]
            self._teller.say([self._failed(number, error)])

    def _is_last(self, number: int, said: Sequence[Said]) -> bool:
        with self._lock:
            self._open_rows[number] -= sum(one.finish_reason is not None for one in said)
            if self._open_rows[number]:
                return False
            del self._open_rows[number]
        return True

    def _take(self, number: int, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
        with self._lock:
            is_wanted = number in self._waiting
            self._waiting.discard(number)
        if is_wanted:
            self._teller.step([self._part(number, work, arguments)])
            self._end_if_failed()
        else:
            self._teller.say([Part(number, error=Cancelled("it was not begun"))])

    def _part(self, number: int, work: Callable[..., Any], arguments: Sequence[Any]) -> Part:
        try:
            return Part(number, work(*arguments))
        except Exception as error:  # it belongs to whoever asked
            return self._failed(number, error)

    def _failed(self, number: int, error: Exception) -> Part:
        self._has_failed |= is_of_device(error, self.model.device)
        return Part(number, error=told(error, self.model.device))

    def _end_if_failed(self) -> None:
        """End where the device has failed, which has been said: all that it is asked from here on would fail too."""
        if self._has_failed:
            self.ended()

    def _unfit(self, requests: Sequence[GenerationRequest]) -> list[LuthierError | None]:
        return [self._refusal(request) for request in requests]

    def _refusal(self, request: GenerationRequest) -> LuthierError | None:
        try:
            self.engine.check(request)
        except LuthierError as error:
            return error
        return None

    def _measured(self, wanted: Measured) -> list[SequenceScore]:
        with use_adapter(self.model, wanted.adapter):
            return sequence_logprobs(self.model, wanted.sequences, wanted.masks, likeliest=wanted.likeliest)

    def _distribute(self, wanted: Measured, path: Path) -> None:
        with use_adapter(self.model, wanted.adapter):
            write_distributions(self.model, wanted.sequences, wanted.masks, path)

    def _compared(self, wanted: Measured, path: Path) -> list[SequenceDivergence]:
        with use_adapter(self.model, wanted.adapter):
            return divergences(self.model, wanted.sequences, wanted.masks, path)

    def _valued(self, wanted: Valued) -> list[float]:
        head = self._heads.get(wanted.adapter)
        if head is None:
            raise NotFound(f"there is no reward model {wanted.adapter or 'here'}")
        with use_adapter(self.model, wanted.adapter):
            return sequence_values(self.model, head, wanted.sequences)

    def _load_reward(self, folder: Path, name: str) -> None:
        if not _has_adapter(self.model, name):
            _, head = load_reward_adapter(self.model, folder, name)
            self._heads[name] = head.to(self.model.device)

    def _load_adapter(self, folder: Path, name: str) -> None:
        # Whoever asked for it before may have gone before it was there.
        if not _has_adapter(self.model, name):
            load_adapter(self.model, folder, name)

    def _remove_adapter(self, name: str) -> None:
        self._heads.pop(name, None)
        self.engine.forget_adapter(name)
        remove_adapter(self.model, name)


class Loaded(NamedTuple):
    """A model that was loaded, what it says of itself, and the head [1, E] of a reward model."""

    model: PreTrainedModel
    facts: Facts
    head: torch.Tensor | None = None


def loaded(order: LoadOrder, device: torch.device | str) -> Loaded:
    """Load a base model, or a reward model with all its weights, onto a device.

    Raises:
        LuthierError: as `load_model`.
        ResourceExhausted: OUT_OF_MEMORY.
        Unavailable: CRASHED, the device failed.
    """
    head = None
    try:
        if order.is_reward:
            model, head = load_reward_model(order.folder, device=device)
        else:
            model = load_model(order.folder, device=device, precision=order.precision)
    except Exception as error:
        raise told(error, torch.device(device)) from error
    # A classifier says no words that could end.
    ends = frozenset[int]() if order.is_reward else eos_token_ids(model)
    return Loaded(model, Facts(eos_token_ids=ends, device=model.device.type), head)


def told(error: Exception, device: torch.device) -> LuthierError:
    """Return what an asker is told of an error.

    That there is no memory, that the device failed, or that nobody foresaw it, has a name too.
    """
    if isinstance(error, LuthierError):
        return error
    if is_for_memory(error):
        return ResourceExhausted(
            f"there is no memory for it beside the model: {str(error)[:500]}", reason=Reason.OUT_OF_MEMORY
        )
    if is_of_device(error, device):
        _logger.error("the device failed", exc_info=error)
        return Unavailable(device_failed(error, device), reason=Reason.CRASHED)
    _logger.error("a request failed unexpectedly", exc_info=error)
    return Internal(f"{type(error).__name__}: {error}")


def _has_adapter(model: PreTrainedModel, name: str) -> bool:
    try:
        find_adapter(model, name)
    except NotFound:
        return False
    return True
