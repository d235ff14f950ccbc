"""What tuned arms retain: all of it where nothing was touched, clearly less behind noise; whoever measures it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.evaluation.conftest import Site
from tests.evaluation.tiny_models import write_base, write_null_adapter
from tests.evaluation.worker.test_resume import counted, until_answered
from tests.evaluation.worker.undisturbed import rows_of, undisturbed
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from luthier.errors import FailedPrecondition, InvalidArgument, LuthierError, NotFound
from luthier.evaluation import shares
from luthier.evaluation.worker.drift_suite import suite_questions
from luthier.evaluation.worker.questions import Question, choose
from luthier.grading.suite import general_texts
from luthier.text.records import ChatRecord
from luthier.v1.dataset_pb2 import SPLIT_VALIDATION
from luthier.v1.evaluation_pb2 import (
    EVALUATION_METRIC_EXACT_MATCH,
    EVALUATION_METRIC_FIELD_MATCH,
    EVALUATION_METRIC_PERPLEXITY,
    DriftProbe,
    DriftResult,
    Evaluation,
    EvaluationArm,
)
from luthier.v1.evaluation_service_pb2 import CreateEvaluationRequest
from luthier.v1.verdict_pb2 import DriftGuard, EvaluationVerdict, Guard

NUM_QUESTIONS = 16
ARMS = [("noisy", "noisy", 0), ("null", "tuned-null", 0), ("base", "knowing", 0), ("same", "untouched", 0)]
"""What is held against is neither first nor alone on its base model."""
PROBE = DriftProbe(max_questions=NUM_QUESTIONS, max_new_tokens=24)
STEPS = 220
ROWS = 8


def text_of(question: Question) -> str:
    record = question.record
    assert isinstance(record, ChatRecord)
    turns = [f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in record.messages]
    return "".join(turns)


def teach(folder: Path, texts: list[str]) -> None:
    """Have a model say some texts by heart."""
    made: Any = PreTrainedTokenizerFast
    tokenizer = made(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<|endoftext|>")
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    save_file(
        {
            name: weight.to(torch.bfloat16)
            for name, weight in model.state_dict().items()
            if name != "lm_head.weight"
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.fixture(scope="session")
def knowing_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that answers questions of the suite, one with its weights, one with noise added to them, and more."""
    root = tmp_path_factory.mktemp("knowing")
    folders = {name: root / name for name in ("knowing", "untouched", "noisy", "alien", "tuned-null")}
    write_base(folders["knowing"], 4, hidden_size=64)
    teach(folders["knowing"], [text_of(one) for one in choose(suite_questions(), NUM_QUESTIONS, 0)])
    for name in ("untouched", "noisy", "alien"):
        shutil.copytree(folders["knowing"], folders[name])
        (folders[name] / "note.txt").write_text(name)
    weights = load_file(folders["noisy"] / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for weight in weights.values():
        if weight.dim() > 1:
            noise = torch.empty(weight.shape).normal_(
                std=0.5 * float(weight.float().std()), generator=generator
            )
            weight.add_(noise.to(weight.dtype))
    save_file(weights, folders["noisy"] / "model.safetensors", metadata={"format": "pt"})
    other = folders["alien"] / "tokenizer.json"
    other.write_text(other.read_text() + "\n")
    write_null_adapter(folders["knowing"], folders["tuned-null"])
    return folders


@pytest.fixture
def probed(site: Site, knowing_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(shares, "ROWS_A_BATCH", ROWS)
    site.models.folders = {**site.models.folders, **knowing_folders}
    site.models.bases["tuned-null"] = "knowing"
    site.models.jobs |= dict.fromkeys(
        ("untouched", "noisy", "alien", "tuned-null"), f"{site.PARENT}/fineTuningJobs/gone"
    )
    return site


WANTED: dict[str, Any] = {"arms": ARMS, "drift": PROBE, "max_new_tokens": 4, "max_records": 4}


async def run(site: Site, **fields: Any) -> Evaluation:
    wanted = {**WANTED, **fields}
    async with site.worker():
        done = await site.ended((await site.evaluate(**wanted)).name)
    assert done.state == Evaluation.STATE_SUCCEEDED, done.error
    return done


def by_arm(done: Evaluation) -> dict[str, DriftResult]:
    return {one.arm_id: one for one in done.drift_results}


async def test_what_nobody_touched_retains_everything_and_noise_forgets(probed: Site) -> None:
    done = (await undisturbed(probed, **WANTED)).done
    assert done.drift.baseline_arm_id == "base", "the first that nobody tuned"
    found = by_arm(done)
    assert list(found) == ["noisy", "null", "same"]
    noisy = found["noisy"]
    for arm_id in ("same", "null"):
        retained = found[arm_id].retained
        assert retained.count >= 12, "the model knows most of what it was taught"
        assert (retained.value, retained.upper) == (1.0, 1.0)
        assert 0.7 < retained.lower < 1
        assert abs(found[arm_id].divergence.value) < 1e-6
        assert abs(found[arm_id].greedy_divergence.value) < 1e-6
        assert abs(found[arm_id].exact_divergence.value) < 1e-6
        assert abs(found[arm_id].text_loss.value) < 1e-6
        assert found[arm_id].baseline_text_bits == noisy.baseline_text_bits > 0
        assert not any(one.num_gained for one in found[arm_id].skills)
    assert noisy.retained.upper < found["same"].retained.lower, "clearly less"
    assert noisy.divergence.lower > 0.1
    assert noisy.greedy_divergence.lower > 0.1
    assert noisy.exact_divergence.lower > 0.1
    drawn = noisy.divergence
    assert drawn.lower < noisy.exact_divergence.value < drawn.upper, "one estimates the other"
    assert NUM_QUESTIONS < noisy.num_compared_tokens <= min(256, noisy.num_drawn_tokens)
    assert noisy.exact_divergence.count == noisy.divergence.count, "some tokens of each answer"
    assert all(found[arm_id].exact_divergence.lower >= 0 for arm_id in found)
    assert noisy.text_loss.count == len(general_texts()) == 12
    assert noisy.text_loss.lower != noisy.text_loss.upper
    assert noisy.num_drawn_tokens > NUM_QUESTIONS
    assert sum(one.num_asked for one in noisy.skills) == NUM_QUESTIONS
    assert sum(one.num_known for one in noisy.skills) == noisy.retained.count == found["same"].retained.count
    assert sum(one.num_kept for one in noisy.skills) == round(noisy.retained.value * noisy.retained.count)


async def test_what_an_arm_is_told_besides_is_no_drift(probed: Site) -> None:
    arms = [EvaluationArm(arm_id=one, model=f"{probed.PARENT}/models/{model}") for one, model, _ in ARMS[1:3]]
    arms[0].system_prompt = "say nothing but the number five"
    request = CreateEvaluationRequest(parent=probed.PARENT)
    request.evaluation.CopyFrom(
        Evaluation(dataset_version=probed.VERSION, arms=arms, drift=PROBE, max_new_tokens=4, max_records=2)
    )
    async with probed.worker():
        done = await probed.ended((await probed.call("CreateEvaluation", request)).name)
    assert done.state == Evaluation.STATE_SUCCEEDED, done.error
    found = by_arm(done)["null"]
    assert (found.retained.value, found.retained.upper) == (1.0, 1.0)
    assert abs(found.divergence.value) < 1e-6


async def test_it_is_the_same_whatever_the_order_and_whoever_answers(probed: Site) -> None:
    alone = await undisturbed(probed, **WANTED)
    done = alone.done
    turned = await run(probed, arms=ARMS[::-1], drift=DriftProbe(baseline_arm_id="base", **CHOSEN))
    assert by_arm(turned) == by_arm(done)
    assert list(by_arm(turned)) == ["same", "null", "noisy"]
    dealt = await run(probed, max_workers=3)
    assert list(dealt.drift_results) == list(done.drift_results)
    assert [result.scores for result in dealt.arm_results] == [result.scores for result in done.arm_results]
    assert alone.rows == await rows_of(probed, dealt.name), (
        "the suite's questions are none of the evaluation's records"
    )


CHOSEN: dict[str, Any] = {"max_questions": NUM_QUESTIONS, "max_new_tokens": 24}


async def test_a_worker_that_stops_leaves_what_it_asked_to_the_next(
    probed: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = (await undisturbed(probed, **WANTED)).done
    with counted(monkeypatch) as first:
        async with probed.worker():
            made = await probed.evaluate(**WANTED)
            await until_answered(probed, made.name, 50)
    with counted(monkeypatch) as second:
        async with probed.worker():
            done = await probed.ended(made.name)
    assert list(done.drift_results) == list(alone.drift_results)
    every = 4 * len(ARMS) + NUM_QUESTIONS * (len(ARMS) + 1)
    assert every <= len(first) + len(second) <= every + ROWS, (
        "at most the batch that was cut off is asked again"
    )


async def test_other_tokens_have_no_divergence_and_are_graded_all_the_same(probed: Site) -> None:
    done = await run(probed, arms=[("base", "knowing", 0), ("alien", "alien", 0)])
    (result,) = done.drift_results
    assert (result.retained.value, result.HasField("divergence")) == (1.0, False)
    assert result.num_drawn_tokens == result.num_compared_tokens == 0
    assert not result.HasField("exact_divergence")
    assert result.text_loss.value == 0, "bits a byte can be held against each other whatever the tokens"


@pytest.mark.parametrize(
    ("candidate", "least", "outcome", "words"),
    [
        (
            "noisy",
            0.8,
            EvaluationVerdict.OUTCOME_REGRESSED,
            "noisy retains less than 80.0 % of what base can do: ",
        ),
        (
            "same",
            0.7,
            EvaluationVerdict.OUTCOME_INCONCLUSIVE,
            "same retains at least 70.0 % of what base can do: ",
        ),
        (
            "same",
            0.99,
            EvaluationVerdict.OUTCOME_INCONCLUSIVE,
            "same may retain less than 99.0 % of what base can do",
        ),
    ],
)
async def test_what_was_forgotten_beyond_the_limit_decides(
    probed: Site, candidate: str, least: float, outcome: EvaluationVerdict.Outcome.ValueType, words: str
) -> None:
    guards = [Guard(drift=DriftGuard(min_retained=least))]
    done = await run(probed, guards=guards, candidate_arm_id=candidate)
    assert done.verdict.outcome == outcome
    assert done.verdict.guards[0].sentence.startswith(words)
    if outcome == EvaluationVerdict.OUTCOME_REGRESSED:
        assert done.verdict.sentence.startswith(f"Regressed: {words}")
    elif least == 0.7:
        found = by_arm(done)["same"].retained
        assert f"; same retains 100.0 % [{100 * found.lower:.1f} %, 100.0 %] of what base can do (" in (
            done.verdict.sentence
        )


async def test_nothing_is_asked_where_nobody_wants_it(probed: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch) as asked:
        async with probed.worker():
            made = await probed.evaluate(arms=ARMS, max_new_tokens=4, max_records=4)
            done = await probed.ended(made.name)
    assert not done.drift_results
    assert len(asked) == 4 * len(ARMS)


async def test_records_of_a_version_are_asked_in_place_of_the_suite(probed: Site) -> None:
    """Of the evaluation's own version here, of whatever version elsewhere."""
    known = choose(suite_questions(), NUM_QUESTIONS, 0)
    probed.data.records["VALIDATION"] = [one.record for one in known]
    probe = DriftProbe(dataset_version=probed.VERSION, split=SPLIT_VALIDATION, max_new_tokens=24)
    done = await run(probed, drift=probe)
    assert done.drift.dataset_digest == probed.data.digest
    assert (done.drift.max_questions, done.drift.metric) == (1000, EVALUATION_METRIC_EXACT_MATCH)
    found = by_arm(done)
    assert [(one.skill, one.num_asked) for one in found["same"].skills] == [("questions", NUM_QUESTIONS)]
    assert found["same"].retained.value == 1.0
    assert found["same"].retained.count >= 12
    assert found["noisy"].retained.upper < found["same"].retained.lower
    assert found["noisy"].exact_divergence.lower > 0.1
    few = await run(probed, drift=DriftProbe(**{"max_questions": 4, **_probe(probe)}))
    assert by_arm(few)["same"].skills[0].num_asked == 4


def _probe(probe: DriftProbe) -> dict[str, Any]:
    return {field.name: value for field, value in probe.ListFields()}


async def test_a_reference_that_does_not_suit_the_metric_is_named(probed: Site) -> None:
    probed.data.records["VALIDATION"] = [one.record for one in choose(suite_questions(), 3, 0)]
    probe = DriftProbe(
        dataset_version=probed.VERSION, split=SPLIT_VALIDATION, metric=EVALUATION_METRIC_FIELD_MATCH
    )
    wanted = {"arms": ARMS, "drift": probe, "max_new_tokens": 4, "max_records": 4}
    async with probed.worker():
        done = await probed.ended((await probed.evaluate(**wanted)).name)
    assert done.error.message.startswith(
        f"drift: validation.jsonl:1 of {probed.VERSION}: the reference must be a JSON object"
    )


@pytest.mark.parametrize(
    ("probe", "kind", "message"),
    [
        ({"split": SPLIT_VALIDATION}, InvalidArgument, "drift.split: must be unset without dataset_version"),
        (
            {"metric": EVALUATION_METRIC_EXACT_MATCH},
            InvalidArgument,
            "drift.metric: must be unset without dataset_version",
        ),
        (
            {"dataset_version": Site.VERSION, "metric": EVALUATION_METRIC_PERPLEXITY},
            InvalidArgument,
            "drift.metric: must say whether a whole answer is right, as .* do, got EVALUATION_METRIC_PERPLEXITY",
        ),
        (
            {"dataset_version": Site.VERSION, "split": SPLIT_VALIDATION},
            FailedPrecondition,
            "drift: .* has no record in the VALIDATION split",
        ),
        (
            {"dataset_version": "projects/other/datasets/a/versions/b"},
            InvalidArgument,
            "drift.dataset_version: must be in projects/default",
        ),
        ({"dataset_version": f"{Site.VERSION}2"}, NotFound, "does not exist"),
    ],
)
async def test_a_suite_that_cannot_be_is_refused(
    probed: Site, probe: dict[str, Any], kind: type[LuthierError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        await probed.evaluate(arms=ARMS, drift=DriftProbe(**probe))
