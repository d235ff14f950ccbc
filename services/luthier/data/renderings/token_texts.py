"""Tokens as text, for people. `tokenizers` is imported when the first token is shown."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from luthier.storage.blobs import BlobStore

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_KEPT = 4


class TokenTexts:
    """Decodes tokens with tokenizers out of the blob store, the few used last kept in memory."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._tokenizers: OrderedDict[str, Tokenizer] = OrderedDict()

    async def texts(self, tokenizer_blob: str, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token. Raises NotFound when the blob is gone."""
        tokenizer = self._tokenizers.get(tokenizer_blob)
        if tokenizer is None:
            data = await self._blobs.read_bytes(tokenizer_blob)
            tokenizer = await asyncio.to_thread(_load, data)
            self._tokenizers[tokenizer_blob] = tokenizer
            if len(self._tokenizers) > _KEPT:
                self._tokenizers.popitem(last=False)
        self._tokenizers.move_to_end(tokenizer_blob)
        return await asyncio.to_thread(_decode, tokenizer, token_ids)


def _load(data: bytes) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(data.decode())


def _decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    alone = tokenizer.decode_batch([[token_id] for token_id in token_ids], skip_special_tokens=False)
    pairs = tokenizer.decode_batch(
        [[before, token_id] for before, token_id in pairwise(token_ids)],
        skip_special_tokens=False,
    )
    # Some decoders drop the space in front of a first token: what a token adds to the one before it has it.
    added = [
        pair.removeprefix(before) if pair.startswith(before) else text
        for before, text, pair in zip(alone, alone[1:], pairs, strict=False)
    ]
    return [*alone[:1], *added]
