"""Jobs that mix renderings, on the command line: what `--mix` sends, what wins, and how their plans look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from tests.client.creating import Creating

from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FineTuningPlan, RenderingShare, RenderingUse

Run = Callable[..., Result]
PARENT = "projects/default"
WORDS = ("--model", "m", "--rendering", "r")


@pytest.fixture
def creating(services: Any) -> Creating:
    return Creating(services)


def shares(job: FineTuningJob) -> list[tuple[str, float]]:
    return [(one.rendering, one.share) for one in job.mixed_renderings]


def test_mix_names_renderings_and_their_shares(creating: Creating, run: Run) -> None:
    mixed = ("--mix", "general=0.2", "--mix", f"{PARENT}/renderings/code=0.05")
    result = run("jobs", "create", *WORDS, *mixed, "--set", "rendering_share=0.75")
    assert result.exit_code == 0, result.output
    job = creating.one("CreateFineTuningJob").fine_tuning_job
    assert shares(job) == [(f"{PARENT}/renderings/general", 0.2), (f"{PARENT}/renderings/code", 0.05)]
    assert job.rendering_share == 0.75


def test_mix_takes_the_place_of_the_mixture_in_a_file(creating: Creating, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "base_model: m\nrendering: r\nrendering_share: 0.9\nmixed_renderings: [{rendering: old, share: 0.1}]\n"
    )
    assert run("jobs", "plan", "-f", str(path)).exit_code == 0
    assert run("jobs", "create", "-f", str(path), "--mix", "new=0.3").exit_code == 0
    kept = creating.one("PlanFineTuningJob").fine_tuning_job
    assert (shares(kept), kept.rendering_share) == ([(f"{PARENT}/renderings/old", 0.1)], 0.9)
    changed = creating.one("CreateFineTuningJob").fine_tuning_job
    assert (shares(changed), changed.rendering_share) == ([(f"{PARENT}/renderings/new", 0.3)], 0)


@pytest.mark.parametrize("word", ["general", "=0.2", "general=much", "general=", "general=nan"])
def test_mix_refuses_what_is_no_rendering_with_its_share(creating: Creating, run: Run, word: str) -> None:
    result = run("jobs", "create", *WORDS, "--mix", word)
    assert result.exit_code == 2
    assert f"must be RENDERING=SHARE, such as general=0.2, got {word!r}" in " ".join(result.stderr.split())


def test_plan_shows_what_is_taken_of_each_rendering_and_goes_on_with_mix(services: Any, run: Run) -> None:
    plan = FineTuningPlan(num_steps=9, num_steps_per_epoch=9, num_train_rows=40)
    plan.renderings.extend(
        [
            RenderingUse(rendering=f"{PARENT}/renderings/r", share=0.8, reached_share=0.801, num_epochs=1),
            RenderingUse(
                rendering=f"{PARENT}/renderings/general",
                share=0.2,
                reached_share=0.199,
                num_rows=1234,
                num_tokens=56789,
                num_epochs=0.25,
            ),
        ]
    )
    services.answers["PlanFineTuningJob"] = lambda request, context: plan
    result = run("jobs", "plan", *WORDS, "--mix", "general=0.2")
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if line.startswith("general"))
    assert line.split() == ["general", "20.0%", "19.9%", "1,234", "56,789", "0", "0.25", "0"]
    assert "jobs create --model m --rendering r --mix general=0.2" in result.stderr


def test_show_names_what_is_mixed_in(services: Any, run: Run) -> None:
    job = FineTuningJob(name=f"{PARENT}/fineTuningJobs/one", rendering=f"{PARENT}/renderings/r")
    job.mixed_renderings.append(RenderingShare(rendering=f"{PARENT}/renderings/general", share=0.2))
    services.answers["GetFineTuningJob"] = lambda request, context: job
    assert "general 20%" in run("jobs", "show", "one").output
