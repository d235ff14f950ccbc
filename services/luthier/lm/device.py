"""The device that a worker computes on, as its setting says."""

import re

import torch

from luthier.errors import InvalidArgument


def choose_device(wanted: str) -> torch.device:
    """The device that a setting means: `cpu`, `cuda` (the first GPU), `cuda:N`, or `auto`: a GPU where there is one.

    What is asked for by name is never replaced by something else.

    Raises:
        InvalidArgument: it is none of these, or there is no such GPU; the message says what there is.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return torch.device("cuda", 0) if found else torch.device("cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", wanted)
    number = int(match[1] or 0) if match else 0
    if match is None or (wanted != "cpu" and number >= found):
        names = ["cpu", *(f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(found))]
        without = "" if found else f"; torch {torch.__version__} sees no GPU"
        raise InvalidArgument(
            f"a worker's device (LUTHIER_WORKER_DEVICE) must be auto, cpu, cuda or cuda:N and be there, "
            f"got {wanted!r}; "
            f"there is {', '.join(names)}{without}"
        )
    return torch.device("cpu") if wanted == "cpu" else torch.device("cuda", number)
