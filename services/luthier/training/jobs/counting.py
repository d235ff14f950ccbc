"""A survey of a rendering's rows in a process of its own: seconds of counting must not hold up a service.

`python -m luthier.training.jobs.counting` reads settings and packed lengths from its standard input and writes the
survey as JSON. It imports nothing heavy: what reads JSON, numpy, and the recipes' plan. Few rows are counted in a
thread, in less time than the process takes to start.
"""

from __future__ import annotations

import asyncio
import json
import sys
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, BinaryIO

import msgspec

from luthier.errors import Internal
from luthier.training.recipes.batches import BatchSettings
from luthier.training.recipes.estimate import quick_survey
from luthier.training.recipes.mixture import Mixture
from luthier.training.recipes.survey import PackedLengths, Survey

_MODULE = "luthier.training.jobs.counting"
_SHOWN_CHARACTERS = 500
MOST_IN_A_THREAD = 1000
"""Rows that pass, counted anew in each epoch, which a thread counts: 5 to 25 ms of a processor, in turns with the loop.

A process takes 200 ms to start.
"""


async def survey_elsewhere(
    train: PackedLengths,
    validation: PackedLengths,
    batches: BatchSettings,
    max_new_tokens: int = 0,
    mixture: Mixture | None = None,
    *,
    is_cut: bool = False,
) -> Survey:
    """Return what `quick_survey` finds, computed in a process that ends with the call, or in a thread: few rows.

    With `max_new_tokens` rows are prompts, and have answers of so many tokens. `is_cut` is `quick_survey`'s.

    Raises:
        Internal: the process failed; the message has the last of what it said.
    """
    # How often rows that are mixed in pass depends on their shares and lengths.
    if mixture is None and (len(train) + len(validation)) * batches.num_epochs <= MOST_IN_A_THREAD:
        both = _asked(train, max_new_tokens), _asked(validation, max_new_tokens)
        return await asyncio.to_thread(quick_survey, *both, batches, is_cut=is_cut)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        _MODULE,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    asked = {"batches": asdict(batches), "max_new_tokens": max_new_tokens, "is_cut": is_cut}
    asked["mixture"] = None if mixture is None else asdict(mixture)
    try:
        output, errors = await process.communicate(_written(train, validation, asked))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        said = errors.decode(errors="replace")[-_SHOWN_CHARACTERS:]
        raise Internal(f"counting the steps ended with code {process.returncode}: {said}")
    return msgspec.json.decode(output, type=Survey)


def estimate_warnings(found: Survey, max_steps: int) -> Iterator[str]:
    """Yield what is an estimate: steps, or what they come to where `max_steps` ends them."""
    totals = found.totals
    if totals is not None and totals.num_counted_steps:
        steps = f"{totals.num_steps} steps"
        what = f"what {steps} come to is" if totals.num_steps == max_steps else f"{steps} are"
        yield (
            f"{what} an estimate from {totals.num_counted_steps} that were counted, as putting so many rows in order "
            "would take too long for a plan; the job counts them before its first step"
        )


def _written(train: PackedLengths, validation: PackedLengths, asked: Mapping[str, Any]) -> bytes:
    head = {**asked, "counts": [len(train), len(validation)]}
    columns = [column.tobytes() for split in (train, validation) for column in _columns(split)]
    return b"\n".join((json.dumps(head).encode(), b"".join(columns)))


def _columns(lengths: PackedLengths) -> tuple[array[int], ...]:
    return lengths.rows, lengths.units, lengths.num_tokens, lengths.num_supervised


def _asked(lengths: PackedLengths, max_new_tokens: int) -> PackedLengths:
    return lengths.with_answers(max_new_tokens) if max_new_tokens else lengths


def _read(stream: BinaryIO) -> Survey:
    head = json.loads(stream.readline())
    splits = []
    for count in head["counts"]:
        lengths = PackedLengths()
        for column in _columns(lengths):
            column.frombytes(stream.read(count * column.itemsize))
        splits.append(_asked(lengths, head["max_new_tokens"]))
    train, validation = splits
    mixture = msgspec.convert(head["mixture"], Mixture | None)
    batches = BatchSettings(**head["batches"])
    return quick_survey(train, validation, batches, mixture, is_cut=head["is_cut"])


if __name__ == "__main__":
    json.dump(asdict(_read(sys.stdin.buffer)), sys.stdout)
