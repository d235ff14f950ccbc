"""Which of our kernels `impl="auto"` takes on this machine's GPU: all classes of shapes, ours against eager torch.

`python benchmarks/gpu_tables.py` needs a GPU that torch can use. As `gpu.py` it checks ours against float32, times both
in turns, forward and backward, and writes the entries of this GPU's architecture in the operators' tables: a class
takes ours only if ours was right and won on every shape of it, in bfloat16, on a small and a large model. float32 has
no entries, and takes eager. The rows go to results/gpu_tables.json. `--dry-run` goes the whole way without a GPU,
small, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_meter import Problem
    from gpu_models import Model, Setting

RESULTS = Path(__file__).parent / "results" / "gpu_tables.json"
WIN = 0.97
"""A tie within the noise is no win."""
_MODELS = ("SmolLM2-135M", "Llama-3.1-8B")
_ROWS = (16, 256, 4096)
# Of what is done row by row: many are such as fill a GPU.
_MANY_ROWS = 16384
_SMALL_VOCAB = 4096

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One problem, and the class of shapes whose entry it decides.

    Attributes:
        table: the operator whose table it is.
    """

    table: str
    shape_class: str
    name: str
    dtype: str
    make: Callable[[], Problem]


def entries(*, is_dry: bool) -> Iterator[Entry]:
    """Every class of every operator that has Triton kernels."""
    # Here, as importing the kernels settles whether they are interpreted or compiled.
    from gpu_models import DRY, MODELS, ON_DEVICE, shrunk

    if is_dry:
        setting = replace(DRY, lengths=(16,))
        yield from _of_model(shrunk(MODELS[0]), setting)
        yield from _of_formats(shrunk(MODELS[0]), setting)
        yield from _numbers(shrunk(MODELS[0]), setting)
        yield from _of_rows(shrunk(MODELS[0]), setting)
        return
    for model in (one for one in MODELS if one.name in _MODELS):
        for rows in _ROWS:
            yield from _of_model(model, replace(ON_DEVICE, lengths=(rows,), labelled=rows))
            yield from _of_formats(model, replace(ON_DEVICE, lengths=(rows,)))
        yield from _numbers(model, replace(ON_DEVICE, lengths=(_ROWS[0],)))
        for rows in (*_ROWS[::2], _MANY_ROWS):
            yield from _of_rows(model, replace(ON_DEVICE, lengths=(rows,)))


def _of_model(model: Model, setting: Setting) -> Iterator[Entry]:
    """The matrix operators."""
    from luthier.kernels import grouped_lora_linear, linear_cross_entropy, lora_linear

    rows, device = setting.tokens, setting.device
    # Its attention's projections; and, as wide as its feed-forward block, three that share x and one from there back.
    heads = model.feed_forward // model.head_dim
    for shaped in (model, replace(model, heads=heads, key_heads=heads)):
        width, key_width = shaped.heads * shaped.head_dim, shaped.key_heads * shaped.head_dim
        for rank in (16, 64):
            for op, count, size in (
                ("lora_linear", 1, width),
                ("lora_linear_multi", 3, width + 2 * key_width),
            ):
                shape = lora_linear.gpu_shape_class(rows, rank, count, rows * size * model.hidden)
                label = f" of rank {rank}, {width} wide"
                yield _entry((op, "lora_linear", shape), shaped, replace(setting, rank=rank), label)
    for adapters in (1, 16):
        shape = grouped_lora_linear.shape_class(rows, adapters, device)
        several = replace(setting, adapters=adapters)
        names = "grouped_lora_linear", "grouped_lora_linear", shape
        yield _entry(names, model, several, f" of {adapters}")
    for op in ("linear_cross_entropy", "linear_logprob"):
        for vocab in sorted({min(_SMALL_VOCAB, model.vocab), model.vocab}):
            shape = linear_cross_entropy.shape_class(setting.labelled, vocab, device)
            yield _entry((op, op, shape), replace(model, vocab=vocab), setting, f" of {vocab} words")


def _of_formats(model: Model, setting: Setting) -> Iterator[Entry]:
    """Products with quantised weights, which plain torch makes numbers of."""
    from luthier.kernels.dequantise import FORMATS
    from luthier.kernels.linear import packed_shape_class

    for name in FORMATS.values():
        shape = packed_shape_class(setting.tokens, name)
        yield _entry((f"linear_{name}", "linear", shape), model, setting)


def _numbers(model: Model, setting: Setting) -> Iterator[Entry]:
    """The making of numbers, which knows of no rows: once for a model."""
    from luthier.kernels.dequantise import FORMATS

    for name in FORMATS.values():
        yield _entry((f"dequantise_{name}", "dequantise", name), model, setting)


def _of_rows(model: Model, setting: Setting) -> Iterator[Entry]:
    """The operators that take each row by itself."""
    from luthier.kernels.tables import row_class

    widths = {
        "rms_norm": model.hidden,
        "rope": model.heads * model.head_dim,
        "gated_activation": model.feed_forward,
    }
    for op, width in widths.items():
        shape = row_class(setting.tokens, setting.tokens * width, setting.device)
        yield _entry((op, op, shape), model, setting)


def _entry(names: tuple[str, str, str], model: Model, setting: Setting, more: str = "") -> Entry:
    """The problem of (operator as gpu_cases.py calls it, table, class)."""
    from gpu_cases import problem

    op, table, shape_class = names
    return Entry(
        table=table,
        shape_class=shape_class,
        name=f"{model.name}, {setting.tokens} rows: {op}{more}",
        dtype=str(setting.dtype).removeprefix("torch."),
        make=partial(problem, op, model, setting),
    )


def measured(found: Sequence[Entry], repeats: int, *, is_dry: bool) -> list[Row]:
    """A row for each problem: ours and eager alone."""
    from gpu_meter import EAGER, OURS, DeviceClock, HostClock, measure, shown

    clock = HostClock() if is_dry else DeviceClock()
    rows = []
    for one in found:
        try:
            whole = one.make()
            both = {name: whole.contenders[name] for name in (OURS, EAGER)}
            outcomes = measure(replace(whole, contenders=both), clock, repeats)
        except Exception as error:
            # Such as a model that is too large for this device: then its class stays as it was.
            outcomes = {OURS: {"status": "failed", "why": shown(error)}}
        rows.append(
            {
                "table": one.table,
                "key": f"{one.dtype}/{one.shape_class}",
                "problem": one.name,
                "ratio": _ratio(outcomes[OURS], outcomes.get(EAGER, {})),
                "outcomes": outcomes,
            }
        )
        print(f"{rows[-1]['table']:22}{rows[-1]['key']:36}{one.name:52}{rows[-1]['ratio']}", flush=True)
    return rows


def _ratio(ours: Mapping[str, Any], eager: Mapping[str, Any]) -> float | None:
    if ours["status"] != "timed" or eager["status"] != "timed":
        return None
    return round(float(ours["milliseconds"] / eager["milliseconds"]), 3)


def choices(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """By table and key without the architecture: triton where ours was right and won on every shape, else eager.

    Where eager was not timed either, nothing is decided.
    """
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["outcomes"].get("eager", {}).get("status") != "timed":
            continue
        won = row["ratio"] is not None and row["ratio"] < WIN
        table = found.setdefault(row["table"], {})
        if table.get(row["key"]) != "eager":
            table[row["key"]] = "triton" if won else "eager"
    return found


def write_tables(found: Mapping[str, Mapping[str, str]], architecture: str) -> None:
    """Put these entries of an architecture into the tables; what was not decided stays."""
    from luthier.kernels import tables

    for op, table in found.items():
        path = tables.table_path(op)
        kept = json.loads(path.read_text()) | {f"{architecture}/{key}": value for key, value in table.items()}
        path.write_text(json.dumps(dict(sorted(kept.items())), indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write tables and results, print the tables; returns the exit code."""
    # Triton settles it when it is imported, and torch imports it wherever it likes.
    if "--dry-run" in (sys.argv[1:] if argv is None else argv):
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    parser = argparse.ArgumentParser(description="Decide what `auto` takes on this GPU.", allow_abbrev=False)
    parser.add_argument(
        "--repeats", type=int, default=15, help="rounds in which both take a turn (default 15)"
    )
    parser.add_argument("--dry-run", action="store_true", help="the whole way without a GPU; writes nothing")
    arguments = parser.parse_args(argv)
    import gpu

    if not arguments.dry_run and (message := gpu.lacking()):
        print(message, file=sys.stderr)
        return 2
    found = list(entries(is_dry=arguments.dry_run))
    rows = measured(found, 1 if arguments.dry_run else arguments.repeats, is_dry=arguments.dry_run)
    tables = choices(rows)
    if not arguments.dry_run:
        machine = gpu.surroundings()
        write_tables(tables, machine["architecture"])
        document = {"machine": machine, "repeats": arguments.repeats, "rows": rows, "tables": tables}
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
