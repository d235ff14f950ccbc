"""What is due after a step: the best one's checkpoint, an early end that survives a stop, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.recipes.test_sft import BATCHES, Run, corpus_of, settings_for
from transformers import PreTrainedModel

from luthier.errors import FailedPrecondition, Reason
from luthier.lm.packed import WEIGHT, pack
from luthier.lm.readouts import FusedLoss, FusedLossAndHits
from luthier.training.recipes import checkpoint, sft
from luthier.training.recipes.course import CheckpointDue, Course, Selection, StepDone
from luthier.training.recipes.loop import Settings, pack_validation, settings_record
from luthier.training.recipes.objectives import Dpo
from luthier.training.recipes.schedule import RateCourse

RunMaker = Callable[..., Run]
NEVER_BETTER = Selection(metric="validation_loss", direction="MIN", min_delta=100.0, patience=2)


@pytest.fixture
def make_run(tiny_llama: Callable[..., PreTrainedModel], token_rows: Callable[..., list[Any]]) -> RunMaker:
    def make(selection: Selection | None, rows: Any = None, **changes: Any) -> Run:
        corpus = corpus_of(token_rows(40) if rows is None else rows)
        settings = settings_for(corpus, replace(BATCHES, num_epochs=6))
        settings = replace(settings, selection=selection, **changes)
        run = Run(tiny_llama(), corpus, settings)
        run.identity = replace(run.identity, settings=settings_record(settings))
        return run

    return make


def test_judged_follows_direction_and_least_gain() -> None:
    lowest = Selection(metric="validation_loss", direction="MIN", min_delta=0.1, patience=2)
    course = lowest.judged(Course(step=3), 1.0)
    assert (course.best_step, course.best_value, course.stale_validations) == (3, 1.0, 0)
    course = lowest.judged(replace(course, step=5), 0.95)
    assert (course.best_step, course.stale_validations, course.is_stopped) == (3, 1, False)
    better = lowest.judged(replace(course, step=7), 0.85)
    assert (better.best_step, better.best_value, better.stale_validations) == (7, 0.85, 0)
    worse = lowest.judged(replace(course, step=7), 2.0)
    assert (worse.best_step, worse.stale_validations, worse.is_stopped) == (3, 2, True)

    highest = Selection(metric="validation_reward_accuracy", direction="MAX")
    course = highest.judged(Course(step=1), 0.0)
    course = highest.judged(replace(course, step=2), 0.5)
    assert course.best_step == 2
    for step in range(3, 30):
        course = highest.judged(replace(course, step=step), 0.5)
    assert (course.best_step, course.stale_validations, course.is_stopped) == (2, 27, False)


def test_a_run_ends_early_after_so_many_validations_without_a_better_one(
    make_run: RunMaker, tmp_path: Path
) -> None:
    run = make_run(NEVER_BETTER)
    events = list(run.begin())
    validated = [one.step for one in events if isinstance(one, StepDone) and "validation_loss" in one.metrics]
    (*_, last) = events
    assert len(validated) == 3
    assert isinstance(last, CheckpointDue)
    assert last.course.is_stopped
    assert (last.course.step, last.course.best_step) == (validated[2], validated[0])
    assert last.course.step < run.settings.schedule.num_steps
    run.save(tmp_path, last.course)
    assert list(make_run(NEVER_BETTER).resume(tmp_path)) == [], "a run that has ended makes no step more"


def test_an_early_end_and_the_best_step_survive_a_stop(make_run: RunMaker, tmp_path: Path) -> None:
    whole = make_run(NEVER_BETTER, checkpoint_interval_steps=100)
    courses = [event.course for event in whole.begin() if isinstance(event, CheckpointDue)]
    whole.save(tmp_path / "whole", courses[-1])

    first = make_run(NEVER_BETTER, checkpoint_interval_steps=100)
    for event in first.begin():
        if isinstance(event, CheckpointDue):
            first.save(tmp_path / "stopped", event.course)
            break
    second = make_run(NEVER_BETTER, checkpoint_interval_steps=100)
    rest = [event for event in second.resume(tmp_path / "stopped") if isinstance(event, CheckpointDue)]
    second.save(tmp_path / "resumed", rest[-1].course)
    assert [one.course for one in rest] == courses[1:]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes(), path.name


def test_each_best_step_has_a_checkpoint(make_run: RunMaker) -> None:
    selection = Selection(metric="validation_token_accuracy", direction="MAX")
    run = make_run(selection, checkpoint_interval_steps=1000)
    taken, values = [], {}
    for event in run.begin():
        if isinstance(event, CheckpointDue):
            taken.append(event.course)
        elif selection.metric in event.metrics:
            values[event.step] = event.metrics[selection.metric]
    best = min(step for step, value in values.items() if value == max(values.values()))
    assert best in {course.step for course in taken}
    assert (taken[-1].best_step, taken[-1].best_value) == (best, values[best])
    assert taken[-1].step == run.settings.schedule.num_steps
    assert not taken[-1].is_stopped
    rising = [course.best_value for course in taken]
    assert rising == sorted(rising)


def test_a_metric_that_is_not_measured_is_refused(make_run: RunMaker, token_rows: Any) -> None:
    run = make_run(replace(NEVER_BETTER, metric="validation_reward_margin"))
    with pytest.raises(
        FailedPrecondition, match="they give validation_loss, validation_token_accuracy"
    ) as caught:
        list(run.begin())
    assert caught.value.reason == Reason.METRIC_NOT_MEASURED
    without = [row for row in token_rows(40) if row.split == "TRAIN"]
    with pytest.raises(FailedPrecondition, match="must have validation rows, got none") as caught:
        list(make_run(NEVER_BETTER, without).begin())
    assert caught.value.reason == Reason.METRIC_NOT_MEASURED


def test_a_checkpoint_of_before_runs_were_selected_from_goes_on(make_run: RunMaker, tmp_path: Path) -> None:
    """Its state has no word of selections, and the settings in it are those of a run that has none."""
    run = make_run(None)
    saved = next(event.course for event in run.begin() if isinstance(event, CheckpointDue))
    run.save(tmp_path, saved)
    path = tmp_path / checkpoint.STATE_NAME
    text = path.read_text()
    assert '"selection"' not in text
    assert '"decay_steps"' not in text
    for name, value in (("best_step", "0"), ("best_value", "0.0"), ("is_stopped", "false")):
        assert f'"{name}":{value},' in text
        text = text.replace(f'"{name}":{value},', "")
    path.write_text(text.replace('"stale_validations":0,', ""))
    course, changed = checkpoint.load(tmp_path, make_run(None).make_engine(), run.identity)
    assert (course, changed) == (saved, [])


def test_settings_record_says_what_has_an_effect(make_run: RunMaker) -> None:
    settings = make_run(None).settings
    plain = settings_record(settings)
    unsaid = ("selection", "mixture")
    assert plain == {key: value for key, value in asdict(settings).items() if key not in unsaid} | {
        "schedule": {key: value for key, value in asdict(settings.schedule).items() if key != "decay_steps"}
    }
    decaying = replace(settings.schedule, course=RateCourse.WARMUP_STABLE_DECAY, decay_steps=3)
    changed: Settings = replace(settings, schedule=decaying, selection=NEVER_BETTER)
    record = settings_record(changed, Dpo(beta=0.1))
    assert record["schedule"]["decay_steps"] == 3
    assert record["selection"]["patience"] == 2
    assert record["method"] == {"name": "Dpo", "beta": 0.1, "label_smoothing": 0.0, "nll_weight": 0.0}
    assert settings_record(changed, Dpo(beta=0.2)) != record


def test_token_accuracy_is_the_share_of_tokens_that_are_the_likeliest(make_run: RunMaker) -> None:
    run = make_run(None)
    run.begin()
    rows = [row.row for row in run.corpus.lengths("VALIDATION") if row.num_supervised]
    hits = total = 0
    for row in rows:
        batch = run.corpus.pack([row], "VALIDATION")
        with torch.no_grad():
            logits = run.model(input_ids=batch.input_ids[None]).logits[0]
        wanted = batch.streams[WEIGHT][1:] != 0
        hits += int((logits[:-1].argmax(dim=1) == batch.input_ids[1:])[wanted].sum())
        total += int(wanted.sum())
    batches = pack_validation(run.corpus, 48)
    found = sft.validate(run.engine, run.corpus, batches)
    assert found["validation_token_accuracy"] == hits / total
    # More positions than are taken at a time, and the loss of the loss alone.
    long = pack([[5, 6, 7] * 400], {WEIGHT: [[1.0] * 1200]})
    both = run.engine.score(long, FusedLossAndHits())
    assert both.loss == run.engine.score(long, FusedLoss())
    with torch.no_grad():
        logits = run.model(input_ids=long.input_ids[None]).logits[0, :-1]
    assert both.num_hits == (logits.argmax(dim=1) == long.input_ids[1:]).sum()
