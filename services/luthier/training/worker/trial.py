"""Before the first step: which passes fit into this device, and a trial of the largest one.

What is chosen changes no plan: only how a step is cut, so that results differ by rounding, and what layers compute
again, which changes no bit. It is kept with the job before the first step, and every later attempt does the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from transformers import PreTrainedModel

from luthier.errors import LuthierError, Reason, Unavailable
from luthier.lm.checkpointing import checkpoint_layers
from luthier.lm.failures import is_for_memory
from luthier.lm.memory import give_back, peak_bytes, watch_peak
from luthier.lm.quantise import stored_bytes
from luthier.lm.shape import ModelShape
from luthier.training.fitting import USABLE, Fit, Rows, fit_of, fits_of, mib, rows_of, trained_of, what_would
from luthier.training.recipe_settings import kept_of
from luthier.training.recipes.corpus import Corpus
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.footprint import Place, Trained, moments_bytes
from luthier.training.recipes.loop import Settings
from luthier.training.recipes.survey import Survey
from luthier.training.recipes.trial import largest_batch, try_pass
from luthier.training.worker.order import Desk, out_of_memory


class Recorder(Protocol):
    """Keeps with a job what its passes are."""

    def tries(self, fit: Fit) -> None:
        """Keep what a trial is expected to take."""
        ...

    def chosen_is(self, fit: Fit) -> object:
        """Keep what passes are from now on, in whatever attempt."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A run before its first step.

    Attributes:
        desk: of its task.
        engine: has made no step of this attempt.
        corpus: its rows.
        settings: as planned.
        found: what its rows come to; the steps were counted.
        limit: bytes that this process, or each of several ranks, may hold just now; 0: nobody says.
        capacity: bytes that it could hold if nobody else held any; 0: nobody says.
    """

    desk: Desk
    engine: Engine
    corpus: Corpus
    settings: Settings
    found: Survey
    limit: int
    capacity: int

    def choose(self, shape: ModelShape, other_bytes: int, recorder: Recorder) -> Fit:
        """Return what the run's passes are: what an earlier attempt chose, or what fits here.

        Ranks that divide the model all call it, with the same numbers, and make each trial together: one that has too
        little memory for it ends the attempt.

        Of what fits the fastest is tried: the largest pass is made, and its gradient forgotten. `other_bytes` are those
        of models beside the one that trains.

        Raises:
            ResourceExhausted: OUT_OF_MEMORY, nothing fits, or not what an earlier attempt chose; the message has what
                was expected, and what would fit.
            Unavailable: OUT_OF_MEMORY, the device has as much, but others hold it just now.
        """
        job, device = self.desk.task.train.job, self.engine.weights.model.device
        place = _place(device)
        num_ranks = self.engine.collective.num_ranks
        trained, rows, limit = trained_of(job, shape, other_bytes, num_ranks), self._rows(), self.limit
        if job.run_record.micro_batch_tokens:
            kept = kept_of(job.run_record.activation_checkpointing)
            before = fit_of(trained, rows, job.run_record.micro_batch_tokens, kept, place, limit)
            if before.is_beyond:
                why = f"{before.words}; an earlier attempt chose them, and all have to keep to it"
                raise self._short(before, why)
            return before
        every = list(fits_of(job, trained, rows, place, limit))
        # What is not sure to fit, and may, is tried where nothing else is left to.
        least = [] if every[-1].is_beyond else every[-1:]
        chosen = self._first_that_fits([one for one in every if one.fits] or least, trained, recorder)
        if chosen is None:
            would = what_would(job, trained, rows, place, limit)
            raise self._short(every[-1], f"{every[-1].words}; {would}")
        recorder.chosen_is(chosen)
        return chosen

    def _short(self, fit: Fit, why: str) -> LuthierError:
        if self.limit < self.capacity and fit.footprint.peak <= USABLE * self.capacity:
            return Unavailable(
                f"a step must fit in the memory that is free, others hold too much of it just now: {why}",
                reason=Reason.OUT_OF_MEMORY,
            )
        return out_of_memory(self.desk.task.train.job, why, fit.micro_batch_tokens)

    def _rows(self) -> Rows:
        found = self.found
        assert found.totals is not None, "the steps were counted"
        longest = max(part.longest.num_tokens for part in (found, *found.mixed) if part.longest is not None)
        held = sum(sum(self.corpus.lengths(split).num_tokens) for split in ("TRAIN", "VALIDATION"))
        num_ranks = self.engine.collective.num_ranks
        return rows_of(self.desk.task.train.job, found.totals, longest, held, num_ranks)

    def _first_that_fits(self, wanted: Iterable[Fit], trained: Trained, recorder: Recorder) -> Fit | None:
        for fit in wanted:
            self.desk.check()
            self.desk.progress("trying the largest pass", 0, 0, "passes")
            recorder.tries(fit)
            checkpoint_layers(self.engine.weights.model, fit.kept)
            held = self._tried(fit, trained)
            if held is not None and (not fit.limit or held <= fit.limit):
                return fit
            took = "more than there is" if held is None else mib(held)
            self.desk.log(f"{fit.words}; it took {took}, so that something smaller is tried", "WARNING")
        return None

    def _tried(self, fit: Fit, trained: Trained) -> int | None:
        """Return the most memory of a step with the largest pass; None where it did not end for want of it."""
        device = self.engine.weights.model.device
        batches = replace(self.settings.batches, micro_batch_tokens=fit.micro_batch_tokens)
        batch = largest_batch(
            self.corpus, replace(self.settings, batches=batches), trained.num_samples, trained.max_new_tokens
        )
        # What is left of a larger one is not this one's.
        give_back(device)
        watch_peak(device)
        try:
            try_pass(self.engine, batch, trained)
        except (MemoryError, RuntimeError) as error:
            # Others wait within the pass, who cannot be told.
            if not is_for_memory(error) or self.engine.weights.shards is not None:
                raise
            return None
        # Both moments come into being with the first update.
        held = peak_bytes(device) + moments_bytes(trained, _place(device)) // trained.num_parts
        return held if self.engine.weights.shards is None else max(self.engine.collective.gathered(held))


def _place(device: torch.device) -> Place:
    return "GPU" if device.type == "cuda" else "CPU"


def bytes_beside(model: PreTrainedModel, others: Iterable[PreTrainedModel]) -> int:
    """Return the bytes of the weights of models that are loaded beside one, each once."""
    seen = {id(parameter) for parameter in model.parameters()}
    total = 0
    for parameter in (parameter for other in others for parameter in other.parameters()):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            total += stored_bytes(parameter)
    return total
