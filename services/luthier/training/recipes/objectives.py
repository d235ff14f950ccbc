"""What each method learns: plain functions from what a readout gave to sums, each with the count that divides it.

A count is that of the whole step, over all micro-batches, so that nothing but rounding depends on how a step is cut.
One sum is learnt, `train_loss`; the others are measured beside it. Formulas and their papers stand at the settings of
each method; where TRL's code does otherwise, that is said there.

Shape suffixes: N named tokens, S sequences, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.kernels.linear_cross_entropy import LossSum
from luthier.lm.packed import PackedBatch
from luthier.lm.readouts import LossAndHits, TokenScores
from luthier.training.recipes.engine import Objective, Sum
from luthier.training.recipes.units import CHOSEN, DESIRABLE, MISMATCHED, REJECTED, UNDESIRABLE

REFERENCE = "reference_logprob"
"""Name of the stream with the log-probability that the reference gives each learnt token."""

# at::internal::GRAIN_SIZE: torch cuts a sum to one number among its threads from this size on.
_SERIAL_SUM = 32768
# The likeliest answer that odds are formed of: beyond it float32 has no odds.
_MOST_LOGPROB = -1e-7


@dataclass(frozen=True, slots=True, kw_only=True)
class Dpo:
    """-log sigmoid(beta D), D the difference of both answers' log-ratios to the reference (arXiv:2305.18290).

    Attributes:
        beta: how strongly the reference holds.
        label_smoothing: share of pairs that are the wrong way round, below 0.5; the loss is then the robust one
            (arXiv:2403.00409). TRL's `sigmoid` ignores it, its `robust` is this.
        nll_weight: that times the mean loss of the chosen answers' tokens is added (arXiv:2404.19733). TRL divides by
            the tokens of a micro-batch, this by those of the step.
    """

    beta: float
    label_smoothing: float = 0.0
    nll_weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ipo:
    """(D - 1 / (2 beta))^2, D the difference of both answers' mean log-ratios a token (arXiv:2310.12036).

    The mean, which the paper does not say, is what its authors confirmed to have used.
    """

    beta: float
    nll_weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Orpo:
    """Mean loss of the chosen answers' tokens - beta log sigmoid(log of the odds ratio) (arXiv:2403.07691).

    Odds are those of the mean log-probability a token; there is no reference. TRL learns the prompt in the first term
    too, against the paper; this does not.
    """

    beta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Simpo:
    """-log sigmoid(beta D - gamma), D the difference of both mean log-probabilities a token (arXiv:2405.14734).

    There is no reference, and no term for the chosen answers' loss: TRL's has one unless `cpo_alpha` is 0.
    """

    beta: float
    gamma: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Kto:
    """weight (1 - sigmoid(beta (r - z))) of desirable, weight (1 - sigmoid(beta (z - r))) of undesirable answers.

    r is an answer's log-ratio to the reference, z the mean of those of answers to other prompts, at least 0 and without
    a gradient (arXiv:2402.01306). z is that of the whole step, before its first backward pass; TRL's is that of a
    micro-batch, so that there the result changes with how a step is cut.
    """

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PairwiseReward:
    """-log sigmoid(w - l - margin) + centring (w + l)^2, of both answers' values w and l (arXiv:2204.05862).

    The second term keeps values around 0 (arXiv:2312.09244).
    """

    margin: float = 0.0
    centring: float = 0.0


PairLoss = Dpo | Ipo | Orpo | Simpo


def needs_reference(loss: PairLoss | Kto | PairwiseReward) -> bool:
    """Whether a method compares with a reference."""
    return isinstance(loss, Dpo | Ipo | Kto)


def supervised(num_supervised: int) -> Objective[LossSum]:
    """What a step minimises that learns so many tokens: their mean loss."""
    return lambda found, _: {"train_loss": Sum(found.loss_sum, num_supervised)}


def supervised_with_hits(num_supervised: int) -> Objective[LossAndHits]:
    """The same, and the share of the tokens that the model finds the likeliest."""
    return lambda found, _: {
        "train_loss": Sum(found.loss.loss_sum, num_supervised),
        "token_accuracy": Sum(found.num_hits, num_supervised),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Log-probabilities of S answers: `logprob`, `reference` (zeros where there is none) and `num_tokens`, [S] each."""

    logprob: Tensor
    reference: Tensor
    num_tokens: Tensor

    @property
    def ratio(self) -> Tensor:
        """Log-ratios to the reference."""
        return self.logprob - self.reference

    def of(self, batch: PackedBatch, *roles: str) -> Answers:
        """Return the answers of a batch that have one of the roles, in their order."""
        places = [place for place, role in enumerate(batch.roles) if role in roles]
        index = torch.tensor(places, dtype=torch.int64, device=self.logprob.device)
        return Answers(
            logprob=self.logprob[index], reference=self.reference[index], num_tokens=self.num_tokens[index]
        )


def answers(scores: TokenScores, batch: PackedBatch) -> Answers:
    """Sum the log-probabilities of a batch's named tokens by sequence."""
    bounds = torch.searchsorted(
        scores.position, torch.tensor(batch.cu_seqlens, device=scores.position.device)
    )
    counts = bounds.diff()
    reference_N = (
        batch.streams[REFERENCE][scores.position + 1]
        if REFERENCE in batch.streams
        else torch.zeros_like(scores.logprob)
    )
    lengths = counts.tolist()
    return Answers(
        logprob=_sums(scores.logprob, lengths),
        reference=_sums(reference_N, lengths),
        num_tokens=counts.to(torch.float32),
    )


def pair_objective(loss: PairLoss, counts: Mapping[str, float]) -> Objective[TokenScores]:
    """What a step of pairs minimises and measures; `counts` are those of `pair_counts`."""
    nll_scale = _nll_weight(loss) * counts["train_loss"] / counts["nll_loss"]

    def objective(scores: TokenScores, batch: PackedBatch) -> dict[str, Sum]:
        found = answers(scores, batch)
        chosen, rejected = found.of(batch, CHOSEN), found.of(batch, REJECTED)
        loss_P, reward_P, other_reward_P = pair_loss(loss, chosen, rejected)
        nll = -chosen.logprob.sum()
        total = loss_P.sum()
        if nll_scale:
            total = total + nll_scale * nll
        sums = {
            "train_loss": total,
            **_reward_sums(reward_P.detach(), other_reward_P.detach()),
            "logprob_chosen": chosen.logprob.detach().sum(),
            "logprob_rejected": rejected.logprob.detach().sum(),
            "nll_loss": nll.detach(),
        }
        return _divided(sums, counts)

    return objective


def pair_counts(num_pairs: int, num_chosen_tokens: int) -> dict[str, float]:
    """Return what divides each sum of a step of pairs."""
    names = ("train_loss", *_REWARDS, "logprob_chosen", "logprob_rejected")
    return dict.fromkeys(names, float(num_pairs)) | {"nll_loss": float(num_chosen_tokens)}


def pair_loss(loss: PairLoss, chosen: Answers, rejected: Answers) -> tuple[Tensor, Tensor, Tensor]:
    """Return, [P] each, the losses, without the term for the chosen answers' tokens, and both sides' rewards."""
    mean_w, mean_l = chosen.logprob / chosen.num_tokens, rejected.logprob / rejected.num_tokens
    match loss:
        case Dpo(beta=beta, label_smoothing=wrong):
            margin_P = beta * (chosen.ratio - rejected.ratio)
            loss_P = -logsigmoid(margin_P)
            if wrong:
                loss_P = ((1 - wrong) * loss_P + wrong * logsigmoid(-margin_P)) / (1 - 2 * wrong)
            return loss_P, beta * chosen.ratio, beta * rejected.ratio
        case Ipo(beta=beta):
            difference_P = chosen.ratio / chosen.num_tokens - rejected.ratio / rejected.num_tokens
            return (difference_P - 1 / (2 * beta)).square(), beta * chosen.ratio, beta * rejected.ratio
        case Orpo(beta=beta):
            log_odds_P = (mean_w - mean_l) - (_log1mexp(mean_w) - _log1mexp(mean_l))
            return -beta * logsigmoid(log_odds_P), beta * mean_w, beta * mean_l
        case Simpo(beta=beta, gamma=gamma):
            return -logsigmoid(beta * (mean_w - mean_l) - gamma), beta * mean_w, beta * mean_l


def unpaired_objective(loss: Kto, baseline: float, counts: Mapping[str, float]) -> Objective[TokenScores]:
    """What a step of single answers minimises and measures; `baseline` is z, `counts` those of `unpaired_counts`."""

    def objective(scores: TokenScores, batch: PackedBatch) -> dict[str, Sum]:
        found = answers(scores, batch)
        good, bad = found.of(batch, DESIRABLE), found.of(batch, UNDESIRABLE)
        above_good, above_bad = good.ratio - baseline, baseline - bad.ratio
        kept = loss.desirable_weight * (1 - torch.sigmoid(loss.beta * above_good))
        shed = loss.undesirable_weight * (1 - torch.sigmoid(loss.beta * above_bad))
        sums = {
            "train_loss": kept.sum() + shed.sum(),
            "reward_chosen": loss.beta * good.ratio.detach().sum(),
            "reward_rejected": loss.beta * bad.ratio.detach().sum(),
            "reward_accuracy": (above_good > 0).sum() + (above_bad > 0).sum(),
        }
        return _divided(sums, counts)

    return objective


def unpaired_counts(num_desirable: int, num_undesirable: int) -> dict[str, float]:
    """Return what divides each sum of a step of single answers."""
    both = float(num_desirable + num_undesirable)
    return {
        "train_loss": both,
        "reward_chosen": float(num_desirable),
        "reward_rejected": float(num_undesirable),
        "reward_accuracy": both,
    }


def baseline_objective(num_mismatched: int) -> Objective[TokenScores]:
    """Measure what z is made of: the mean log-ratio of so many answers to other prompts."""

    def objective(scores: TokenScores, batch: PackedBatch) -> dict[str, Sum]:
        return {"kl": Sum(answers(scores, batch).of(batch, MISMATCHED).ratio.sum(), num_mismatched)}

    return objective


def reward_objective(loss: PairwiseReward, counts: Mapping[str, float]) -> Objective[Tensor]:
    """What a step of pairs with a value for each answer minimises and measures; `counts`: of `reward_counts`."""

    def objective(value_S: Tensor, batch: PackedBatch) -> dict[str, Sum]:
        places = [
            [place for place, role in enumerate(batch.roles) if role == side] for side in (CHOSEN, REJECTED)
        ]
        chosen_P, rejected_P = value_S[torch.tensor(places, device=value_S.device)]
        loss_P = -logsigmoid(chosen_P - rejected_P - loss.margin)
        if loss.centring:
            loss_P = loss_P + loss.centring * (chosen_P + rejected_P).square()
        return _divided(
            {"train_loss": loss_P.sum(), **_reward_sums(chosen_P.detach(), rejected_P.detach())}, counts
        )

    return objective


def reward_counts(num_pairs: int) -> dict[str, float]:
    """Return what divides each sum of a step of a reward model."""
    return dict.fromkeys(("train_loss", *_REWARDS), float(num_pairs))


_REWARDS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")


def _reward_sums(chosen_P: Tensor, rejected_P: Tensor) -> dict[str, Tensor]:
    values = (chosen_P.sum(), rejected_P.sum(), (chosen_P - rejected_P).sum(), (chosen_P > rejected_P).sum())
    return dict(zip(_REWARDS, values, strict=True))


def _divided(sums: Mapping[str, Tensor], counts: Mapping[str, float]) -> dict[str, Sum]:
    return {name: Sum(total, counts[name]) for name, total in sums.items() if counts[name]}


def _nll_weight(loss: PairLoss) -> float:
    match loss:
        case Dpo(nll_weight=weight) | Ipo(nll_weight=weight):
            return weight
        case Orpo():
            return 1.0
        case Simpo():
            return 0.0


def serial_sum(value_N: Tensor) -> Tensor:
    """Sum values to one; the same bits whatever the number of threads."""
    return reduce(add, [part.sum() for part in torch.split(value_N, _SERIAL_SUM // 2)])


def _sums(value_N: Tensor, lengths: list[int]) -> Tensor:
    """Sum runs of so many values each."""
    return torch.stack([serial_sum(run) for run in torch.split(value_N, lengths)])


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x below 0, without cancellation on either side of log 2."""
    below = x.clamp(max=_MOST_LOGPROB)
    return torch.where(below > -0.6931472, torch.log(-torch.expm1(below)), torch.log1p(-torch.exp(below)))
