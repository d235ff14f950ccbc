"""What is left of a tuned model in each form in which it is taken away, each registered and read again.

`python benchmarks/take_away.py` tunes an adapter of SmolLM2-135M-Instruct, the demo's base model, on synthetic earnings
news (examples/earnings) for a few steps, and takes it away as PEFT's files, merged, and as GGUF in F16 and in Q8_0: by
the functions that jobs of merging and exporting run. Each form is registered as a base model would be (PEFT's are read
by `peft` itself) and asked the same: the log-probabilities of 64 held-out tokens in float32, so that weights differ and
not sums, and greedy answers in bfloat16, as evaluations draw them. All are held against the adapter beside its base;
`base` without it is the yardstick: what was learnt.

It writes results/take_away.json and ends with one line of JSON: for each form the mean and the largest difference of a
token's log-probability, and how many answers are the same. `--fast` is a smoke run on a tiny random model.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from quantised_loss import learn, loss_of, news
from sft_step import surroundings
from sft_step_task import ADAPTER, LORA, MAX_GRAD_NORM, SEED, Row, demo_model, render_rows, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier.lm.adapter_files import load_adapter, save_adapter
from luthier.lm.exporting import ExportSource, export_files
from luthier.lm.generate import GenerationRequest
from luthier.lm.held_out import plain_logprobs, sampler_logprobs
from luthier.lm.load import eos_token_ids, load_model
from luthier.lm.lora import activate, insert_lora
from luthier.lm.made import GgufType, HeldOut, HeldOutRow, Made
from luthier.lm.merging import merge_files
from luthier.lm.packed import WEIGHT, pack
from luthier.lm.readouts import TokenLogprobs
from luthier.lm.register import register_source
from luthier.lm.sampling import sample
from luthier.lm.sources import DirectorySource, GgufSource, Source
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.weights import Adapter

RESULTS = Path(__file__).parent / "results"
NUM_HELD_OUT_TOKENS = 64
_CPU = torch.device("cpu")
_RATE = 1e-3
_FORMS: tuple[GgufType, ...] = ("F16", "Q8_0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is tuned, and how much each form is asked."""

    steps: int = 12
    step_rows: int = 8
    answers: int = 16
    new_tokens: int = 96


FAST = Sizes(steps=2, step_rows=4, answers=3, new_tokens=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What every form is asked.

    Attributes:
        held_out: tokens that are scored.
        prompts: that are answered greedily.
        new_tokens: of an answer at most.
    """

    held_out: HeldOut
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a form made of it: a log-probability for each held-out token, and an answer to each prompt."""

    logprobs: tuple[float, ...]
    answers: tuple[tuple[int, ...], ...]


def asked_of(rows: Sequence[Row], sizes: Sizes) -> Asked:
    """Return the first learnt tokens of rows that were never trained on, and what stands before the answers."""
    held_out: list[HeldOutRow] = []
    left = NUM_HELD_OUT_TOKENS
    for row in rows:
        places = tuple(place for place, learnt in enumerate(row.supervised) if learnt and place)[:left]
        if places:
            held_out.append(HeldOutRow(token_ids=row.ids, positions=places))
            left -= len(places)
    if left:
        raise ValueError(f"{NUM_HELD_OUT_TOKENS} held-out tokens are needed, {left} are missing")
    prompts = tuple(row.ids[: row.supervised.index(True)] for row in rows[: sizes.answers])
    return Asked(held_out=tuple(held_out), prompts=prompts, new_tokens=sizes.new_tokens)


def tuned(model: Path, rows: Sequence[Row], heldout: Sequence[Row], sizes: Sizes, folder: Path) -> Engine:
    """Tune an adapter on rows and write it in PEFT's format; returns the engine that trained it."""
    loaded = load_model(model)
    insert_lora(loaded, LORA, seed=SEED, name=ADAPTER)
    steps = [rows[number * sizes.step_rows : (number + 1) * sizes.step_rows] for number in range(sizes.steps)]
    adapter = Adapter(loaded, ADAPTER, base_model="base")
    settings = OptimiserSettings(weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM)
    before = loss_of(Engine(adapter, settings, _CPU), heldout)
    engine = learn(adapter, steps, _RATE)
    print(f"held-out loss {before:.4f} -> {loss_of(engine, heldout):.4f}", file=sys.stderr, flush=True)
    save_adapter(loaded, ADAPTER, folder, base_model=str(model))
    return engine


def engines_logprobs(engine: Engine, held_out: HeldOut) -> dict[str, list[float]]:
    """Return what the training engine and the generation engine find of the same tokens, in bfloat16."""
    trained: list[float] = []
    for row in held_out:
        mask = [place in row.positions for place in range(len(row.token_ids))]
        batch = pack([row.token_ids], {WEIGHT: [mask]})
        trained += engine.score(batch, TokenLogprobs(is_wide=True)).logprob.double().tolist()
    sampled = [one for row in held_out for one in sampler_logprobs(engine.weights.model, row)]
    return {"training": trained, "generation": sampled}


def ours(asked: Asked, model: Path, adapter: Path | None = None) -> Said:
    """Ask a registered model, with an adapter beside it where one is given."""

    def loaded(dtype: torch.dtype) -> PreTrainedModel:
        found = load_model(model, dtype=dtype)
        if adapter is not None:
            load_adapter(found, adapter, ADAPTER)
            activate(found, ADAPTER)
        return found

    logprobs = plain_logprobs(loaded(torch.float32), asked.held_out)
    drawing = loaded(torch.bfloat16)
    request = GenerationRequest(
        request_id="asked",
        prompts=asked.prompts,
        max_new_tokens=asked.new_tokens,
        stop_token_ids=eos_token_ids(drawing),
    )
    answers = sample(drawing, request, limit_tokens=1 << 30)
    return Said(logprobs=logprobs, answers=tuple(one.token_ids for one in answers))


def by_peft(asked: Asked, model: Path, adapter: Path) -> Said:
    """Ask the base model in transformers with the adapter in `peft`: neither is code of ours."""
    peft: Any = import_module("peft")

    def loaded(dtype: torch.dtype) -> Any:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True)
        return peft.PeftModel.from_pretrained(base, adapter).eval()

    logprobs = plain_logprobs(loaded(torch.float32), asked.held_out)
    drawing, answers = loaded(torch.bfloat16), []
    stops = sorted(eos_token_ids(drawing.base_model.model))
    for prompt in asked.prompts:
        with torch.inference_mode():
            (row,) = drawing.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=asked.new_tokens,
                eos_token_id=stops,
                pad_token_id=0,
            )
        said = row[len(prompt) :].tolist()
        answers.append(tuple(said[:-1] if said[-1] in stops else said))
    return Said(logprobs=logprobs, answers=tuple(answers))


def registered(source: Source, folder: Path) -> Path:
    """Register a form as a base model; returns the folder that jobs and evaluations would load."""
    register_source(source, folder, scratch=folder.with_name(f"{folder.name}-scratch"))
    return folder


def merged_form(model: Path, adapter: Path, folder: Path, held_out: HeldOut) -> Made:
    """Write merged weights with what else a model of transformers has, as a download lays them out."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return merge_files(model, adapter, folder, held_out=held_out)


def compared(said: Said, reference: Said) -> dict[str, float]:
    """Return how what a form said differs from what the adapter said."""
    gaps = [abs(one - other) for one, other in zip(said.logprobs, reference.logprobs, strict=True)]
    pairs = list(zip(said.answers, reference.answers, strict=True))
    return {
        "mean_logprob": fmean(said.logprobs),
        "mean_logprob_difference": fmean(gaps),
        "largest_logprob_difference": max(gaps),
        "num_answers": len(pairs),
        "num_equal_answers": sum(one == other for one, other in pairs),
        "num_answer_tokens": sum(len(other) for _, other in pairs),
        "num_equal_leading_tokens": sum(_leading(one, other) for one, other in pairs),
    }


def _leading(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def measured(model: Path, sizes: Sizes, scratch: Path) -> dict[str, Any]:
    """Tune, take away in every form, read each again; returns a row for each form."""
    count = sizes.steps * sizes.step_rows
    rows = render_rows(news("train", count, SEED), model, count)
    heldout = render_rows(news("test", max(16, sizes.answers), SEED), model, max(16, sizes.answers))
    asked, adapter = asked_of(heldout, sizes), scratch / "adapter"
    engine = tuned(model, rows, heldout, sizes, adapter)
    engines = engines_logprobs(engine, asked.held_out)
    learnt = loss_of(engine, heldout)
    del engine
    gc.collect()
    reference = ours(asked, model, adapter)
    forms = {
        "base": _row(reference, lambda: ours(asked, model)),
        "peft": _row(reference, lambda: by_peft(asked, model, adapter), _size(adapter)),
    }
    forms["merged"] = _taken(
        asked,
        reference,
        lambda: merged_form(model, adapter, scratch / "merged", asked.held_out),
        lambda _: registered(DirectorySource(path=scratch / "merged"), scratch / "merged-again"),
    )
    for form in _FORMS:
        forms[f"gguf_{form.lower()}"] = _gguf(asked, reference, form, model, adapter, scratch)
    return {
        "held_out_loss": learnt,
        "num_held_out_tokens": len(reference.logprobs),
        "mean_logprob": fmean(reference.logprobs),
        "engines": {
            name: {
                "mean_logprob": fmean(found),
                "mean_logprob_difference": fmean(
                    abs(one - other) for one, other in zip(found, reference.logprobs, strict=True)
                ),
            }
            for name, found in engines.items()
        },
        "forms": forms,
    }


def _gguf(
    asked: Asked, reference: Said, form: GgufType, model: Path, adapter: Path, scratch: Path
) -> dict[str, Any]:
    folder = scratch / f"gguf-{form.lower()}"
    source = ExportSource(model=model, adapter=adapter, form=form, title="taken", held_out=asked.held_out)
    return _taken(
        asked,
        reference,
        lambda: export_files(source, folder),
        lambda made: registered(GgufSource(path=made.files[0][1]), folder.with_name(f"{folder.name}-again")),
    )


def _taken(
    asked: Asked, reference: Said, make: Callable[[], Made], again: Callable[[Made], Path]
) -> dict[str, Any]:
    """Make a form, register it, ask it; its own check stands beside what was found here."""
    began = time.monotonic()
    made = make()
    seconds = time.monotonic() - began
    folder = again(made)
    row = _row(reference, lambda: ours(asked, folder), sum(_size(path) for _, path in made.files))
    check = {key: value for key, value in asdict(made.check).items() if key != "held_out_logprobs"}
    return {**row, "seconds": round(seconds, 1), "check": check, "warnings": list(made.warnings)}


def _row(reference: Said, ask: Callable[[], Said], size_bytes: int = 0) -> dict[str, Any]:
    row = {**compared(ask(), reference), **({"size_bytes": size_bytes} if size_bytes else {})}
    gc.collect()
    print(row, file=sys.stderr, flush=True)
    return row


def _size(path: Path) -> int:
    return sum(one.stat().st_size for one in path.rglob("*")) if path.is_dir() else path.stat().st_size


def summary_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of each form that releases are compared by."""
    return {
        f"{name}_{short}": round(row[key], 5)
        for name, row in document["forms"].items()
        for short, key in (
            ("logprob_difference", "mean_logprob_difference"),
            ("largest_logprob_difference", "largest_logprob_difference"),
            ("equal_answers", "num_equal_answers"),
        )
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the results, print the summary."""
    parser = argparse.ArgumentParser(description="What is left of a tuned model in each form that leaves.")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--fast", action="store_true", help="a smoke run on a tiny random model")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    sizes = FAST if arguments.fast else Sizes()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = (
            tiny_model(
                scratch / "tiny",
                [{"text": turn["content"]} for one in news("train", 200, SEED) for turn in one["messages"]],
            )
            if arguments.fast
            else demo_model()
        )
        document = measured(model, sizes, scratch)
    summary = summary_of(document)
    if not arguments.fast:
        document = {"machine": surroundings(), "work": asdict(sizes), **document, **summary}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "take_away.json").write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
