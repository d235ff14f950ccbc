"""What a job trains as footprints count it, and which passes fit into a memory: said by plans, done by workers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from luthier.kernels.dispatch import current_isa
from luthier.kernels.linear_cross_entropy import shape_class
from luthier.kernels.tables import entries
from luthier.lm.kept import CHECKPOINTINGS, Checkpointing
from luthier.lm.module_patterns import assigned, targeted
from luthier.lm.shape import ModelShape
from luthier.training.recipe_settings import is_divided, kept_of, precision_of, ranks_of, states_of
from luthier.training.recipes.batches import PlanTotals
from luthier.training.recipes.footprint import (
    Footprint,
    LargestPass,
    Place,
    Read,
    Trained,
    Work,
    footprint,
    has_8_bits,
)
from luthier.v1.fine_tuning_job_pb2 import (
    ACTIVATION_CHECKPOINTING_UNSPECIFIED,
    FineTuningJob,
    MemoryEstimate,
    PreferenceConfig,
)

USABLE = 0.9
"""Of a memory: what estimates may be wrong by, and what others need meanwhile, is left."""
MOST_TOKENS: Mapping[Place, int] = {"CPU": 4096, "GPU": 32_768}
"""Tokens of a pass beyond which it is no faster, so that a job that leaves it open takes no more."""
FEW_TOKENS = 1024
"""Tokens of a pass below which it is slower than one whose layers compute again what they did not keep."""
_CACHE_PASSES = 16
"""As `recipes.rollouts` holds keys and values of so many micro-batches."""
_MIB = 1 << 20
_COMPARED = (
    PreferenceConfig.LOSS_UNSPECIFIED,
    PreferenceConfig.LOSS_DPO,
    PreferenceConfig.LOSS_IPO,
    PreferenceConfig.LOSS_KTO,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What is known of a job's rows.

    Attributes:
        longest: tokens of the longest unit.
        largest: tokens of the largest step, all samples of prompts counted.
        scored_share: of them those that are scored.
        num_tokens: tokens of all rows that are held.
        num_ranks: that share the passes of a step.
    """

    longest: int
    largest: int
    scored_share: float
    num_tokens: int
    num_ranks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A size of passes and what layers keep of them, and what that takes; `fits` where it is within the limit.

    Attributes:
        micro_batch_tokens: most tokens of a pass.
        kept: what layers keep.
        footprint: what the largest pass takes.
        limit: bytes that it may take; 0: not known.
    """

    micro_batch_tokens: int
    kept: Checkpointing
    footprint: Footprint
    limit: int

    @property
    def fits(self) -> bool:
        """Whether it is within what is usable of the limit."""
        return not self.limit or self.footprint.peak <= USABLE * self.limit

    @property
    def is_beyond(self) -> bool:
        """Whether it is more than all of the limit."""
        return bool(self.limit) and self.footprint.peak > self.limit

    @property
    def words(self) -> str:
        """What it takes, in words, part by part."""
        of = f", of {mib(self.limit)} that there are" if self.limit else ""
        return (
            f"passes of {self.micro_batch_tokens} tokens with activation_checkpointing {self.kept} "
            f"{expected_words(memory_message(self.footprint))}{of}"
        )


def expected_words(memory: MemoryEstimate) -> str:
    """Return an estimate for people, part by part."""
    parts = [
        f"{field.name.removesuffix('_bytes')} {mib(value)}"
        for field, value in memory.ListFields()
        if field.name != "peak_bytes"
    ]
    return f"are expected to take {mib(memory.peak_bytes)} ({', '.join(parts)})"


def trained_of(job: FineTuningJob, shape: ModelShape, other_bytes: int = 0, num_ranks: int = 0) -> Trained:
    """Return what a job, all its defaults filled in, trains of a model; `other_bytes` are those of models beside it.

    Of a model that ranks divide a part is that of so many; 0: of the least that the job takes.

    Raises:
        InvalidArgument: a pattern of ranks cannot be read or matches no module, or a target is none
            (MODULE_PATTERN_INVALID).
    """
    is_whole = job.HasField("full")
    ranks = {} if is_whole else _ranks(job, shape)
    factors = sum(
        rank * (shape.linear(module).inputs + shape.linear(module).outputs) for module, rank in ranks.items()
    )
    # With DoRA each has a length for each of its outputs, and what is multiplied by it is kept.
    outputs = sum(shape.linear(module).outputs for module in ranks) if job.lora.use_dora else 0
    modules = frozenset(job.lora.trained_modules)
    words = shape.vocabulary * shape.hidden
    num_whole = words * (1 if shape.is_tied else len(modules)) if modules else 0
    has_head = is_whole or "lm_head" in modules or ("embed_tokens" in modules and shape.is_tied)
    read, draws = _read(job), job.HasField("reinforcement")
    compared = draws and job.reinforcement.kl_weight > 0
    if job.HasField("preference"):
        # That of all weights is scored once, before the first step.
        compared = job.preference.loss in _COMPARED and not is_whole
    return Trained(
        shape=shape,
        is_whole=is_whole,
        precision=precision_of(job.base_precision),
        num_factors=factors + outputs,
        sum_of_ranks=sum(ranks.values()),
        num_scaled=outputs,
        num_whole=num_whole,
        num_in_8_bits=_num_in_8_bits(job, shape, ranks, num_whole),
        offloads_moments=states_of(job.hyperparameters.optimiser_states) == "OFFLOADED",
        has_trained_head=has_head and read != "VALUES",
        read=read,
        holds_logits=read != "VALUES" and not has_head and _holds_logits(shape, read),
        keeps_gates=_is_plain("gated_activation", "many_rows"),
        has_reference=compared,
        keeps_reference=is_whole and draws and compared,
        other_bytes=other_bytes,
        num_parts=(num_ranks or ranks_of(job)[0]) if is_divided(job) else 1,
        num_samples=job.reinforcement.num_samples,
        max_new_tokens=job.reinforcement.max_new_tokens,
    )


def _num_in_8_bits(job: FineTuningJob, shape: ModelShape, ranks: Mapping[str, int], num_whole: int) -> int:
    """Return how many of the weights that a job trains have moments of 8 bits: those of its large matrices."""
    if states_of(job.hyperparameters.optimiser_states) != "INT8":
        return 0
    words = shape.vocabulary * shape.hidden
    if job.HasField("full"):
        matrices = [one.inputs * one.outputs for one in shape.linears] * shape.layers
        matrices += [words] * (1 if shape.is_tied else 2)
    else:
        linears = [(rank, shape.linear(module)) for module, rank in ranks.items()]
        matrices = [rank * size for rank, one in linears for size in (one.inputs, one.outputs)]
        matrices += [words] * (num_whole // words)
    return sum(filter(has_8_bits, matrices))


def _holds_logits(shape: ModelShape, read: Read) -> bool:
    """Whether the head of a bfloat16 model is left to plain torch, which makes its logits."""
    op = "linear_cross_entropy" if read == "LOSS" else "linear_logprob"
    return _is_plain(op, shape_class(FEW_TOKENS, shape.vocabulary))


def _is_plain(op: str, of_shape: str) -> bool:
    """Whether this machine's tables leave an operator of a class to plain torch, in bfloat16."""
    return entries(op).get(f"{current_isa()}/bfloat16/{of_shape}", "eager") == "eager"


def _ranks(job: FineTuningJob, shape: ModelShape) -> dict[str, int]:
    """Return the rank of each module that an adapter changes. Raises as `trained_of`."""
    targets = tuple(job.lora.target_modules)
    modules = targeted(targets, shape.modules()) if targets else shape.modules()
    others = assigned("rank_pattern", tuple(sorted(job.lora.rank_pattern.items())), modules)
    return {module: others.get(module, job.lora.rank) for module in modules}


def _read(job: FineTuningJob) -> Read:
    if job.HasField("reward_model"):
        return "VALUES"
    if job.HasField("reinforcement"):
        return "LOGPROBS_AND_ENTROPIES"
    return "LOGPROBS" if job.HasField("preference") else "LOSS"


def work_of(job: FineTuningJob, totals: PlanTotals) -> Work:
    """Return what the steps of a job pass through: of prompts every answer as long as it may be."""
    times = max(1, job.reinforcement.num_samples)
    return Work(
        num_tokens=times * totals.num_tokens,
        num_scored=times * totals.num_supervised,
        num_seen=times * totals.num_seen,
        num_steps=totals.num_steps,
        num_drawn=times * totals.num_supervised if job.HasField("reinforcement") else 0,
    )


def rows_of(
    job: FineTuningJob, totals: PlanTotals, longest: int, num_row_tokens: int, num_ranks: int = 1
) -> Rows:
    """Return what is known of a job's rows once its steps are counted."""
    times = max(1, job.reinforcement.num_samples)
    share = totals.num_supervised / totals.num_tokens if totals.num_tokens else 0.0
    return Rows(
        longest=longest,
        largest=times * totals.largest_step_tokens,
        scored_share=share,
        num_tokens=num_row_tokens,
        num_ranks=num_ranks,
    )


def fit_of(trained: Trained, rows: Rows, size: int, kept: Checkpointing, place: Place, limit: int) -> Fit:
    """Return what passes of at most so many tokens take."""
    num_tokens = min(max(size, rows.longest), max(rows.largest, rows.longest))
    cached = min(_CACHE_PASSES * size, rows.largest) if trained.num_samples else 0
    largest = LargestPass(
        num_tokens=num_tokens, num_scored=round(num_tokens * rows.scored_share), num_cached=cached
    )
    found = footprint(trained, largest, kept, place, rows.num_tokens)
    return Fit(micro_batch_tokens=size, kept=kept, footprint=found, limit=limit)


def fits_of(job: FineTuningJob, trained: Trained, rows: Rows, place: Place, limit: int) -> Iterator[Fit]:
    """Yield what a job may do, from the fastest to what takes the least memory.

    What it says itself stays; what it leaves open is chosen.
    """
    for size, kept in _choices(job, rows, place):
        yield fit_of(trained, rows, size, kept, place, limit)


def _choices(job: FineTuningJob, rows: Rows, place: Place) -> Iterator[tuple[int, Checkpointing]]:
    said, longest = job.hyperparameters.activation_checkpointing, rows.longest
    kepts = CHECKPOINTINGS if said == ACTIVATION_CHECKPOINTING_UNSPECIFIED else (kept_of(said),)
    sizes = [job.hyperparameters.micro_batch_tokens]
    if not sizes[0]:
        most = MOST_TOKENS[place]
        if rows.num_ranks > 1:
            # A rank without a pass would only wait.
            most = min(most, math.ceil(rows.largest / rows.num_ranks))
        sizes = [max(longest, most)]
        while sizes[-1] > longest:
            sizes.append(max(longest, sizes[-1] // 2))
    large = [size for size in sizes if size >= FEW_TOKENS] or sizes[:1]
    for kept in kepts:
        for size in large:
            yield size, kept
    for size in sizes[len(large) :]:
        yield size, kepts[-1]


def what_would(job: FineTuningJob, trained: Trained, rows: Rows, place: Place, limit: int) -> str:
    """Return, in words, what of a job would fit into a memory, where what it says does not."""
    free = FineTuningJob()
    free.CopyFrom(job)
    free.hyperparameters.micro_batch_tokens = 0
    free.hyperparameters.activation_checkpointing = ACTIVATION_CHECKPOINTING_UNSPECIFIED
    found = next((one for one in fits_of(free, trained, rows, place, limit) if one.fits), None)
    if found is not None:
        return f"micro_batch_tokens {found.micro_batch_tokens} with activation_checkpointing {found.kept} would fit"
    room = _longest_that_fits(trained, rows, place, limit)
    if room:
        return f"rows of at most {room} tokens would fit; create the rendering with a smaller max_tokens"
    least = fit_of(
        trained, Rows(longest=1, largest=1, scored_share=1.0, num_tokens=0), 1, "FULL", place, limit
    )
    needed = round(least.footprint.peak / USABLE)
    smaller = "an adapter, a smaller base model" if trained.is_whole else "a smaller base model"
    ranks = "more ranks" if trained.num_parts > 1 else "ranks that divide the model (sharding FSDP2)"
    return f"no pass would: it needs a device of at least {mib(needed)}, {smaller}, or {ranks}"


def _longest_that_fits(trained: Trained, rows: Rows, place: Place, limit: int) -> int:
    """Return the most tokens of a row whose pass fits; 0: none does."""
    low, high = 0, rows.longest
    while low < high:
        middle = (low + high + 1) // 2
        alone = Rows(
            longest=middle, largest=middle, scored_share=rows.scored_share, num_tokens=rows.num_tokens
        )
        if fit_of(trained, alone, middle, "FULL", place, limit).fits:
            low = middle
        else:
            high = middle - 1
    return low


def memory_message(found: Footprint) -> MemoryEstimate:
    """Return a footprint as the API says it."""
    return MemoryEstimate(
        weights_bytes=found.weights,
        adapters_bytes=found.adapters,
        gradients_bytes=found.gradients,
        optimiser_bytes=found.optimiser,
        activations_bytes=found.activations,
        logits_bytes=found.logits,
        cache_bytes=found.cache,
        runtime_bytes=found.runtime,
        peak_bytes=found.peak,
    )


def mib(size: int) -> str:
    """Return a size for people."""
    return f"{size / _MIB:,.0f} MiB"
