"""The process of one registration: `python -m luthier.training.worker.register_child DESCRIPTOR`.

It takes an `Order` from the socket that is open as DESCRIPTOR, and answers `Made` or the error. It ends with its
worker, however that ends.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from luthier.errors import Internal, LuthierError
from luthier.lm.importing import uncollected
from luthier.training.worker.registrar import Answer, Made, Order, end_with_worker

_logger = logging.getLogger(__name__)


def main() -> None:
    """Register what the worker orders."""
    serve(int(sys.argv[1]), register)


def register(order: Order) -> Made:
    """Do what an order says. Raises what `register_source` raises."""
    with uncollected():
        import torch

        from luthier.lm.register import register_source

    if order.num_threads:
        torch.set_num_threads(order.num_threads)
    return Made(files=register_source(order.source, order.directory, scratch=order.scratch))


def serve(descriptor: int, work: Callable[[Order], Made]) -> None:
    """Take the order, do it, answer."""
    connection = Connection(descriptor)
    order: Order = connection.recv()
    threading.Thread(target=end_with_worker, args=(connection,), daemon=True).start()
    answer: Answer
    try:
        answer = work(order)
    except (LuthierError, MemoryError) as error:
        answer = error
    except Exception as error:  # what nobody foresaw fails the registration by name
        _logger.exception("registration failed unexpectedly")
        answer = Internal(f"{type(error).__name__}: {error}")
    connection.send(answer)


if __name__ == "__main__":
    main()
