"""What scoring a sequence says. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceScore:
    """Summed natural log-probability of a sequence's chosen tokens, and how many they are (0 gives 0.0)."""

    logprob: float
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceDivergence:
    """Summed Kullback-Leibler divergence, in nats, at a sequence's chosen tokens, and how many they are."""

    nats: float
    num_tokens: int
