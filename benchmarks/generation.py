"""Generation on a CPU: ours against transformers' generate, drawing as reinforcement does and answering as services do.

`python benchmarks/generation.py` draws 48 tokens to each of 64 prompts at temperature 1 with an active adapter: ours
with the log-probability of each token, which transformers (with PEFT) is not asked for. The contenders take turns, each
in a process of its own. It writes results/generation.json. Then it measures what `serving.py` does, which writes
results/serving.json, and ends with one line of JSON: `generate_vs_transformers` is our tokens per second by those of
transformers' fastest setting, all other figures are explained in `serving.py`. `--drawing-only` leaves these out.
`--fast` is a smoke run on a tiny random model; it writes no results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import serving
import torch
from child_process import Measured
from sft_step import surroundings
from sft_step_task import ADAPTER
from transformers import AutoModelForCausalLM
from turns import OURS, Contender, DrawTask, child, in_turns, make_task, timed

from luthier.lm.adapter_files import load_adapter
from luthier.lm.generate import GenerationRequest
from luthier.lm.load import load_model
from luthier.lm.lora import activate
from luthier.lm.memory import freed_memory_kept
from luthier.lm.sampling import sample

RESULTS = Path(__file__).parent / "results"
NUM_PROMPTS = 64


def run_ours(task: DrawTask) -> Measured:
    """Draw as our recipe of reinforcement does, and as its worker treats memory."""
    with freed_memory_kept():
        return _sampled(task)


def _sampled(task: DrawTask) -> Measured:
    model = load_model(task.model)
    load_adapter(model, task.adapter, ADAPTER)
    activate(model, ADAPTER)

    def draw(number: int) -> int:
        request = GenerationRequest(
            request_id="drawn",
            prompts=task.prompts,
            max_new_tokens=task.new_tokens,
            temperature=1.0,
            seed=number,
            num_samples=task.num_samples,
            want_logprobs=True,
        )
        answers = sample(model, request, limit_tokens=1 << 30)
        return sum(len(one.token_ids) for one in answers)

    return _timed(task, draw)


def run_transformers(task: DrawTask, dtype: str) -> Measured:
    """Draw with `generate` of a model under PEFT, prompts padded on the left."""
    peft: Any = import_module("peft")
    base = AutoModelForCausalLM.from_pretrained(
        task.model, dtype=getattr(torch, dtype), local_files_only=True
    )
    model = peft.PeftModel.from_pretrained(base, task.adapter)
    model.train(mode=False)
    rows = [prompt for prompt in task.prompts for _ in range(task.num_samples)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def draw(number: int) -> int:
        torch.manual_seed(number)
        with torch.inference_mode():
            drawn = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                min_new_tokens=task.new_tokens,
                max_new_tokens=task.new_tokens,
                pad_token_id=0,
            )
        return int(drawn.shape[0] * (drawn.shape[1] - width))

    return _timed(task, draw)


def _timed(task: DrawTask, draw: Callable[[int], int]) -> Measured:
    """Rounds after one that warms up."""
    draw(0)
    return timed(task.num_steps, draw)


CONTENDERS: dict[str, Contender] = {
    OURS: Contender(
        run=run_ours, configuration="our sampler: bf16, adapter active, log-probabilities of all tokens"
    ),
    **{
        f"transformers_{dtype}": Contender(
            run=partial(run_transformers, dtype=dtype),
            configuration=f"transformers generate with PEFT, {dtype}, no log-probabilities",
            packages=("peft",),
        )
        for dtype in ("bfloat16", "float32")
    },
}


def summary_of(runs: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Median tokens per second by contender, and the figure that releases are compared by; None without both sides."""
    speeds = {
        name: statistics.median(sum(one["tokens"]) / sum(one["seconds"]) for one in of_name)
        for name, of_name in runs.items()
        if of_name and "error" not in of_name[0]
    }
    peers = [name for name in speeds if name != OURS]
    best = max(peers, key=lambda name: speeds[name], default=None)
    ratio = speeds[OURS] / speeds[best] if best is not None and OURS in speeds else None
    return {
        "generate_vs_transformers": None if ratio is None else round(ratio, 3),
        "best_setting": best,
        "tokens_per_second": {name: round(speed, 1) for name, speed in speeds.items()},
    }


def measured(task: DrawTask, folder: Path, repeats: int, *, fast: bool) -> tuple[dict[str, Any], bool]:
    """Measure drawing and write the results; return the summary, and whether our own side failed.

    `folder` takes files of this run alone. `fast` is a smoke run, which writes nothing.
    """
    task.save(folder / "task.json")
    runs = in_turns(Path(__file__), folder / "task.json", CONTENDERS, repeats)
    summary = summary_of(runs)
    if not fast:
        configurations = {name: one.configuration for name, one in CONTENDERS.items()}
        work = {"rows": len(task.prompts), "new_tokens": task.new_tokens, "repeats": repeats}
        document = {"machine": surroundings(), "work": work, "contenders": runs}
        document |= {"configurations": configurations, **summary}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "generation.json").write_text(json.dumps(document, indent=2) + "\n")
    return summary, "error" in runs[OURS][0]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the results, print the summary."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--child"]:
        return child(given[1:], CONTENDERS)
    parser = argparse.ArgumentParser(description="Time drawing answers against transformers' generate.")
    parser.add_argument("--rows", type=int, default=NUM_PROMPTS, help="prompts drawn for (default 64)")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens drawn for each (default 48)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--model", type=Path, help="model folder (default: the demo's base model)")
    parser.add_argument("--drawing-only", action="store_true", help="leave out what serving.py measures")
    parser.add_argument("--fast", action="store_true", help="a smoke run on a tiny random model")
    arguments = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as scratch:
        task = make_task(
            Path(scratch),
            arguments.rows,
            model=arguments.model,
            fast=arguments.fast,
            num_samples=1,
            new_tokens=arguments.new_tokens,
            num_steps=1,
        )
        summary, has_failed = measured(task, Path(scratch), arguments.repeats, fast=arguments.fast)
    if not arguments.drawing_only:
        served, is_down = serving.measured(arguments.model, arguments.repeats, fast=arguments.fast)
        summary |= {name: served[name] for name in serving.FIGURES}
        has_failed |= is_down
    print(json.dumps(summary))
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
