"""How many tokens transformers draws before a model ends an answer; needs nothing of us."""

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

PROMPT, ANY, MOST = (70, 71, 72), 73, 8


class Third(LogitsProcessor):
    """Has the third drawn token be a given one, and all others another."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, ids: Any, scores: Any) -> Any:
        """Leave one token possible."""
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.token if ids.shape[1] == len(PROMPT) + 2 else ANY] = 0
        return forced


def drawn(model: Any, third: int) -> int:
    """Return how many of at most eight tokens a model draws whose third is a given one."""
    with torch.no_grad():
        ids = model.generate(
            input_ids=torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            max_new_tokens=MOST,
            do_sample=False,
            logits_processor=LogitsProcessorList([Third(third)]),
        )
    return int(ids.shape[1]) - len(PROMPT)
