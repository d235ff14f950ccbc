"""What rendering a record can show that does not stop it, and that nobody would see in the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FindingKind(StrEnum):
    """What was found. The names are those of the API."""

    JOINED_BOUNDARY = "JOINED_BOUNDARY"
    INEXACT_BOUNDARY = "INEXACT_BOUNDARY"
    ONLY_END_LEARNT = "ONLY_END_LEARNT"
    TURN_NOT_WRITTEN = "TURN_NOT_WRITTEN"
    ARGUMENTS_NOT_OBJECT = "ARGUMENTS_NOT_OBJECT"
    ASKED_DIFFERENTLY = "ASKED_DIFFERENTLY"
    END_NOT_LEARNT = "END_NOT_LEARNT"
    EQUAL_SIDES = "EQUAL_SIDES"
    EQUAL_WITHIN_LIMIT = "EQUAL_WITHIN_LIMIT"
    NO_MISMATCHED_ANSWER = "NO_MISMATCHED_ANSWER"
    MISMATCHED_CUT = "MISMATCHED_CUT"
    CHOSEN_SIDE_TAKEN = "CHOSEN_SIDE_TAKEN"
    DESIRABLE_TAKEN = "DESIRABLE_TAKEN"
    UNDESIRABLE_LEFT_OUT = "UNDESIRABLE_LEFT_OUT"
    END_UNKNOWN = "END_UNKNOWN"

    @property
    def explanation(self) -> str:
        """What is so of the records that have it, and what it means."""
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    FindingKind.JOINED_BOUNDARY: (
        "an answer begins inside a token of the whole text: it is encoded apart from what asks for it, as the model "
        "is asked"
    ),
    FindingKind.INEXACT_BOUNDARY: (
        "an answer begins where the tokenizer cannot go on exactly: it is encoded on its own, and may read "
        "differently behind what asks for it"
    ),
    FindingKind.ONLY_END_LEARNT: (
        "no token of an answer is learnt but white space and its end: this teaches to say nothing"
    ),
    FindingKind.TURN_NOT_WRITTEN: (
        "the chat template leaves out text of a turn or the tools: the model does not see it"
    ),
    FindingKind.ARGUMENTS_NOT_OBJECT: "a tool call's arguments are no JSON object: templates get them as text",
    FindingKind.ASKED_DIFFERENTLY: (
        "an answer is learnt behind other text than the model sees when it is asked, as the chat template writes "
        "earlier turns differently once more follow"
    ),
    FindingKind.END_NOT_LEARNT: (
        "no end-of-turn or end-of-sequence token of an answer is learnt: the tuned model may not know when to stop"
    ),
    FindingKind.EQUAL_SIDES: "both sides of a pair are the same: nothing is learnt from it",
    FindingKind.EQUAL_WITHIN_LIMIT: (
        "the sides of a pair differ only beyond max_tokens, where they are cut: nothing is learnt from it"
    ),
    FindingKind.NO_MISMATCHED_ANSWER: (
        "no other record of the split has another prompt and another answer to compare with: nothing is learnt from it"
    ),
    FindingKind.MISMATCHED_CUT: (
        "the prompt with another record's answer is longer than max_tokens: that row is cut, whatever the length policy"
    ),
    FindingKind.CHOSEN_SIDE_TAKEN: "a pair gives its chosen side to this SUPERVISED rendering",
    FindingKind.DESIRABLE_TAKEN: (
        "an answer is labelled desirable: this SUPERVISED rendering takes it as one without a label"
    ),
    FindingKind.UNDESIRABLE_LEFT_OUT: (
        "an answer is labelled undesirable: this SUPERVISED rendering leaves it out"
    ),
    FindingKind.END_UNKNOWN: (
        "it is not known which token ends an answer: one that is sampled may go on to its greatest length"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something found in one record; `message` says where in it and what."""

    kind: FindingKind
    message: str
