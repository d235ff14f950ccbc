"""The loop: it learns, equals plain transformers with PEFT, and goes on after a stop as if it never had."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from luthier.errors import FailedPrecondition, Reason
from luthier.lm.adapter_files import WEIGHTS_NAME, adapter_state, save_adapter
from luthier.lm.lora import LoraSpec, insert_lora
from luthier.lm.packed import WEIGHT
from luthier.lm.readouts import FusedLoss
from luthier.training.recipes import checkpoint, sft
from luthier.training.recipes.batches import BatchSettings, count_steps, iterate_steps, plan_digest
from luthier.training.recipes.corpus import Block, Corpus
from luthier.training.recipes.course import TIMED_METRICS, CheckpointDue, Course, Event, StepDone
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.loop import Settings, pack_validation
from luthier.training.recipes.objectives import supervised
from luthier.training.recipes.schedule import RateCourse, Schedule
from luthier.training.recipes.weights import Adapter

BATCHES = BatchSettings(
    seed=3, num_epochs=2, max_steps=0, batch_tokens=96, batch_rows=0, micro_batch_tokens=48
)
OPTIMISER = OptimiserSettings(weight_decay=0.01, max_grad_norm=1.0)
SPEC = LoraSpec(rank=4, alpha=8.0)
FILES = (*Adapter.result_files, checkpoint.OPTIMISER_NAME, checkpoint.STATE_NAME)


def corpus_of(rows: list[Any]) -> Corpus:
    corpus = Corpus()
    for row in rows:
        block = Block(
            rows=np.array([row.row]),
            units=np.array([row.row]),
            bounds=np.array([0, len(row.input_ids)]),
            input_ids=np.array(row.input_ids, dtype=np.int32),
            learnt=np.array(row.loss_mask),
        )
        corpus.add(row.split, block)
    return corpus


def settings_for(corpus: Corpus, batches: BatchSettings = BATCHES, peak: float = 5e-3) -> Settings:
    num_steps = count_steps(corpus.lengths("TRAIN"), batches).num_steps
    return Settings(
        batches=batches,
        schedule=Schedule(peak=peak, course=RateCourse.COSINE, warmup_steps=2, num_steps=num_steps),
        checkpoint_interval_steps=4,
        validation_interval_steps=0,
    )


class Run:
    """A model with its adapter, ready to be trained."""

    def __init__(self, model: PreTrainedModel, corpus: Corpus, settings: Settings) -> None:
        self.model = model
        self.corpus = corpus
        self.settings = settings
        self.identity = checkpoint.RunIdentity(
            plan_digest=plan_digest(corpus.lengths("TRAIN"), corpus.lengths("VALIDATION"), settings.batches),
            settings=asdict(settings),
            optimiser=OPTIMISER,
            surroundings={"isa": "avx2", "torch_version": "2.13"},
        )

    def make_engine(self) -> Engine:
        insert_lora(self.model, SPEC, seed=11)
        weights = Adapter(self.model, "default", base_model="projects/p/models/tiny")
        return Engine(weights, OPTIMISER, torch.device("cpu"))

    def begin(self) -> Iterator[Event]:
        self.engine = self.make_engine()
        return sft.train(self.engine, self.corpus, self.settings, Course())

    def resume(self, folder: Path) -> Iterator[Event]:
        self.engine = self.make_engine()
        course, _ = checkpoint.load(folder, self.engine, self.identity)
        return sft.train(self.engine, self.corpus, self.settings, course)

    def accumulate(self, rows: Sequence[int], num_supervised: int) -> None:
        self.engine.accumulate(self.corpus.pack(rows), FusedLoss(), supervised(num_supervised))

    @property
    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        return self.engine.weights.parameters

    def save(self, folder: Path, course: Course) -> None:
        checkpoint.save(folder, self.engine, course, self.identity)

    def finish(self, events: Iterator[Event], folder: Path) -> list[StepDone]:
        """Make all remaining steps; each checkpoint replaces the one before in `folder`."""
        steps = []
        for event in events:
            if isinstance(event, CheckpointDue):
                self.save(folder, event.course)
            else:
                steps.append(event)
        return steps


RunMaker = Callable[..., Run]


@pytest.fixture
def make_run(tiny_llama: Callable[..., PreTrainedModel], token_rows: Callable[..., list[Any]]) -> RunMaker:
    def make(
        count: int = 40,
        dtype: torch.dtype = torch.float32,
        batches: BatchSettings = BATCHES,
        peak: float = 5e-3,
    ) -> Run:
        corpus = corpus_of(token_rows(count))
        return Run(tiny_llama(dtype), corpus, settings_for(corpus, batches, peak))

    return make


def timeless(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in TIMED_METRICS}


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


def test_train_lowers_training_and_validation_loss(make_run: RunMaker, tmp_path: Path) -> None:
    run = make_run(batches=replace(BATCHES, num_epochs=12), peak=3e-2)
    steps = run.finish(run.begin(), tmp_path)
    validations = [step.metrics["validation_loss"] for step in steps if "validation_loss" in step.metrics]
    assert len(validations) == 12
    assert steps[-1].metrics["train_loss"] < 0.7 * steps[0].metrics["train_loss"]
    assert validations[-1] < 0.8 * validations[0]


def test_train_makes_exactly_the_planned_steps(make_run: RunMaker, tmp_path: Path) -> None:
    run = make_run()
    steps = run.finish(run.begin(), tmp_path)
    planned = count_steps(run.corpus.lengths("TRAIN"), BATCHES)
    assert [step.step for step in steps] == list(range(1, planned.num_steps + 1))
    assert sum(step.metrics["num_tokens"] for step in steps) == planned.num_tokens
    assert sum(step.metrics["num_supervised_tokens"] for step in steps) == planned.num_supervised
    assert steps[-1].metrics["epoch"] == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_train_resumed_from_a_checkpoint_ends_with_the_same_bits(
    make_run: RunMaker, tmp_path: Path, dtype: torch.dtype
) -> None:
    whole = make_run(dtype=dtype)
    whole_steps = whole.finish(whole.begin(), tmp_path / "whole")

    first = make_run(dtype=dtype)
    for event in first.begin():
        if isinstance(event, CheckpointDue):
            first.save(tmp_path / "stopped", event.course)
        elif event.step == 6:  # killed two steps after the checkpoint of step 4
            break
    second = make_run(dtype=dtype)
    rest = second.finish(second.resume(tmp_path / "stopped"), tmp_path / "resumed")

    assert [step.step for step in rest] == [step.step for step in whole_steps[4:]]
    assert [timeless(step.metrics) for step in rest] == [timeless(step.metrics) for step in whole_steps[4:]]
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")


def test_train_does_not_depend_on_the_number_of_threads(make_run: RunMaker, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            run = make_run(dtype=torch.bfloat16)
            run.finish(run.begin(), tmp_path / str(threads))
    finally:
        torch.set_num_threads(before)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_train_cut_into_micro_batches_equals_one_batch_within_rounding(
    make_run: RunMaker, tmp_path: Path
) -> None:
    states = []
    for micro_batch_tokens in (24, 96):
        run = make_run(batches=replace(BATCHES, micro_batch_tokens=micro_batch_tokens))
        steps = run.finish(run.begin(), tmp_path)
        states.append((adapter_state(run.model, "default"), [step.metrics["train_loss"] for step in steps]))
    (cut, cut_losses), (whole, whole_losses) = states
    assert cut_losses == pytest.approx(whole_losses, rel=1e-4)
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-2, atol=2e-4)


def test_train_stops_at_a_loss_that_is_not_finite_and_names_the_step(
    make_run: RunMaker, tmp_path: Path
) -> None:
    run = make_run()
    events = run.begin()
    with torch.no_grad():
        dict(run.model.named_parameters())["model.embed_tokens.weight"][5] = float("inf")
    with pytest.raises(
        FailedPrecondition, match=r"train_loss must be finite, got (nan|inf) at step \d+"
    ) as caught:
        run.finish(events, tmp_path)
    assert caught.value.reason == Reason.LOSS_NOT_FINITE


# peft 0.21 reads it when it wraps a model of transformers 5.23.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_loss_and_gradient_equal_plain_transformers_with_peft(
    make_run: RunMaker, tiny_llama: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """One step over several micro-batches against each row alone in PEFT's model, summed by hand."""
    run = make_run()
    events = run.begin()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # B is zero at first, and with it the gradient of A
        for name, tensor in adapter_state(run.model, "default").items():
            if "lora_B" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    save_adapter(run.model, "default", tmp_path)
    step = next(iter(iterate_steps(run.corpus.lengths("TRAIN"), BATCHES)))
    assert len(step.micro_batches) > 1

    plain = tiny_llama(attention="eager")
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    tuned = get_peft_model(plain, config)
    weights = {
        name.replace(".weight", ".default.weight"): tensor
        for name, tensor in load_file(tmp_path / WEIGHTS_NAME).items()
    }
    _, unexpected = tuned.load_state_dict(weights, strict=False)
    assert unexpected == []
    rows = [row for batch in step.micro_batches for row in batch]
    mean = sum((loss_alone(tuned, run, row) for row in rows), torch.zeros(())) / step.num_supervised
    torch.autograd.backward(mean)
    expected = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in tuned.named_parameters()
        if parameter.requires_grad
    }

    for batch in step.micro_batches:
        run.accumulate(batch, step.num_supervised)
    actual = {f"base_model.model.{name}.weight": parameter.grad for name, parameter in run.parameters.items()}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6)

    norm = torch.cat([gradient.flatten() for gradient in expected.values() if gradient is not None]).norm()
    assert run.engine.update(1e-3) == pytest.approx(norm.item(), rel=1e-4)
    first = next(make_run_metrics(events))
    assert first["num_supervised_tokens"] == step.num_supervised


def loss_alone(model: Any, run: Run, row: int) -> torch.Tensor:
    """Summed loss of one row, by itself, in a plain model."""
    packed = run.corpus.pack([row])
    labels = packed.input_ids.masked_fill(packed.streams[WEIGHT] == 0, -100)[1:]
    logits = model(input_ids=packed.input_ids[None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)


def make_run_metrics(events: Iterator[Event]) -> Iterator[Mapping[str, float]]:
    return (event.metrics for event in events if isinstance(event, StepDone))


def test_first_update_equals_torch_adamw_on_clipped_gradients(make_run: RunMaker) -> None:
    run = make_run()
    run.begin()
    step = next(iter(iterate_steps(run.corpus.lengths("TRAIN"), BATCHES)))
    for rows in step.micro_batches:
        run.accumulate(rows, step.num_supervised)
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in run.parameters.values()]
    for copy, parameter in zip(copies, run.parameters.values(), strict=True):
        assert parameter.grad is not None
        copy.grad = parameter.grad.clone()
    reference = torch.optim.AdamW(copies, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    torch.nn.utils.clip_grad_norm_(copies, 1.0)
    reference.step()
    run.engine.update(2e-3)
    for copy, parameter in zip(copies, run.parameters.values(), strict=True):
        torch.testing.assert_close(parameter.detach(), copy.detach(), rtol=1e-5, atol=1e-7)


def test_validate_is_the_mean_over_tokens_not_over_rows(make_run: RunMaker) -> None:
    run = make_run()
    run.begin()
    rows = [row for row in run.corpus.lengths("VALIDATION") if row.num_supervised]
    sums = [run.engine.score(run.corpus.pack([row.row], "VALIDATION"), FusedLoss()) for row in rows]
    expected = sum(loss.item() for loss, _ in sums) / sum(count for _, count in sums)
    batches = pack_validation(run.corpus, 48)
    found = sft.validate(run.engine, run.corpus, batches)
    assert found["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert sft.validate(run.engine, Corpus(), pack_validation(Corpus(), 48)) == {}


def test_train_is_stopped_inside_a_step_by_a_check_that_raises(make_run: RunMaker) -> None:
    run = make_run()
    run.begin()
    passes = 0

    def check() -> None:
        nonlocal passes
        passes += 1
        if passes == 2:
            raise KeyboardInterrupt

    steps = sft.train(run.engine, run.corpus, run.settings, Course(), check)
    (first,) = list(itertools.islice(iterate_steps(run.corpus.lengths("TRAIN"), BATCHES), 1))
    assert len(first.micro_batches) > 1, "the check stops between two passes of one step"
    with pytest.raises(KeyboardInterrupt):
        next(steps)


def test_load_says_what_has_changed_around_the_run_now_or_earlier(make_run: RunMaker, tmp_path: Path) -> None:
    first = make_run()
    due = next(event for event in first.begin() if isinstance(event, CheckpointDue))
    first.save(tmp_path / "first", due.course)
    other = replace(first.identity, surroundings={"isa": "avx2", "torch_version": "2.14"}, bitwise=False)
    same, elsewhere, again = (make_run().make_engine() for _ in range(3))
    assert checkpoint.load(tmp_path / "first", same, first.identity)[1] == []
    course, changed = checkpoint.load(tmp_path / "first", elsewhere, other)
    assert changed == ["torch_version"]
    checkpoint.save(tmp_path / "second", elsewhere, course, other)
    assert checkpoint.load(tmp_path / "second", again, other)[1] == ["earlier"]


def test_a_checkpoint_does_not_grow_with_the_steps(make_run: RunMaker, tmp_path: Path) -> None:
    run = make_run(batches=replace(BATCHES, num_epochs=12))
    sizes = []
    for event in run.begin():
        if isinstance(event, CheckpointDue):
            run.save(tmp_path, event.course)
            sizes.append(sum((tmp_path / name).stat().st_size for name in FILES))
    assert len(sizes) > 10
    assert max(sizes) - min(sizes) < 400  # digits and the metrics of a validated step


def test_load_reads_a_checkpoint_with_the_whole_history(make_run: RunMaker, tmp_path: Path) -> None:
    """A job that was running when the format changed goes on."""
    run = make_run()
    for event in run.begin():
        if isinstance(event, CheckpointDue):
            run.save(tmp_path, event.course)
            break
    path = tmp_path / checkpoint.STATE_NAME
    state = json.loads(path.read_text())
    last = state.pop("metrics")
    path.write_text(json.dumps({**state, "format": 2, "history": [{"train_loss": 9.0}, last]}))
    course, changed = checkpoint.load(tmp_path, make_run().make_engine(), run.identity)
    assert (course.step, course.metrics, changed) == (state["step"], last, [])


@dataclass(frozen=True, slots=True, kw_only=True)
class LaterSettings(OptimiserSettings):
    """Of a version that knows one setting more."""

    adam_beta2: float = 0.999


def test_load_reads_a_checkpoint_of_before_there_was_a_setting(make_run: RunMaker, tmp_path: Path) -> None:
    run = make_run()
    run.finish(run.begin(), tmp_path)
    later = LaterSettings(weight_decay=OPTIMISER.weight_decay, max_grad_norm=OPTIMISER.max_grad_norm)
    assert (
        checkpoint.load(tmp_path, make_run().make_engine(), replace(run.identity, optimiser=later))[1] == []
    )
    for other in (replace(later, adam_beta2=0.9), replace(OPTIMISER, max_grad_norm=2.0)):
        with pytest.raises(FailedPrecondition, match="its optimiser differ"):
            checkpoint.load(tmp_path, make_run().make_engine(), replace(run.identity, optimiser=other))
