"""What exactly runs, kept with its job before the first step and whenever it changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from luthier.training.fitting import Fit, memory_message
from luthier.training.recipe_settings import named_kept
from luthier.training.recipes.checkpoint import RunIdentity
from luthier.training.worker.order import Desk
from luthier.training.worker.surroundings import run_record
from luthier.v1 import fine_tuning_job_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecorder:
    """Keeps with the job what exactly runs, with what its passes are.

    Attributes:
        desk: of the task.
        model: that trains.
        used: what its steps take of each rendering of a mixture.
        num_ranks: that share the work.
        chosen: is told what passes are tried, and which were chosen.
    """

    desk: Desk
    model: PreTrainedModel
    used: Sequence[fine_tuning_job_pb2.RenderingUse]
    num_ranks: int
    chosen: list[Fit]

    def tries(self, fit: Fit) -> None:
        """Keep what a trial is expected to take: a process that is ended for want of memory says nothing any more."""
        self.desk.run_record(self._record(fit, ()))

    def chosen_is(self, fit: Fit, *, changed: Sequence[str] = ()) -> fine_tuning_job_pb2.RunRecord:
        """Keep what passes are from now on, in whatever attempt; returns what is kept.

        `changed` is what is not as when the run began.
        """
        record = self._record(fit, changed)
        record.micro_batch_tokens = fit.micro_batch_tokens
        record.activation_checkpointing = named_kept(fit.kept)
        self.desk.run_record(record)
        return record

    def as_begun(self, run: RunIdentity, changed: Sequence[str]) -> RunIdentity:
        """Return what a run is known by from now on, and say what is not as it was when it began."""
        if not changed:
            return run
        text = ", ".join(changed)
        text = f"since the run began, {text} changed: its results may differ from an undisturbed run's"
        self.desk.log(text, "WARNING")
        return replace(run, bitwise=False)

    def scores(
        self,
        record: fine_tuning_job_pb2.RunRecord,
        held_out: fine_tuning_job_pb2.HeldOutScores | None,
    ) -> None:
        """Add what both engines find of held-out tokens, if there are any, to what is kept."""
        if held_out is not None:
            record.held_out.CopyFrom(held_out)
            self.desk.run_record(record)

    def _record(self, fit: Fit, changed: Sequence[str]) -> fine_tuning_job_pb2.RunRecord:
        self.chosen[:] = [fit]
        record = run_record(
            self.desk.task.train, self.model, self.used, changed=changed, num_ranks=self.num_ranks
        )
        record.memory.CopyFrom(memory_message(fit.footprint))
        return record
