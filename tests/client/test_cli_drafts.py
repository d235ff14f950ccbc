"""`-f FILE` and `--set` of the commands that create: what is sent, what wins, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from tests.client.creating import Creating

from luthier.v1.dataset_pb2 import (
    SPLIT_TEST,
    SPLIT_TRAIN,
    SPLIT_VALIDATION,
)
from luthier.v1.evaluation_pb2 import (
    ARM_TEMPLATE_BASE,
    EVALUATION_METRIC_PERPLEXITY,
    EvaluationArm,
)
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.rendering_pb2 import LENGTH_POLICY_FAIL, MASK_MODE_LAST_TURN, Rendering

Run = Callable[..., Result]
PARENT = "projects/default"
VERSION = f"{PARENT}/datasets/mine/versions/v1"
JOB = """
base_model: m
rendering: r
hyperparameters:
  learning_rate: 1e-3
  batch_rows: 4
lora: {rank: 4, target_modules: [a, b]}
labels: {team: nlp}
"""


@pytest.fixture
def creating(services: Any) -> Creating:
    return Creating(services)


@pytest.fixture
def job_file(tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return str(path)


def test_jobs_create_takes_all_from_a_file(creating: Creating, run: Run, job_file: str) -> None:
    result = run("jobs", "create", "-f", job_file, "--name", "new")
    assert result.exit_code == 0, result.output
    request = creating.one("CreateFineTuningJob")
    assert request.fine_tuning_job_id == "new"
    wanted = FineTuningJob(
        base_model=f"{PARENT}/models/m", rendering=f"{PARENT}/renderings/r", labels={"team": "nlp"}
    )
    wanted.hyperparameters.learning_rate, wanted.hyperparameters.batch_rows = 1e-3, 4
    wanted.lora.rank = 4
    wanted.lora.target_modules[:] = ["a", "b"]
    assert request.fine_tuning_job == wanted


def test_flags_win_over_the_file_and_assignments_over_both(
    creating: Creating, run: Run, job_file: str
) -> None:
    flags = (
        "--rank",
        "8",
        "--alpha",
        "3",
        "--batch-tokens",
        "99",
        "--target",
        "c",
        "--target",
        "d",
        "--seed",
        "0",
    )
    values = ["lora.rank=16", "lora.target_modules[]=e", "lora.rank=32", "lora.dropout=0.1"]
    values += ["lora.rank_pattern={'layers\\.0\\..*': 8}", "lora.alpha_pattern.k_proj=4"]
    values += ["lora.trained_modules=[embed_tokens]"]
    assigned = [word for value in values for word in ("--set", value)]
    # Wherever the words stand.
    result = run("jobs", "plan", *assigned, *flags, "-f", job_file, "--set", "labels.run=7")
    assert result.exit_code == 0, result.output
    job = creating.one("PlanFineTuningJob").fine_tuning_job
    assert (job.lora.rank, job.lora.alpha, job.hyperparameters.learning_rate) == (32, 3.0, 1e-3)
    assert (list(job.lora.target_modules), job.lora.dropout) == (["c", "d", "e"], 0.1)
    assert (job.lora.rank_pattern, job.lora.alpha_pattern) == ({r"layers\.0\..*": 8}, {"k_proj": 4})
    assert list(job.lora.trained_modules) == ["embed_tokens"]
    assert job.hyperparameters.WhichOneof("batch_size") == "batch_tokens"
    assert dict(job.labels) == {"team": "nlp", "run": "7"}


def test_a_field_without_a_flag_needs_none(creating: Creating, run: Run) -> None:
    words = ("--model", "m", "--set", "rendering=r", "--set", "hyperparameters.weight_decay=1e-4")
    result = run("jobs", "create", *words)
    assert result.exit_code == 0, result.output
    job = creating.one("CreateFineTuningJob").fine_tuning_job
    assert (job.rendering, job.hyperparameters.weight_decay) == (f"{PARENT}/renderings/r", 1e-4)


def test_file_comes_from_standard_input(creating: Creating, run: Run) -> None:
    result = run("jobs", "create", "-f", "-", "--set", "labels.a=b", stdin=JOB)
    assert result.exit_code == 0, result.output
    assert creating.one("CreateFineTuningJob").fine_tuning_job.lora.rank == 4
    refused = run("jobs", "create", "-f", "-", stdin="\nlora: {rnk: 4}")
    assert refused.exit_code == 2
    assert "Error: <stdin>:2: lora.rnk is no field of LoraConfig; did you mean rank?" in refused.stderr


def test_plan_hints_at_the_same_words(creating: Creating, run: Run, job_file: str) -> None:
    stderr = run("jobs", "plan", "-f", job_file, "--set", "display_name=a b").stderr
    words = f"jobs create -f {job_file} --set 'display_name=a b'"
    assert stderr == f"next: luthier {words}\n"


def test_renderings_create_from_a_file(creating: Creating, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "rendering.json"
    path.write_text(
        json.dumps({"datasetVersion": "mine/v1", "model": "m", "maskMode": "LAST_TURN", "max_tokens": 9})
    )
    result = run("renderings", "create", "-f", str(path), "--set", "length_policy=fail", "--max-tokens", "8")
    assert result.exit_code == 0, result.output
    assert creating.one("CreateRendering").rendering == Rendering(
        dataset_version=VERSION,
        model=f"{PARENT}/models/m",
        mask_mode=MASK_MODE_LAST_TURN,
        max_tokens=8,
        length_policy=LENGTH_POLICY_FAIL,
    )
    other = run("renderings", "create", "mine/v2", "-f", str(path))
    assert other.exit_code == 0, other.output
    assert creating.requests["CreateRendering"][1].rendering.dataset_version == VERSION.replace("v1", "v2")


def test_evaluations_create_from_a_file(creating: Creating, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.yaml"
    path.write_text(
        "dataset_version: mine/v1\nsplit: train\narms:\n- {arm_id: a, model: m}\n- {arm_id: b, model: n}\n"
    )
    words = ("--set", "arms[1].num_shots=3", "--set", "metrics[]=perplexity", "--template", "a=base")
    result = run("evaluations", "create", "-f", str(path), *words)
    assert result.exit_code == 0, result.output
    sent = creating.one("CreateEvaluation").evaluation
    # The default of --split does not win over the file.
    assert (sent.split, list(sent.metrics)) == (SPLIT_TRAIN, [EVALUATION_METRIC_PERPLEXITY])
    assert list(sent.arms) == [
        EvaluationArm(arm_id="a", model=f"{PARENT}/models/m", template=ARM_TEMPLATE_BASE),
        EvaluationArm(arm_id="b", model=f"{PARENT}/models/n", num_shots=3),
    ]
    result = run("evaluations", "create", "-f", str(path), "--arm", "c=m:1", "--split", "validation")
    assert result.exit_code == 0, result.output
    sent = creating.requests["CreateEvaluation"][1].evaluation
    assert ([arm.arm_id for arm in sent.arms], sent.split) == (["c"], SPLIT_VALIDATION)


def test_datasets_create_from_a_file(creating: Creating, run: Run, tmp_path: Path) -> None:
    path, records = tmp_path / "version.yaml", tmp_path / "my.jsonl"
    path.write_text(
        "sources: [{upload: old}]\ninvalid_record_policy: skip\nsplit_settings: {test_fraction: 0.1}\n"
    )
    records.write_text("{}\n")
    result = run("datasets", "create", "-f", str(path), "--name", "mine", "--validation", "0.2")
    assert result.exit_code == 0, result.output
    version = creating.one("CreateDatasetVersion").dataset_version
    assert [source.upload for source in version.sources] == [f"{PARENT}/uploads/old"]
    assert (version.invalid_record_policy, version.split_settings.test_fraction) == (2, 0.1)
    assert version.split_settings.validation_fraction == 0.2

    words = ("--split", f"test={records}", "--set", "sources[0].format=alpaca", "--set", "labels.a=b")
    result = run("datasets", "create", "-f", str(path), str(records), *words)
    assert result.exit_code == 0, result.output
    version = creating.requests["CreateDatasetVersion"][1].dataset_version
    assert [(one.upload, one.split, one.format, one.filename) for one in version.sources] == [
        (f"{PARENT}/uploads/my", 0, 3, ""),
        (f"{PARENT}/uploads/my", SPLIT_TEST, 0, ""),
    ]
    assert dict(version.labels) == {"a": "b"}


def test_datasets_create_uploads_nothing_that_it_would_not_use(
    services: Any, creating: Creating, run: Run, tmp_path: Path
) -> None:
    records = tmp_path / "my.jsonl"
    records.write_text("{}\n")
    for words, problem in (
        (("--set", "sources=[{upload: u}]"), "--set sources=... leaves out the files"),
        (
            ("--set", "sources[0].uplod=u"),
            "sources[0].uplod is no field of DatasetSource; did you mean upload?",
        ),
        (("--set", "lables.a=b"), "lables is no field of DatasetVersion; did you mean labels?"),
    ):
        refused = run("datasets", "create", str(records), *words)
        assert refused.exit_code == 2
        assert problem in " ".join(refused.stderr.split())
    nameless = run("datasets", "create", "--set", "sources[].upload=u")
    assert (nameless.exit_code, "Missing option '--name'" in nameless.stderr) == (2, True)
    assert not services.calls


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("jobs", "create"), "Missing option '--rendering', or rendering in a file or by --set."),
        (
            ("jobs", "create", "--rendering", "r"),
            "Missing option '--model' or '--start-from', or one of them in a file or by --set.",
        ),
        (
            ("jobs", "plan", "--model", "m", "--rendering", "r", "--full", "--rank", "4"),
            "--full trains all weights",
        ),
        (
            ("jobs", "plan", "--model", "m"),
            "Missing option '--rendering', or rendering in a file or by --set.",
        ),
        (
            ("renderings", "create", "--model", "m"),
            "Missing argument 'VERSION', or dataset_version in a file",
        ),
        (
            ("evaluations", "create", "--version", "d/v"),
            "Missing option '--arm', or arms in a file or by --set.",
        ),
        (("datasets", "create"), "give at least one file, or --split SPLIT=FILE, or sources in -f FILE"),
        (
            ("jobs", "create", "--set", "lora.rank"),
            "Invalid value for --set: must be PATH=VALUE, got 'lora.rank'",
        ),
        (("jobs", "create", "--set", "name=x"), "--set: name cannot be set: the name is given apart"),
        (
            ("jobs", "create", "--rank", "3000000000"),
            "--rank: lora.rank must be a whole number from -2147483648",
        ),
        (
            ("jobs", "create", "--batch-rows", "1", "--batch-tokens", "1"),
            "give one of --batch-tokens and --batch-rows",
        ),
        (("jobs", "create", "-f", "/no/such/file"), "does not exist"),
    ],
)
def test_what_is_missing_or_wrong_ends_with_2_before_anything_is_sent(
    services: Any, creating: Creating, run: Run, words: tuple[str, ...], problem: str
) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert problem in " ".join(result.stderr.split())
    assert not services.calls


def test_a_file_with_faults_is_refused_whole(
    services: Any, creating: Creating, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "job\x1b[31m.yaml"
    path.write_text("base_model: m\nrendering: r\nlora:\n  rank: sixteen\n  use_rslora: yes\n")
    result = run("jobs", "create", "-f", str(path))
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert lines[-2].endswith(
        ":4: lora.rank must be a whole number from -2147483648 to 2147483647, got sixteen"
    )
    assert lines[-1].endswith(":5: lora.use_rslora must be true or false, got yes")
    assert "\x1b" not in result.stderr
    assert not services.calls


def test_help_states_what_wins(run: Run) -> None:
    for group, command in (
        ("jobs", "create"),
        ("jobs", "plan"),
        ("renderings", "create"),
        ("evaluations", "create"),
        ("datasets", "create"),
    ):
        text = " ".join(run(group, command, "--help").stdout.split())
        assert "-f, --file" in text
        assert "Flags win over it." in text
        assert "Wins over file and flags" in text
