"""`luthier jobs plan` for a class of devices."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

from luthier.v1.fine_tuning_job_pb2 import (
    ACTIVATION_CHECKPOINTING_FULL,
    ACTIVATION_CHECKPOINTING_SELECTIVE,
    SHARDING_FSDP2,
    SHARDING_REPLICATED,
    DeviceClass,
    FineTuningJob,
    FineTuningPlan,
    MemoryEstimate,
    RunRecord,
)

Run = Callable[..., Result]


def test_jobs_plan_shows_what_a_job_takes_on_the_device_that_was_said(services: Any, run: Run) -> None:
    seen: list[Any] = []

    def plan(request: Any, context: Any) -> FineTuningPlan:
        seen.append(request)
        return FineTuningPlan(
            num_steps=41,
            memory=MemoryEstimate(
                weights_bytes=3 << 20, activations_bytes=2 << 30, peak_bytes=(2 << 30) + (3 << 20)
            ),
            micro_batch_tokens=32768,
            activation_checkpointing=ACTIVATION_CHECKPOINTING_SELECTIVE,
            seconds_per_step=0.25,
            total_seconds=10.25,
        )

    services.answers["PlanFineTuningJob"] = plan
    words = ("jobs", "plan", "--model", "m", "--rendering", "r", "--activation-checkpointing", "full")
    result = run(*words, "--device", "gpu:80:989")
    assert result.exit_code == 0, result.output
    assert seen[0].device == DeviceClass(
        kind=DeviceClass.KIND_GPU, memory_bytes=80 << 30, operations_per_second=989e12
    )
    assert seen[0].fine_tuning_job.hyperparameters.activation_checkpointing == ACTIVATION_CHECKPOINTING_FULL
    assert "2.0 GiB: weights 3.0 MiB, activations 2.0 GiB" in result.stdout
    assert "of at most 32,768 tokens, activation checkpointing selective" in result.stdout
    assert "about 0.25 s a step, 10 s in all" in result.stdout
    assert run(*words, "--device", "cpu:1.5").exit_code == 0
    assert seen[1].device == DeviceClass(kind=DeviceClass.KIND_CPU, memory_bytes=3 << 29)
    assert run(*words).exit_code == 0
    assert not seen[2].HasField("device")


@pytest.mark.parametrize("text", ["tpu", "gpu:x", "gpu:80:", "gpu:1.2.3", "gpu:80:989:1"])
def test_jobs_plan_refuses_a_device_that_it_cannot_read(services: Any, run: Run, text: str) -> None:
    result = run("jobs", "plan", "--model", "m", "--rendering", "r", "--device", text)
    assert result.exit_code == 2
    assert "as gpu:80:989 or cpu:16" in result.stderr
    assert text in result.stderr


def test_jobs_say_how_ranks_share_a_model(services: Any, run: Run) -> None:
    asked: list[Any] = []

    def create(request: Any, context: Any) -> FineTuningJob:
        asked.append(request.fine_tuning_job)
        return FineTuningJob(name="projects/default/fineTuningJobs/one")

    services.answers["CreateFineTuningJob"] = create
    words = ("jobs", "create", "--model", "m", "--rendering", "r")
    for chosen in ("fsdp2", "replicated"):
        assert run(*words, "--sharding", chosen).exit_code == 0
    assert [one.sharding for one in asked] == [SHARDING_FSDP2, SHARDING_REPLICATED]
    refused = run(*words, "--sharding", "zero3")
    assert refused.exit_code == 2
    assert "'replicated', 'fsdp2'" in refused.stderr
    record = RunRecord(num_ranks=2, sharding=SHARDING_FSDP2)
    services.answers["GetFineTuningJob"] = lambda request, context: FineTuningJob(
        name=request.name, run_record=record
    )
    assert "2, each with a part of the model" in run("jobs", "show", "one").stdout


def test_what_comes_after_a_plan_is_the_job_that_was_planned(services: Any, run: Run) -> None:
    planned: list[FineTuningJob] = []
    created: list[FineTuningJob] = []

    def plan(request: Any, context: Any) -> FineTuningPlan:
        planned.append(request.fine_tuning_job)
        return FineTuningPlan(num_steps=1)

    def create(request: Any, context: Any) -> FineTuningJob:
        created.append(request.fine_tuning_job)
        return FineTuningJob(name="projects/default/fineTuningJobs/one")

    services.answers |= {"PlanFineTuningJob": plan, "CreateFineTuningJob": create}
    flags = (
        "--rank 4 --alpha 8 --rslora --dora --target q_proj --target v_proj --base-precision nf4 --epochs 2"
    )
    flags += " --lr 3e-4 --schedule linear --warmup-steps 5 --batch-rows 8 --seed 7 --mix general=0.2"
    flags += " --sharding fsdp2 --require-device gpu --set labels.team=nlp"
    for words in (flags, "--full --preference dpo", "--reward-model --max-steps 3"):
        result = run(
            "jobs", "plan", "--model", "m", "--rendering", "r", *shlex.split(words), "--device", "cpu"
        )
        assert result.exit_code == 0, result.output
        _, _, following = result.stderr.partition("next: luthier ")
        assert run(*shlex.split(following)).exit_code == 0, following
    assert created == planned
    lora = created[0].lora
    assert (lora.use_rslora, lora.use_dora, list(lora.target_modules)) == (True, True, ["q_proj", "v_proj"])
    assert created[0].hyperparameters.learning_rate == 3e-4


def test_kernels_are_one_line_and_all_of_them_where_one_asks(services: Any, run: Run) -> None:
    kernels = {f"op_{number}": "amx_bf16 (tiles)" for number in range(9)} | {"rope": "eager"}
    services.answers["GetFineTuningJob"] = lambda request, context: FineTuningJob(
        name=request.name, run_record=RunRecord(kernels=kernels)
    )
    shown = run("jobs", "show", "one").stdout
    (line,) = [one for one in shown.splitlines() if one.startswith("kernels")]
    assert line.split(maxsplit=1)[1].strip() == "amx_bf16 9, eager 1"
    assert "op_3" not in shown
    assert "op_3=amx_bf16 (tiles)" in " ".join(run("jobs", "show", "one", "-o", "wide").stdout.split())
    assert '"run_record"' in run("jobs", "show", "one", "-o", "json").stdout
