"""What torch raises where there is too little memory, or where a GPU fails, by names that a program can switch on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from luthier.errors import LuthierError, Reason, Unavailable
from luthier.lm.failures import device_failed, is_for_memory, is_of_device
from luthier.training.fitting import Fit
from luthier.training.worker.order import out_of_memory
from luthier.v1 import fine_tuning_job_pb2


@contextmanager
def named_errors(
    job: fine_tuning_job_pb2.FineTuningJob, device: torch.device, chosen: Sequence[Fit]
) -> Iterator[None]:
    """Turn what torch raises for want of memory into OUT_OF_MEMORY with a hint, and a GPU's failure into CRASHED.

    The last of `chosen` is what the passes are, and were expected to take.
    """
    try:
        yield
    except LuthierError:
        raise
    except (MemoryError, RuntimeError) as error:
        if is_for_memory(error):
            tokens = chosen[-1].micro_batch_tokens if chosen else 0
            expected = chosen[-1].words if chosen else ""
            raise out_of_memory(job, str(error), tokens, expected) from error
        if is_of_device(error, device):
            raise Unavailable(device_failed(error, device), reason=Reason.CRASHED) from error
        raise
