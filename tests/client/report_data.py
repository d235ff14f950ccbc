"""What a report shows: an evaluation of three arms, its answers, and the job that tuned one of them."""

from __future__ import annotations

import math
import random

from luthier.client.report import ReportData, TuningRun
from luthier.v1.chat_pb2 import ChatMessage
from luthier.v1.dataset_pb2 import SPLIT_TEST
from luthier.v1.evaluation_pb2 import (
    CORRECTNESS_RIGHT,
    CORRECTNESS_WRONG,
    SCORE_DIRECTION_HIGHER_IS_BETTER,
    SCORE_DIRECTION_LOWER_IS_BETTER,
    SCORE_KIND_BINARY,
    SCORE_KIND_FRACTION,
    SCORE_KIND_REAL,
    TEXT_FORM_NFC,
    VERDICT_BETTER,
    VERDICT_INCONCLUSIVE,
    ArmPrediction,
    ArmResult,
    Comparison,
    Evaluation,
    EvaluationArm,
    Prediction,
    ScoreDirection,
    ScoreEstimate,
    ScoreKind,
)
from luthier.v1.fine_tuning_job_pb2 import (
    DETERMINISM_BITWISE,
    LEARNING_RATE_SCHEDULE_COSINE,
    FineTuningJob,
    Hyperparameters,
    LoraConfig,
    MetricPoint,
    RunRecord,
)
from luthier.v1.model_pb2 import Model

PARENT = "projects/default"
BASE, TUNED = f"{PARENT}/models/smollm2-135m-instruct-q4", f"{PARENT}/models/earnings-1"
ARMS = (("base-0", BASE, 0, 0.0), ("base-3", BASE, 3, 0.25), ("tuned", TUNED, 0, 0.75))
HOSTILE = '<script>alert("1 & 2")</script>'


def _kind(score: str) -> ScoreKind.ValueType:
    kinds = {"perplexity": SCORE_KIND_REAL, "field_match.fields": SCORE_KIND_FRACTION}
    return kinds.get(score, SCORE_KIND_BINARY)


def _direction(score: str) -> ScoreDirection.ValueType:
    return SCORE_DIRECTION_LOWER_IS_BETTER if score == "perplexity" else SCORE_DIRECTION_HIGHER_IS_BETTER


def _arm_result(arm_id: str, record: float) -> ArmResult:
    def estimate(score: str, value: float, half: float) -> ScoreEstimate:
        return ScoreEstimate(
            score=score,
            value=value,
            lower=max(0.0, value - half),
            upper=min(1.0, value + half),
            count=48,
            kind=_kind(score),
            text_form=TEXT_FORM_NFC,
            whole_answer=score == "field_match.record",
        )

    fields = min(1.0, record + 0.2)
    scores = [estimate("field_match.record", record, 0.12), estimate("field_match.fields", fields, 0.05)]
    scores += [
        estimate(f"field_match.field.{name}", fields, 0.08) for name in ("company", "revenue", "currency")
    ]
    perplexity = ScoreEstimate(
        score="perplexity",
        value=9 - 7 * record,
        lower=8 - 7 * record,
        upper=10 - 7 * record,
        kind=_kind("perplexity"),
        direction=_direction("perplexity"),
    )
    return ArmResult(arm_id=arm_id, scores=[*scores, perplexity], duration_seconds=12.5, num_cut=2)


def comparison(candidate: str, baseline: str, difference: float, score: str) -> Comparison:
    return Comparison(
        candidate_arm_id=candidate,
        baseline_arm_id=baseline,
        score=score,
        difference=difference,
        lower=difference - 0.14,
        upper=difference + 0.14,
        p_value=0.00012,
        count=48,
        verdict=VERDICT_BETTER if difference > 0.14 else VERDICT_INCONCLUSIVE,
        kind=_kind(score),
        direction=_direction(score),
        whole_answer=score == "field_match.record",
    )


def prediction(row: int) -> Prediction:
    reference = '{"company": "Nordwind AG", "period": "Q3 2025", "revenue": 412.5, "currency": "EUR"}'
    question = f"Nordwind AG said revenue rose to EUR {412 + row}.5 million in the third quarter of 2025."
    texts = (
        "Nordwind AG is a company that " + "grew a lot " * 8,
        reference.replace("412.5", "398"),
        reference,
    )
    answers = [
        ArmPrediction(
            arm_id=arm,
            text=text,
            scores={"field_match.record": float(arm == "tuned")},
            correctness=CORRECTNESS_RIGHT if arm == "tuned" else CORRECTNESS_WRONG,
        )
        for (arm, *_), text in zip(ARMS, texts, strict=True)
    ]
    prompt = [
        ChatMessage(role="system", content="Answer with JSON."),
        ChatMessage(role="user", content=question if row else f"{question} {HOSTILE}"),
    ]
    return Prediction(row=row, prompt=prompt, reference=reference, answers=answers)


def _run() -> TuningRun:
    generator = random.Random(0)
    points = [
        MetricPoint(
            step=step, values={"train_loss": 0.4 + 2 * math.exp(-step / 9) + generator.uniform(-0.1, 0.1)}
        )
        for step in range(1, 42)
    ]
    for step in (1, 10, 20, 30, 41):
        points[step - 1].values["validation_loss"] = 0.5 + 1.9 * math.exp(-step / 9)
    job = FineTuningJob(
        name=f"{PARENT}/fineTuningJobs/earnings-1",
        base_model=BASE,
        rendering=f"{PARENT}/renderings/earnings",
        tuned_model=TUNED,
        lora=LoraConfig(rank=16, alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        hyperparameters=Hyperparameters(
            batch_tokens=4096,
            learning_rate=2e-4,
            learning_rate_schedule=LEARNING_RATE_SCHEDULE_COSINE,
            seed=7,
        ),
        num_attempts=1,
        run_record=RunRecord(
            code_version="0.1.0",
            device="x86-64 AVX-512-BF16",
            torch_version="2.13.0",
            num_threads=2,
            kernels={"linear_cross_entropy": "cpu"},
            base_model_digest="ab" * 32,
            determinism=DETERMINISM_BITWISE,
        ),
    )
    job.progress.completed = 41
    job.start_time.seconds, job.end_time.seconds = 1_000, 1_225
    return TuningRun(job=job, metrics=points)


def earnings() -> ReportData:
    """Return a report's data."""
    evaluation = Evaluation(
        name=f"{PARENT}/evaluations/earnings-1",
        display_name="Earnings: tuned against prompts",
        dataset_version=f"{PARENT}/datasets/earnings/versions/v1",
        dataset_digest="cd" * 32,
        split=SPLIT_TEST,
        num_records=48,
        arms=[EvaluationArm(arm_id=arm, model=model, num_shots=shots) for arm, model, shots, _ in ARMS],
        arm_results=[_arm_result(arm, record) for arm, _, _, record in ARMS],
        comparisons=[
            comparison(candidate, baseline, difference, score)
            for score in ("field_match.fields", "field_match.record")
            for candidate, baseline, difference in (
                ("base-3", "base-0", 0.1),
                ("tuned", "base-0", 0.75),
                ("tuned", "base-3", 0.5),
            )
        ],
    )
    evaluation.end_time.seconds = 1_763_900_000
    models = {
        BASE: Model(
            name=BASE, kind=Model.KIND_BASE, architecture="LlamaForCausalLM", num_parameters=134_515_008
        ),
        TUNED: Model(name=TUNED, kind=Model.KIND_ADAPTER, base_model=BASE, digest="ef" * 32),
    }
    predictions = [prediction(row) for row in range(6)]
    return ReportData(evaluation=evaluation, predictions=predictions, models=models, runs=[_run()])
