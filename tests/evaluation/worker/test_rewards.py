"""Answers that a reward model values: an adapter's head and a whole classifier, beside models asked directly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.evaluation.conftest import Site
from tests.evaluation.peer_servers import thing

from luthier.errors import InvalidArgument, NotFound, Reason, Unavailable
from luthier.evaluation import shares
from luthier.evaluation.worker.engine import EngineClient
from luthier.evaluation.worker.order import Valued
from luthier.lm.adapter_files import load_reward_adapter
from luthier.lm.load import load_model
from luthier.lm.lora import use_adapter
from luthier.lm.scoring import sequence_values
from luthier.v1.evaluation_pb2 import (
    EVALUATION_METRIC_EXACT_MATCH,
    EVALUATION_METRIC_REWARD_MODEL,
    FINISH_REASON_STOP,
    SCORE_DIRECTION_HIGHER_IS_BETTER,
    Evaluation,
)
from luthier.v1.model_pb2 import Model
from luthier.work.limited import Check

ARMS = [("zero", "base", 0), ("few", "base", 1), ("tuned", "tuned", 0)]
METRICS = [EVALUATION_METRIC_REWARD_MODEL, EVALUATION_METRIC_EXACT_MATCH]


async def run(site: Site, judge: str = "tuned-judge", **fields: Any) -> Evaluation:
    wanted = {
        "arms": ARMS,
        "metrics": METRICS,
        "max_new_tokens": 6,
        "reward_model": f"{site.PARENT}/models/{judge}",
        **fields,
    }
    async with site.worker():
        done = await site.ended((await site.evaluate(**wanted)).name)
    assert done.state == Evaluation.STATE_SUCCEEDED, done.error
    return done


async def test_answers_are_valued_behind_their_questions(
    judged: Site, judge_folder: Path, model_folders: dict[str, Path]
) -> None:
    done = await run(judged)
    assert done.primary_score == "reward"
    rows = await judged.predictions(done.name)
    model = load_model(model_folders["base"])
    _, head = load_reward_adapter(model, judge_folder, "judge")
    tokenizer = _tokenizer(model_folders["base"])
    for row in rows[:6]:
        for answer in row.answers:
            end = "<|im_end|>\n" if answer.finish_reason == FINISH_REASON_STOP else ""
            text = f"<|im_start|>user\n{row.prompt[0].content}<|im_end|>\n<|im_start|>assistant\n{answer.text}{end}"
            with use_adapter(model, "judge"):
                (value,) = sequence_values(model, head, [tokenizer.encode(text).ids])
            assert answer.scores["reward"] == pytest.approx(value, rel=1e-3, abs=1e-3)
    for result in done.arm_results:
        (found,) = (one for one in result.scores if one.score == "reward")
        mine = [
            answer.scores["reward"]
            for row in rows
            for answer in row.answers
            if answer.arm_id == result.arm_id
        ]
        assert found.value == pytest.approx(sum(mine) / len(mine))
        assert (found.count, found.direction) == (12, SCORE_DIRECTION_HIGHER_IS_BETTER)
    assert {one.name.rpartition("/")[2] for one in done.references} >= {"tuned-judge", "base"}
    turned = await run(judged, arms=ARMS[::-1], max_workers=2)
    again = {
        (row.row, one.arm_id): one.scores["reward"]
        for row in await judged.predictions(turned.name)
        for one in row.answers
    }
    assert again == {(row.row, one.arm_id): one.scores["reward"] for row in rows for one in row.answers}


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


async def test_a_reward_model_with_all_its_weights_values_too(
    judged: Site, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "classifier"
    shutil.copytree(model_folders["base"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {
        name: weight
        for name, weight in load_file(folder / "model.safetensors").items()
        if name != "lm_head.weight"
    }
    weights["score.weight"] = torch.ones((1, 32))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    judged.models.folders["classifier"] = folder
    judged.models.kinds["classifier"] = Model.KIND_REWARD
    done = await run(judged, "classifier", arms=ARMS[:1])
    values = {
        answer.scores["reward"] for row in await judged.predictions(done.name) for answer in row.answers
    }
    assert len(values) > 1


async def test_a_lost_attempt_has_nothing_valued_again(judged: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "ROWS_A_BATCH", 4)
    own, valued = EngineClient.values, list[int]()

    def values(engine: EngineClient, wanted: Valued, check: Check) -> list[float]:
        valued.append(len(wanted.sequences))
        if len(valued) == 4:
            raise Unavailable("its process is gone", reason=Reason.CRASHED)
        return own(engine, wanted, check)

    monkeypatch.setattr(EngineClient, "values", values)
    done = await run(judged)
    assert {one.count for arm in done.arm_results for one in arm.scores if one.score == "reward"} == {12}
    assert valued == [4] * 10, "each answer once, and again those that were lost"


async def test_an_answer_that_does_not_fit_has_no_reward_and_is_counted(judged: Site) -> None:
    judged.models.context_lengths["base"] = 64
    judged.data.records["TEST"][3] = thing(10**60)
    done = await run(judged, arms=ARMS[:1], max_new_tokens=2)
    (said,) = (one for one in done.warnings if "gives no value" in one)
    assert said.startswith(
        f"arm zero: {judged.PARENT}/models/tuned-judge gives no value to 1 of 12 answers, which count in its other "
        "scores alone; the first: an answer behind its question must have at most the 64 tokens that "
    )
    rewards = [row.answers[0].scores.get("reward") for row in await judged.predictions(done.name)]
    assert [place for place, one in enumerate(rewards) if one is None] == [3]


@pytest.mark.parametrize(
    ("fields", "kind", "reason", "message"),
    [
        (
            {"reward_model": f"{Site.PARENT}/models/base"},
            InvalidArgument,
            Reason.REWARD_MODEL_EXPECTED,
            "must be a reward model .* or a checkpoint of one, got '.*/base', of kind BASE",
        ),
        (
            {"reward_model": f"{Site.PARENT}/models/none"},
            NotFound,
            Reason.RESOURCE_NOT_FOUND,
            "none does not exist",
        ),
        ({}, InvalidArgument, Reason.FIELD_REQUIRED, "reward_model: must name a reward model for the metric"),
        (
            {"reward_model": f"{Site.PARENT}/models/tuned-judge", "metrics": METRICS[1:]},
            InvalidArgument,
            Reason.INVALID_FIELD,
            "must be empty without the metric REWARD_MODEL",
        ),
        (
            {"reward_model": "projects/other/models/judge"},
            InvalidArgument,
            Reason.CROSS_PROJECT_REFERENCE,
            "must be in projects/default",
        ),
    ],
)
async def test_what_cannot_value_is_refused(
    judged: Site, fields: dict[str, Any], kind: type[Exception], reason: Reason, message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        await judged.evaluate(arms=ARMS, **{"metrics": METRICS, **fields})
    assert caught.value.reason == reason  # type: ignore[attr-defined]
