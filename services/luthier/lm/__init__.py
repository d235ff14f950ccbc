"""Language models in torch: load, adapt, generate; without grpc and SQL."""

import logging

_TALKATIVE = ("torchao", "torch.utils._pytree")
"""Loggers of torchao, which transformers imports: it warns of libraries for GPUs that its wheel has in vain."""

# Whatever is imported from here imports transformers sooner or later, in workers as in programs that measure.
for _name in _TALKATIVE:
    logging.getLogger(_name).setLevel(logging.ERROR)
