"""The main job over real processes: upload, version, rendering, job, checkpoint, model, evaluation, generation."""

from __future__ import annotations

import contextlib
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.e2e.conftest import SERVICES, WAIT, Cluster, Shared, all_methods, job, public_methods

from luthier.client import Client
from luthier.errors import FailedPrecondition, Reason
from luthier.v1.chat_pb2 import ChatMessage
from luthier.v1.evaluation_pb2 import (
    EVALUATION_METRIC_FIELD_MATCH,
    EVALUATION_METRIC_PERPLEXITY,
    Evaluation,
    EvaluationArm,
)
from luthier.v1.model_alias_pb2 import Gate, ModelAlias, ScoreGate
from luthier.work.peers import bearer

pytestmark = pytest.mark.e2e


# peft 0.21 still calls what transformers 5 has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_the_main_job_runs_end_to_end(whole: Shared, tmp_path: Path) -> None:
    cluster, rendering = whole.cluster, whole.rendering
    with cluster.client() as client:
        wanted = job(rendering, 60, checkpoint_interval_steps=25)
        plan = client.jobs.plan(wanted)
        client.jobs.create(wanted, job_id="j1")
        events = list(client.jobs.watch("j1"))
        done = client.jobs.wait("j1", timeout_seconds=WAIT)

        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert done.progress.completed == plan.num_steps == 60
        assert [one.step for one in client.jobs.checkpoints("j1")] == [25, 50, 60]
        points = list(client.jobs.metrics("j1"))
        assert [point.step for point in points] == list(range(1, 61))
        assert points[-1].values["train_loss"] < points[0].values["train_loss"] * 0.9
        assert done.run_record.base_model_digest == client.models.get("tiny").digest

        check_evaluation(client, rendering, done.tuned_model)
        check_generation(client, done.tuned_model)
        check_download(client, done.tuned_model, tmp_path)
        check_metrics(cluster)
        check_no_torch(cluster)


def check_evaluation(client: Client, rendering: str, tuned: str) -> None:
    version = client.renderings.get(rendering).dataset_version
    evaluation = Evaluation(
        dataset_version=version,
        arms=[
            EvaluationArm(arm_id="zero", model="tiny"),
            EvaluationArm(arm_id="three", model="tiny", num_shots=3),
            EvaluationArm(arm_id="tuned", model=tuned),
        ],
        metrics=[EVALUATION_METRIC_FIELD_MATCH, EVALUATION_METRIC_PERPLEXITY],
        max_new_tokens=24,
    )
    created = client.evaluations.create(evaluation)
    done = client.evaluations.wait(created.name, timeout_seconds=WAIT)
    perplexity = {
        result.arm_id: score.value
        for result in done.arm_results
        for score in result.scores
        if score.score == "perplexity"
    }
    assert perplexity["tuned"] < perplexity["zero"] * 0.5
    predictions = list(client.evaluations.predictions(done.name))
    assert done.num_records == len(predictions) == 12
    assert [answer.arm_id for answer in predictions[0].answers] == ["zero", "three", "tuned"]
    pairs = {(one.candidate_arm_id, one.baseline_arm_id) for one in done.comparisons}
    assert pairs == {("three", "zero"), ("tuned", "zero"), ("tuned", "three")}
    assert (done.verdict.score, done.verdict.candidate_arm_id) == ("field_match.record", "tuned")
    assert done.verdict.sentence
    assert list(done.contamination.versions) == [version]
    assert done.contamination.num_training_records > 0
    assert not done.contamination.unknown_models
    check_alias(client, done, tuned, perplexity["tuned"])


def check_alias(client: Client, evaluation: Evaluation, tuned: str, perplexity: float) -> None:
    """A gate of a real evaluation, and a model that is held by another service while an alias stands for it."""
    for name, most in (("strict", perplexity / 2), ("live", perplexity * 2)):
        gate = Gate(score=ScoreGate(score="perplexity", most=most))
        client.aliases.create(ModelAlias(gates=[gate]), model_alias_id=name)
    with pytest.raises(FailedPrecondition) as caught:
        client.aliases.move("strict", tuned, evaluation=evaluation.name)
    assert caught.value.reason == Reason.ALIAS_BLOCKED
    client.aliases.move("live", tuned, evaluation=evaluation.name)
    with pytest.raises(FailedPrecondition) as caught:
        client.models.delete(tuned)
    assert caught.value.reason == Reason.RESOURCE_IN_USE
    turns = [ChatMessage(role="user", content="colour of thing 1?")]
    said = [
        "".join(piece.text for piece in client.generate(one, turns, max_new_tokens=8))
        for one in ("@live", tuned)
    ]
    assert said[0] == said[1]
    assert [move.model for move in client.aliases.moves("live")] == [tuned]


def check_generation(client: Client, tuned: str) -> None:
    for model in ("tiny", tuned):
        turns = [ChatMessage(role="user", content="colour of thing 1?")]
        pieces = list(client.generate(model, turns, max_new_tokens=8))
        assert pieces[-1].finish_reason
        assert 0 < pieces[-1].num_generated_tokens <= 8


def check_download(client: Client, tuned: str, folder: Path) -> None:
    """What was trained loads in PEFT as it is, and is not the base model."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, adapter = folder / "base", folder / "adapter"
    client.models.download("tiny", base)
    client.models.download(tuned, adapter)
    tokens = AutoTokenizer.from_pretrained(base)("colour of thing 1?", return_tensors="pt")["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        before = plain(tokens).logits
        after = PeftModel.from_pretrained(plain, adapter)(tokens).logits
    assert (after - before).abs().max() > 0.1


def check_metrics(cluster: Cluster) -> None:
    for name in SERVICES:
        with urllib.request.urlopen(f"http://{cluster.metrics[name]}/metrics") as response:
            text = response.read().decode()
        assert 'grpc_server_handled_total{grpc_code="OK"' in text
        assert "luthier_event_loop_lag_seconds" in text


def check_no_torch(cluster: Cluster) -> None:
    """Servicers and drivers never load torch, however deep an import may hide it, whatever is called or trained."""
    for name in SERVICES:
        with grpc.insecure_channel(cluster.addresses[name]) as channel:
            for method in all_methods(name):
                call_once(cluster, channel, method)
    for name in (*SERVICES, "data-worker", "training-worker", "evaluation-worker"):
        maps = Path(f"/proc/{cluster.pid(name)}/maps").read_text()
        assert "libtorch" not in maps, f"{name} loaded torch"


def call_once(cluster: Cluster, channel: grpc.Channel, method: str) -> None:
    """Call a method with an empty request and the key that may; what it answers does not matter here."""
    key = "worker-key" if ".worker." in method else "api-key"
    metadata = bearer((cluster.home / key).read_text().strip())
    stream: Any = channel.stream_stream(method)
    with contextlib.suppress(grpc.RpcError):
        next(stream(iter([b""]), metadata=metadata, timeout=5))


def test_no_service_answers_without_a_key(cluster: Cluster) -> None:
    """Every RPC of every service but health is refused, reflection included."""
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    for name in SERVICES:
        with grpc.insecure_channel(cluster.addresses[name]) as channel:
            codes = {method: refusal(channel, method) for method in public_methods(name)}
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.ServerReflectionInfo(iter([request]), timeout=5))
        assert set(codes.values()) == {grpc.StatusCode.UNAUTHENTICATED}, codes
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def refusal(channel: grpc.Channel, method: str) -> grpc.StatusCode:
    call: Any = channel.unary_unary(method)
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=5)
    code: grpc.StatusCode = caught.value.code()
    return code
