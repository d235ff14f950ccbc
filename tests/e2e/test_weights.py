"""Jobs in a row over real processes: all weights, then an adapter on them; checkpoints asked as models are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.e2e.conftest import WAIT, Shared, job
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.client import Client
from luthier.errors import FailedPrecondition
from luthier.v1.chat_pb2 import ChatMessage
from luthier.v1.evaluation_pb2 import EVALUATION_METRIC_PERPLEXITY, Evaluation, EvaluationArm
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FullConfig
from luthier.v1.model_pb2 import Model

pytestmark = pytest.mark.e2e
TURNS = [ChatMessage(role="user", content="colour of thing 1?")]


def perplexity(client: Client, version: str, *models: str) -> list[float]:
    """Evaluate models; those that a job tuned are known as such, whatever they stand on."""
    evaluation = Evaluation(
        dataset_version=version,
        arms=[EvaluationArm(arm_id=f"arm{at}", model=model) for at, model in enumerate(models)],
        metrics=[EVALUATION_METRIC_PERPLEXITY],
        max_new_tokens=2,
    )
    done = client.evaluations.wait(client.evaluations.create(evaluation).name, timeout_seconds=WAIT)
    assert {one.name for one in done.references} >= {client.models.get(model).name for model in models}
    return [score.value for arm in done.arm_results for score in arm.scores if score.score == "perplexity"]


def test_weights_are_used_wherever_a_base_is_and_checkpoints_wherever_a_model_is(
    whole: Shared, tmp_path: Path
) -> None:
    rendering = whole.rendering
    with whole.cluster.client() as client:
        version = client.renderings.get(rendering).dataset_version
        wanted = job(rendering, 20, checkpoint_interval_steps=10, tuned_model_id="weights")
        wanted.full.CopyFrom(FullConfig())
        client.jobs.create(wanted, job_id="full")
        done = client.jobs.wait("full", timeout_seconds=WAIT)
        model = client.models.get("weights")
        assert model.kind == Model.KIND_WEIGHTS
        assert model.tokenizer_digest == client.models.get("tiny").tokenizer_digest

        (base,) = perplexity(client, version, "tiny")
        halfway, whole_way = (
            perplexity(client, version, "full/step-10"),
            perplexity(client, version, "weights"),
        )
        assert base * 0.8 > halfway[0] > whole_way[0]
        together = perplexity(client, version, "weights", "tiny", "full/step-10")
        assert together == [*whole_way, base, *halfway], "whatever else is asked, on whatever base"

        for name in ("weights", "full/step-10"):
            pieces = list(client.generate(name, TURNS, max_new_tokens=4))
            assert 0 < pieces[-1].num_generated_tokens <= 4
        check_download(client, tmp_path)

        # An adapter on the tuned weights, and a second job that goes on with the first one's checkpoint.
        on_top = FineTuningJob(rendering=rendering, start_from="weights", tuned_model_id="on-top")
        on_top.hyperparameters.CopyFrom(job(rendering, 10).hyperparameters)
        client.jobs.create(on_top, job_id="adapter")
        assert client.jobs.wait("adapter", timeout_seconds=WAIT).base_model == model.name
        again = FineTuningJob(rendering=rendering, start_from="adapter/step-10")
        again.hyperparameters.CopyFrom(on_top.hyperparameters)
        client.jobs.create(again, job_id="again")
        last = client.jobs.wait("again", timeout_seconds=WAIT)
        before, middle, after = perplexity(client, version, "weights", "adapter/step-10", last.tuned_model)
        assert before > middle > after
        lineage = client.models.get(last.tuned_model)
        assert lineage.start_from == "projects/default/fineTuningJobs/adapter/checkpoints/step-10"
        assert lineage.base_model == done.tuned_model
        with pytest.raises(FailedPrecondition, match="models/weights is needed by"):
            client.models.delete("weights")


def check_download(client: Client, folder: Path) -> None:
    """What is downloaded is what transformers loads and asks by itself."""
    for name in ("weights", "full/step-10", "tiny"):
        client.models.download(name, folder / name.replace("/", "-"))
    tokens = AutoTokenizer.from_pretrained(folder / "weights")("colour of thing 1?", return_tensors="pt")
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder / name)(tokens["input_ids"]).logits
            for name in ("weights", "full-step-10", "tiny")
        ]
    assert (logits[0] - logits[1]).abs().max() > 0.01
    assert (logits[1] - logits[2]).abs().max() > 0.01
