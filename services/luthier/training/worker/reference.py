"""What all weights are compared with: computed once before training, and a file of every checkpoint."""

from __future__ import annotations

from pathlib import Path

from luthier.training.recipes.corpus import Corpus
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.reference import (
    FILE_NAME,
    load_reference,
    reference_key,
    save_reference,
    score_reference,
)
from luthier.training.worker.order import Desk
from luthier.work.paced import Paced

_PHASE = "scoring the reference"


def give_reference(
    desk: Desk, engine: Engine, corpus: Corpus, resumed: Path | None, micro_batch_tokens: int
) -> Path | None:
    """Give a corpus the log-probabilities of the weights as they are now, or as they were before a run's first step.

    Args:
        desk: of the task.
        engine: its weights have made no step, and no checkpoint has been loaded into them.
        corpus: the rows.
        resumed: folder with the files of the checkpoint that the run goes on from; None: it begins.
        micro_batch_tokens: most tokens of a pass.

    Returns the file that every checkpoint has to have; None where the weights themselves keep their reference.

    Raises:
        DataLoss: the file is not as it was written.
        FailedPrecondition: it is of other rows or another model. Other kernels are no reason: the values are what the
            run began with, and what has changed around a run is told of anyhow.
    """
    if engine.weights.reference() is not None:
        return None
    spec = desk.task.train
    mixed = {"mixed": ",".join(spec.mixed_rendering_digests)} if spec.mixed_rendering_digests else {}
    key = reference_key(
        {
            **mixed,
            "rendering": spec.rendering_digest,
            "base_model": spec.base_model_digest,
            "start": ",".join(sorted(file.sha256 for file in spec.start_files)),
            "micro_batch_tokens": str(spec.job.hyperparameters.micro_batch_tokens),
        }
    )
    if resumed is not None:
        load_reference(corpus, resumed, key)
        return resumed / FILE_NAME
    desk.progress(_PHASE, 0, 0, "rows")
    paced = Paced()

    def tell(num_scored: int, num_rows: int) -> None:
        # All rows go through the model once: of a large one that takes longer than a step may.
        if paced.due():
            desk.progress(_PHASE, num_scored, num_rows, "rows")

    score_reference(engine, corpus, micro_batch_tokens, desk.check, tell)
    save_reference(corpus, desk.scratch, key)
    return desk.scratch / FILE_NAME
