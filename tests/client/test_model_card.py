"""The card that a download carries: what it tells, and what it does where a service knows nothing any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.client.conftest import UID
from tests.client.test_transfers import FILES, ModelStore

from luthier.client import AsyncClient, Client
from luthier.client.model_card import Found, written
from luthier.v1.base_precision_pb2 import BASE_PRECISION_NF4
from luthier.v1.dataset_pb2 import SPLIT_TRAIN
from luthier.v1.evaluation_pb2 import (
    SCORE_KIND_BINARY,
    ArmResult,
    Evaluation,
    EvaluationArm,
    ScoreEstimate,
)
from luthier.v1.evaluation_service_pb2 import ListEvaluationsResponse
from luthier.v1.fine_tuning_job_pb2 import (
    FineTuningJob,
    HeldOutRow,
    HeldOutScores,
    Hyperparameters,
    LoraConfig,
    RunRecord,
)
from luthier.v1.model_pb2 import EXPORT_FORMAT_GGUF_Q8_0, Model, Taught, WeightsCheck
from luthier.v1.reference_pb2 import Reference
from luthier.v1.rendering_pb2 import LengthStatistics, Rendering, RenderingSplitStatistics
from luthier.v1.verdict_pb2 import EvaluationVerdict

PARENT = "projects/default"
MODEL, ADAPTER, JOB = (f"{PARENT}/{part}" for part in ("models/merged", "models/tuned", "fineTuningJobs/j"))
RENDERING = f"{PARENT}/renderings/r"


def merged() -> Model:
    return Model(
        name=MODEL,
        uid=UID,
        kind=Model.KIND_WEIGHTS,
        digest="d" * 64,
        start_from=ADAPTER,
        fine_tuning_job=JOB,
        step=7,
        architecture="LlamaForCausalLM",
        taught=Taught(chat_template="{{ messages }}"),
        references=[
            Reference(name=ADAPTER, uid="u-adapter", digest="a" * 64),
            Reference(name=JOB, uid="u-job"),
        ],
        check=WeightsCheck(
            num_positions=99,
            difference=0.0123,
            bound=0.05,
            effect=0.4,
            num_greedy_tokens=64,
            num_equal_greedy_tokens=63,
            held_out_logprobs=[-1.0, -2.0],
            held_out_difference=0.03,
        ),
        warnings=["a | b\nc"],
    )


def job() -> FineTuningJob:
    row = HeldOutRow(
        token_ids=[1, 2, 3], positions=[1, 2], trainer_logprobs=[-1.0, -2.1], sampler_logprobs=[-1.1, -2.0]
    )
    return FineTuningJob(
        name=JOB,
        uid="u-job",
        references=[Reference(name=RENDERING, uid="u-rendering")],
        rendering=RENDERING,
        lora=LoraConfig(rank=8),
        hyperparameters=Hyperparameters(learning_rate=2e-4, seed=3),
        latest_metrics={"train_loss": 0.5, "tokens_per_second": 9.0},
        run_record=RunRecord(
            code_version="0.1", held_out=HeldOutScores(step=7, rows=[row], mean_difference=0.1)
        ),
    )


def rendering() -> Rendering:
    train = RenderingSplitStatistics(
        split=SPLIT_TRAIN,
        num_records=1200,
        tokens=LengthStatistics(count=1200, sum=345678),
        supervised_tokens=LengthStatistics(sum=45678),
    )
    return Rendering(
        name=RENDERING,
        uid="u-rendering",
        dataset_version=f"{PARENT}/datasets/d/versions/v",
        split_statistics=[train],
    )


def evaluation(name: str, model: str, uid: str) -> Evaluation:
    score = ScoreEstimate(
        score="exact_match", value=0.5, lower=0.4, upper=0.6, count=44, kind=SCORE_KIND_BINARY
    )
    return Evaluation(
        name=f"{PARENT}/evaluations/{name}",
        arms=[
            EvaluationArm(arm_id="tuned", model=model),
            EvaluationArm(arm_id="base", model=f"{PARENT}/models/b"),
        ],
        arm_results=[ArmResult(arm_id="tuned", scores=[score]), ArmResult(arm_id="base")],
        references=[Reference(name=model, uid=uid)],
    )


def answer(services: Any, model: Model) -> None:
    listed = [
        evaluation("of-the-adapter", ADAPTER, "u-adapter"),
        evaluation("of-another", f"{PARENT}/models/x", "u-x"),
        evaluation("of-a-former-one", ADAPTER, "u-former"),
    ]
    services.answers.update(
        GetModel=lambda request, context: model,
        GetFineTuningJob=lambda request, context: job(),
        GetRendering=lambda request, context: rendering(),
        ListEvaluations=lambda request, context: ListEvaluationsResponse(evaluations=listed),
    )


async def test_a_download_has_a_card_of_what_the_services_know(
    services: Any, client: Client, async_client: AsyncClient, tmp_path: Path
) -> None:
    ModelStore(services)
    answer(services, merged())
    client.models.download("merged", tmp_path / "sync")
    await async_client.models.download("merged", tmp_path / "async")
    card = (tmp_path / "sync" / "README.md").read_text()
    assert card == (tmp_path / "async" / "README.md").read_text()
    for line in (
        "# merged",
        "All weights of a model in transformers' layout of architecture LlamaForCausalLM taught chats",
        "**a \\| b c**",
        f"| this model, `merged`, step 7 | {UID} | {'d' * 64} |",
        f"| model `tuned` | u-adapter | {'a' * 64} |",
        "| fineTuningJob `j` | u-job |  |",
        "| `r` of `d/v` | train | 1,200 | 345,678 | 45,678 |",
        "| method | supervised |",
        "| adaptation | lora, rank 8 |",
        "| train_loss | 0.5 |",
        "At 99 positions its logits differ from those of `tuned` by 0.012 of their spread (at most 0.05 is allowed).",
        "What was learnt moves them by 0.4. Of 64 tokens of greedy answers 63 are the same.",
        "| training, step 7 | -1.5500 |  |",
        "| generation, step 7 | -1.5500 | 0.1 |",
        "| this model | -1.5000 | 0.03 |",
        "| `of-the-adapter` | tuned (`tuned`) | exact_match | 50.0 % [40.0, 60.0] | 44 |",
    ):
        assert line in card, card
    assert "of-another" not in card
    assert "of-a-former-one" not in card, "its model had the name before"
    assert "tokens_per_second" not in card
    assert {path.name for path in (tmp_path / "sync").iterdir()} == {
        "README.md",
        *(name.split("/")[0] for name in FILES),
    }
    # What is there already stays as it is, card included.
    (tmp_path / "sync" / "README.md").write_text("mine")
    client.models.download("merged", tmp_path / "sync")
    assert (tmp_path / "sync" / "README.md").read_text() == "mine"


def test_what_is_gone_or_away_is_named_in_the_card_and_the_download_goes_on(
    services: Any, client: Client, tmp_path: Path
) -> None:
    ModelStore(services)
    services.answers["GetModel"] = lambda request, context: merged()
    del services.answers["GetFineTuningJob"]
    client.models.download("merged", tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    assert (
        f"could not be asked when this was written: {JOB}: the test does not answer GetFineTuningJob" in card
    )
    assert (
        "could not be asked when this was written: evaluations: the test does not answer ListEvaluations"
        in card
    )
    assert "## Data" not in card


@pytest.mark.parametrize("replaced", ["GetFineTuningJob", "GetRendering"])
def test_what_took_over_a_name_is_not_told_of_as_what_the_model_was_made_from(
    services: Any, client: Client, tmp_path: Path, replaced: str
) -> None:
    ModelStore(services)
    answer(services, merged())
    former = services.answers[replaced]

    def another(request: Any, context: Any) -> Any:
        found = former(request, context)
        found.uid = "u-another"
        return found

    services.answers[replaced] = another
    client.models.download("merged", tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    name = JOB if replaced == "GetFineTuningJob" else RENDERING
    assert f"could not be asked when this was written: {name}: the name means another one by now" in card
    assert "## Data" not in card
    assert ("## Training" in card) == (replaced == "GetRendering")


def test_a_card_says_how_it_was_adapted_what_evaluations_decided_and_what_was_forgotten() -> None:
    made, tuned = merged(), job()
    made.check.base_precision, made.check.base_difference = BASE_PRECISION_NF4, 0.123
    tuned.base_precision = BASE_PRECISION_NF4
    tuned.lora.MergeFrom(LoraConfig(alpha=16, use_dora=True, use_rslora=True, lora_plus_ratio=8))
    asked = evaluation("of-the-adapter", ADAPTER, "u-adapter")
    asked.num_records, asked.arm_results[0].num_errors = 48, 4
    asked.verdict.outcome = EvaluationVerdict.OUTCOME_REGRESSED
    asked.verdict.sentence = "Regressed: tuned retains 71 %."
    asked.contamination.num_exact, asked.contamination.num_ngram = 2, 1
    asked.contamination.unknown_models.append(f"{PARENT}/models/older")
    retained = ScoreEstimate(value=0.71, lower=0.6, upper=0.8, count=158, kind=SCORE_KIND_BINARY)
    drift = asked.drift_results.add(arm_id="tuned", baseline_arm_id="base", retained=retained)
    drift.skills.add(skill="facts", num_asked=160, num_known=158, num_kept=112)
    card = written(Found(model=made, job=tuned, renderings=[], evaluations=[asked]))
    for line in (
        "| adaptation | rsdora, rank 8 |",
        "| alpha | 16 |",
        "| LoRA+ ratio | 8 |",
        "| base held in | NF4 |",
        "It is made on the numbers that its base has in NF4, beside which it was trained; they move the base's",
        "| `of-the-adapter` | regressed | Regressed: tuned retains 71 %. | 3 of 48; not known of older |",
        "| `of-the-adapter` | tuned (`tuned`) | exact_match | 50.0 % [40.0, 60.0] | 44, 4 more not answered |",
        "| `of-the-adapter` | tuned (`tuned`), from base | 71.0 %",
    ):
        assert line in card, card
    assert card.index("## Verdicts") < card.index("## Scores") < card.index("## What was forgotten")


def test_a_base_model_has_its_publishers_card_alone(services: Any, client: Client, tmp_path: Path) -> None:
    ModelStore(services)
    services.answers["GetModel"] = lambda request, context: Model(
        name=request.name, uid=UID, kind=Model.KIND_BASE
    )
    client.models.download("base", tmp_path / "base")
    assert not (tmp_path / "base" / "README.md").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            Model(name=MODEL, kind=Model.KIND_ADAPTER, base_model=f"{PARENT}/models/b"),
            "A LoRA adapter in PEFT's layout on `b`.",
        ),
        (
            Model(
                name=MODEL,
                kind=Model.KIND_ADAPTER,
                base_model=f"{PARENT}/models/b",
                base_precision=BASE_PRECISION_NF4,
            ),
            "on `b` that was held in NF4 while it was trained: beside other numbers it was never measured.",
        ),
        (
            Model(name=MODEL, kind=Model.KIND_EXPORT, export_format=EXPORT_FORMAT_GGUF_Q8_0),
            "A file for other programs (GGUF_Q8_0).",
        ),
        (
            Model(name=MODEL, display_name="Mine \x1b[31m", kind=Model.KIND_REWARD),
            "# Mine \\x1b[31m\n\nA reward model: it values answers.",
        ),
    ],
)
def test_a_card_says_what_a_model_is(model: Model, words: str) -> None:
    card = written(Found(model=model, job=None, renderings=[], evaluations=[]))
    assert words in card
    assert "## Scores" not in card
