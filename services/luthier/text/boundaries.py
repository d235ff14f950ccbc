"""Where an answer begins: the tokens before it are those that ask for it, whatever the tokenizer would join.

A model is asked with the tokens of the prompt alone. So a text is encoded up to where its answer begins, and then on
from there: where the whole text's tokens have a boundary at that place they are taken, else the answer is encoded
apart in such a way that all tokens together decode to the same text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from luthier.text.tokenizer import Encoding, TokenizerBundle

# Texts that an answer can stand behind while it is encoded, so that it gets no space of its own in front. They are
# cut off again: the first one serves that shares no token with the answer.
_ANCHORS = ("\n", ":", "|", ">", "a", "\x02")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApartEncoding:
    """Tokens of a text that was cut at places, and at which of these it made a difference.

    `counts`: the tokens before each cut. `joined`: cuts at which the whole text has no boundary of the same tokens.
    `inexact`: those of them where no encoding of what follows decodes to the same text.
    """

    encoding: Encoding
    counts: tuple[int, ...] = ()
    joined: frozenset[int] = frozenset()
    inexact: frozenset[int] = frozenset()


class BoundaryEncoder:
    """Encodes texts so that the tokens up to each place given are those of the text that ends there."""

    def __init__(self, bundle: TokenizerBundle) -> None:
        self._bundle = bundle
        self._lead_ids = bundle.encode(_ANCHORS[1]).ids
        self._special_ids = frozenset(bundle.token_id(token) for token in bundle.special_texts)

    def encode(self, text: str, cuts: Sequence[int]) -> ApartEncoding:
        """Return the tokens of a text cut at character positions that rise.

        For each cut, the tokens before it are those of `encode(text[:cut], cuts before it)`. Takes the time of about
        two plain encodings where special tokens stand between the cuts.
        """
        assert list(cuts) == sorted(set(cuts)), "they rise"
        if not cuts:
            return ApartEncoding(encoding=self._bundle.encode(text))
        first = self._bundle.encode(text[: cuts[0]])
        ids, offsets = list(first.ids), list(first.offsets)
        counts: list[int] = []
        joined, inexact = set(), set()
        for cut, end in pairwise([*cuts, len(text)]):
            start = self._last_special(ids, offsets)
            alone = self._bundle.encode(text[start:cut]) if start or counts else first
            more, is_joined, is_exact = self._extension(alone, text[start:cut], text[cut:end])
            counts.append(len(ids))
            ids += more.ids
            offsets += [(cut + begin, cut + stop) for begin, stop in more.offsets]
            joined |= {cut} if is_joined else set()
            inexact |= set() if is_exact else {cut}
        return ApartEncoding(
            encoding=Encoding(ids=tuple(ids), offsets=tuple(offsets)),
            counts=tuple(counts),
            joined=frozenset(joined),
            inexact=frozenset(inexact),
        )

    def says_nothing(self, ids: Sequence[int]) -> bool:
        """Return whether these tokens are special ones and white space only."""
        return self._special_ids.issuperset(ids) or not self._bundle.decode(ids).strip()

    def _last_special(self, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> int:
        """Return where the last special token starts: tokenizers encode what follows one by itself."""
        for index in range(len(ids) - 1, -1, -1):
            if ids[index] in self._special_ids:
                return offsets[index][0]
        return 0

    def _extension(self, alone: Encoding, before: str, after: str) -> tuple[Encoding, bool, bool]:
        """Return the tokens of `after`, whether they differ from the whole text's, and whether they read the same.

        `alone` are the tokens of `before`.
        """
        whole = self._bundle.encode(before + after)
        count = len(alone.ids)
        if whole.ids[:count] == alone.ids and (not count or whole.offsets[count - 1][1] <= len(before)):
            return _after(whole, count, len(before)), False, True
        wanted = self._text(whole.ids)
        apart = self._bundle.encode(after)
        if self._text((*alone.ids, *apart.ids)) == wanted:
            return apart, True, True
        for anchor in _ANCHORS:
            behind = self._behind(anchor, after)
            if behind is not None and self._text((*alone.ids, *behind.ids)) == wanted:
                return behind, True, True
        return apart, True, False

    def _behind(self, anchor: str, text: str) -> Encoding | None:
        """Return the tokens of a text as they stand behind an anchor, None when they share one with it."""
        encoding = self._bundle.encode(anchor + text)
        count = sum(end <= len(anchor) for _, end in encoding.offsets)
        if any(start < len(anchor) for start, _ in encoding.offsets[count:]):
            return None
        return _after(encoding, count, len(anchor))

    def _text(self, ids: Sequence[int]) -> str:
        # Decoders drop spaces of the first token, some all of them: these tokens are none.
        text = self._bundle.decode((*self._lead_ids, *ids), skip_special_tokens=False)
        return unicodedata.normalize("NFC", text)


def _after(encoding: Encoding, count: int, shift: int) -> Encoding:
    offsets = tuple((max(start - shift, 0), end - shift) for start, end in encoding.offsets[count:])
    return Encoding(ids=encoding.ids[count:], offsets=offsets)
