"""The process of one base model: `python -m luthier.evaluation.worker.child`.

`luthier.work.nursery` starts the process that it is forked from. It has torch and the device; no connection, no
credential and no setting.
"""

from __future__ import annotations

import os

from luthier.evaluation.worker.order import LoadOrder
from luthier.lm.importing import uncollected
from luthier.runtime.logs import configure
from luthier.work.child import Line, Work, serve
from luthier.work.device import Setup
from luthier.work.standing_child import Speaker, answer_requests


def main() -> None:
    """Hold the model that the driver orders, and answer what it asks."""
    serve(prepare, begin)


def begin(setup: Setup) -> None:
    """Import all that a model may need, and load one for practice."""
    configure(setup.log_level)
    with uncollected():
        import luthier.evaluation.worker.computing  # noqa: F401
        from luthier.lm.rehearsal import rehearse

        rehearse()


def prepare(setup: Setup) -> Work:
    """Return what holds a model on the device, which loading opens."""
    import torch

    from luthier.evaluation.worker.computing import Computing, loaded

    device = torch.device(setup.device)
    if setup.num_threads:
        torch.set_num_threads(setup.num_threads)

    def work(line: Line, order: LoadOrder) -> None:
        model, facts, head = loaded(order, device)
        speaker = Speaker(line)
        # Without the engine's thread the process answers nothing more; the next one will.
        computing = Computing(model, speaker, ended=lambda: os._exit(1), head=head)
        speaker.begun(facts)
        answer_requests(line, computing)

    return work


if __name__ == "__main__":
    main()
