"""What scoring a sequence says. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceScore:
    """What a sequence's chosen tokens are worth.

    Attributes:
        logprob: their natural log-probability, summed; 0.0 of none.
        num_tokens: how many they are.
        is_greedy: whether each is the likeliest behind what stands before it; None: nobody looked.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceDivergence:
    """Summed Kullback-Leibler divergence, in nats, at a sequence's chosen tokens, and how many they are."""

    nats: float
    num_tokens: int
