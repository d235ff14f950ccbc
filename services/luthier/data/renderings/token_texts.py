"""Tokens as text, for people; decoded in limited processes, as tokenizers come from models that nobody has read."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from luthier.errors import Cancelled, FailedPrecondition
from luthier.storage.blobs import BlobStore
from luthier.work.limited_pool import POOL_PROCESSES
from luthier.work.text_pool import Bundle, TextPool, TextRefused

_TOKENIZER_FILE = "tokenizer.json"


class TokenTexts:
    """Decodes tokens with tokenizers out of the blob store. Memory: what one row's tokens have of text."""

    def __init__(self, blobs: BlobStore, pool: TextPool) -> None:
        self._blobs = blobs
        self._pool = pool
        # Threads of its own: they wait for processes, and the event loop's are for short work.
        self._threads = ThreadPoolExecutor(POOL_PROCESSES, thread_name_prefix="token-texts")

    async def texts(self, tokenizer_blob: str, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token.

        Raises:
            FailedPrecondition: MODEL_INVALID, the tokenizer fails or takes too much on these tokens.
            NotFound: the blob is gone.
            ResourceExhausted: OVERLOADED, too many others decode.
        """
        loop = asyncio.get_running_loop()
        unwanted = threading.Event()

        def check() -> None:
            if unwanted.is_set():
                raise Cancelled("nobody waits for these tokens any more")

        def read() -> Mapping[str, bytes]:
            data = asyncio.run_coroutine_threadsafe(self._blobs.read_bytes(tokenizer_blob), loop)
            return {_TOKENIZER_FILE: data.result()}

        def decode() -> list[str]:
            request = {"do": "token_texts", "ids": list(token_ids)}
            answer = self._pool.ask(Bundle(key=tokenizer_blob, read=read), request, check=check)
            texts: list[str] = answer["texts"]
            return texts

        try:
            return await loop.run_in_executor(self._threads, decode)
        except TextRefused as error:
            raise FailedPrecondition(error.message, reason=error.reason) from error
        finally:
            unwanted.set()

    def close(self) -> None:
        """End the processes."""
        self._pool.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
