"""Whether what is sampled is what was trained: log-probabilities of the same held-out tokens by both engines."""

from __future__ import annotations

import math
from statistics import fmean

from luthier.lm.held_out import sampler_logprobs
from luthier.lm.made import HeldOutRow
from luthier.lm.packed import WEIGHT, pack
from luthier.lm.readouts import TokenLogprobs
from luthier.training.recipes.corpus import Corpus
from luthier.training.recipes.engine import Engine
from luthier.v1.fine_tuning_job_pb2 import HeldOutScores

NUM_TOKENS = 64
MAX_ROW_TOKENS = 256


def held_out_scores(engine: Engine, corpus: Corpus, step: int) -> HeldOutScores | None:
    """Return what both engines find of learnt tokens of the shortest validation rows; None where there are none."""
    scores = HeldOutScores(step=step)
    left = NUM_TOKENS
    for row in _shortest(corpus):
        found = _row(corpus, row, left)
        if found.positions:
            left -= len(found.positions)
            mask = [place in found.positions for place in range(len(found.token_ids))]
            batch = pack([found.token_ids], {WEIGHT: [mask]})
            trained = engine.score(batch, TokenLogprobs(is_wide=True)).logprob.double().tolist()
            scores.rows.add(
                token_ids=found.token_ids,
                positions=found.positions,
                trainer_logprobs=trained,
                sampler_logprobs=sampler_logprobs(engine.weights.model, found),
            )
        if not left:
            break
    values = [value for row in scores.rows for value in (*row.trainer_logprobs, *row.sampler_logprobs)]
    # A model that gives no numbers has no scores: what follows from that is for whoever evaluates it.
    if not values or not all(map(math.isfinite, values)):
        return None
    scores.mean_difference = fmean(
        abs(one - other)
        for row in scores.rows
        for one, other in zip(row.trainer_logprobs, row.sampler_logprobs, strict=True)
    )
    return scores


def _shortest(corpus: Corpus) -> list[int]:
    lengths = corpus.lengths("VALIDATION")
    teaching = [one for one in lengths if one.num_supervised]
    return [one.row for one in sorted(teaching, key=lambda one: (one.num_tokens, one.row))]


def _row(corpus: Corpus, row: int, most: int) -> HeldOutRow:
    """Return the end of a row, and its first learnt tokens there."""
    batch = corpus.pack([row], "VALIDATION")
    first = max(0, len(batch.input_ids) - MAX_ROW_TOKENS)
    learnt = (batch.streams[WEIGHT][first:] > 0).tolist()
    positions = [place for place, is_learnt in enumerate(learnt) if is_learnt and place][:most]
    return HeldOutRow(token_ids=tuple(batch.input_ids[first:].tolist()), positions=tuple(positions))
