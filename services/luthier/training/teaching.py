"""How a tuned model was taught, as jobs pin it and models keep it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

TEMPLATE_PATH = "chat_template.jinja"
"""Where a tokenizer bundle, and a tuned model's download, keep the chat template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """How a tuned model was taught; see the Taught message of the API.

    Attributes:
        chat_template: Jinja source; empty: the base model's own, or none where it has none.
        template_date: what the template saw as today, YYYY-MM-DD.
        prefix_token_ids: tokens before plain text.
        stop_token_ids: tokens that end an answer.
        tokenizer_digest: digest of the tokenizer bundle.
        rendering: name of the rendering that it learns.
        rendering_digest: digest of that rendering.
    """

    chat_template: str
    template_date: str
    prefix_token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...]
    tokenizer_digest: str
    rendering: str
    rendering_digest: str

    @property
    def template_file(self) -> tuple[str, int]:
        """Digest in hex and size in bytes of the template as a file."""
        data = self.chat_template.encode()
        return hashlib.sha256(data).hexdigest(), len(data)
