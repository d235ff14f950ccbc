"""Models, jobs and evaluations in every state where they may rest."""

from __future__ import annotations

import io
import time
from typing import Any

from google.protobuf import proto
from tests.golden.making import FAILED, OTHER, PARENT, SUCCEEDED, Making, model_folder
from tests.golden.making_data import MODEL, MODELS, VERSION, register

from luthier.v1.evaluation_pb2 import FINISH_REASON_STOP, EvaluationArm
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.worker.v1 import task_pb2

_TRAINING, _EVALUATION = "luthier.v1.TrainingService", "luthier.v1.EvaluationService"
_LONG = {"maxSteps": "100000"}
_ACTIVE = ("STATE_QUEUED", "STATE_PREPARING", "STATE_RUNNING")
_REFUSING = "{% if '102' in messages[0].content %}{{ raise_exception('not this') }}{% endif %}{{ messages[0].content }}"
_METRICS = [f"EVALUATION_METRIC_{metric}" for metric in ("EXACT_MATCH", "FIELD_MATCH", "PERPLEXITY")]


def make_finished_work(making: Making) -> None:
    """Make what workers have ended: needs all services, the training worker and the evaluation worker."""
    (model_folder(making.cluster, "broken") / "config.json").write_text('{"model_type": "unheard-of"}')
    broken = register(making, PARENT, "broken", str(making.cluster.home / "models" / "broken"))
    making.wait(f"{MODELS}/GetModel", broken, FAILED)
    keep = {"maxCheckpoints": 2} if "max_checkpoints" in FineTuningJob.DESCRIPTOR.fields_by_name else {}
    hyperparameters = {"maxSteps": "8", "warmupSteps": "2", "weightDecay": 0.1, "seed": "3"}
    taught = {"displayName": "Süß – 甘い", "labels": {"team": "a"}, "validationIntervalSteps": "3", **keep}
    _job(making, f"{PARENT}/fineTuningJobs/taught", hyperparameters, tunedModelId="taught-model", **taught)
    _ended(making, f"{PARENT}/fineTuningJobs/taught", SUCCEEDED)
    own = {"rendering": f"{PARENT}/renderings/own-template", "labels": {"team": "b"}}
    _job(making, f"{PARENT}/fineTuningJobs/own-template", {"maxSteps": "4"}, **own)
    _ended(making, f"{PARENT}/fineTuningJobs/own-template", SUCCEEDED)
    _job(
        making,
        f"{PARENT}/fineTuningJobs/exploding",
        {"maxSteps": "300", "learningRate": 1000, "maxGradNorm": 0},
    )
    _ended(making, f"{PARENT}/fineTuningJobs/exploding", FAILED)
    foreign = {"rendering": f"{OTHER}/renderings/chat", "baseModel": f"{OTHER}/models/tiny"}
    _job(making, f"{OTHER}/fineTuningJobs/taught", {"maxSteps": "2"}, **foreign)
    _ended(making, f"{OTHER}/fineTuningJobs/taught", SUCCEEDED)
    stopped = _job(making, f"{PARENT}/fineTuningJobs/stopped", _LONG)
    _at_step(making, stopped, 5)
    making.call_once(f"{_TRAINING}/CancelFineTuningJob", {"name": stopped})
    making.wait(f"{_TRAINING}/GetFineTuningJob", stopped, "STATE_CANCELLED")
    _make_finished_evaluations(making)


def _make_finished_evaluations(making: Making) -> None:
    arms = [
        {"armId": "zero", "model": MODEL},
        {"armId": "three", "model": MODEL, "numShots": 3},
        {"armId": "tuned", "model": f"{PARENT}/models/taught-model"},
    ]
    if "chat_template" in EvaluationArm.DESCRIPTOR.fields_by_name:
        arms += [{"armId": "refusing", "model": MODEL, "chatTemplate": _REFUSING}]
        arms += [
            {"armId": "as-base", "model": f"{PARENT}/models/taught-model", "template": "ARM_TEMPLATE_BASE"}
        ]
    settings = {"metrics": _METRICS, "displayName": "Vergleich ①", "labels": {"team": "a"}, "seed": "5"}
    compared = _evaluation(making, "compared", arms, **settings)
    making.wait(f"{_EVALUATION}/GetEvaluation", compared, SUCCEEDED)
    unasked = _evaluation(making, "too-many-shots", [{"armId": "all", "model": MODEL, "numShots": 64}])
    making.wait(f"{_EVALUATION}/GetEvaluation", unasked, FAILED)


def make_resting_work(making: Making) -> None:
    """Make what no worker has ended. The training worker and the evaluation worker stop here."""
    making.cluster.drain("training-worker")
    making.cluster.drain("evaluation-worker")
    _make_resting_models(making)
    _make_left_jobs(making)
    _make_interrupted_jobs(making)
    _make_resting_evaluations(making)
    _job(making, f"{PARENT}/fineTuningJobs/queued", {"maxSteps": "3"}, labels={"team": "a"})
    register(making, PARENT, "queued", str(making.cluster.home / "models" / "tiny"))


def _make_resting_models(making: Making) -> None:
    hub = {"hub": {"repoId": "luthier/none", "revision": "v1"}}
    training = making.worker("training")
    request = {"parent": PARENT, "model": hub, "modelId": "nowhere"}
    name = making.call_once(f"{MODELS}/RegisterBaseModel", request)["name"]
    training.fail(training.claim(name), "there is no such repository")


def _make_left_jobs(making: Making) -> None:
    """Make jobs whose worker claimed them and died."""
    making.worker("training").claim(_job(making, f"{PARENT}/fineTuningJobs/lost", {"maxSteps": "3"}))
    training = making.worker("training")
    training.claim(f"{PARENT}/fineTuningJobs/lost")
    training.claim(register(making, PARENT, "registering", str(making.cluster.home / "models" / "tiny")))
    training.claim(_job(making, f"{PARENT}/fineTuningJobs/preparing", {"maxSteps": "3"}))
    training.claim(_job(making, f"{PARENT}/fineTuningJobs/cancelling", {"maxSteps": "3"}))
    making.call_once(f"{_TRAINING}/CancelFineTuningJob", {"name": f"{PARENT}/fineTuningJobs/cancelling"})
    unstarted = _job(making, f"{PARENT}/fineTuningJobs/cancelled", {"maxSteps": "3"})
    making.call_once(f"{_TRAINING}/CancelFineTuningJob", {"name": unstarted})


def _make_interrupted_jobs(making: Making) -> None:
    """Make jobs with checkpoints: one whose worker was killed, one that outlived that, one given back at a stop."""
    cluster = making.cluster
    cluster.worker_name = "killed"
    cluster.start("training-worker")
    running = _job(
        making, f"{PARENT}/fineTuningJobs/running", {"maxSteps": "60"}, checkpointIntervalSteps="10"
    )
    _at_step(making, running, 12)
    cluster.kill("training-worker")
    cluster.worker_name = ""
    cluster.start("training-worker")
    outlived = _job(
        making, f"{PARENT}/fineTuningJobs/outlived", {"maxSteps": "60"}, checkpointIntervalSteps="20"
    )
    _at_step(making, outlived, 22)
    cluster.kill("training-worker")
    cluster.start("training-worker")
    _ended(making, outlived, SUCCEEDED)
    given_back = _job(
        making, f"{PARENT}/fineTuningJobs/given-back", {"maxSteps": "80"}, checkpointIntervalSteps="10"
    )
    _at_step(making, given_back, 12)
    cluster.drain("training-worker")
    making.wait(f"{_TRAINING}/GetFineTuningJob", given_back, "STATE_QUEUED")


def _make_resting_evaluations(making: Making) -> None:
    arms = [{"armId": "zero", "model": MODEL}, {"armId": "tuned", "model": f"{PARENT}/models/taught-model"}]
    worker = making.worker("evaluation")
    worker.claim(_evaluation(making, "lost", arms))
    worker = making.worker("evaluation")
    task = worker.claim(f"{PARENT}/evaluations/lost")
    if hasattr(task_pb2, "AnsweredBatch"):
        worker.commit(task, 6, "answers", _answers())
    worker.claim(_evaluation(making, "cancelling", arms))
    making.call_once(f"{_EVALUATION}/CancelEvaluation", {"name": f"{PARENT}/evaluations/cancelling"})
    cancelled = _evaluation(making, "cancelled", arms)
    making.call_once(f"{_EVALUATION}/CancelEvaluation", {"name": cancelled})
    worker.fail(worker.claim(_evaluation(making, "broken", arms)), "the disk is broken")
    _evaluation(making, "queued", arms, labels={"team": "a"})


def _answers() -> bytes:
    """Return what the first arm may have answered to all six records, as workers keep it."""
    records = [
        task_pb2.AnsweredRecord(row=row, text="red", finish_reason=FINISH_REASON_STOP, num_generated_tokens=2)
        for row in range(6)
    ]
    file = io.BytesIO()
    proto.serialize_length_prefixed(task_pb2.AnsweredBatch(arm_id="zero", records=records), file)
    return file.getvalue()


def _at_step(making: Making, name: str, step: int) -> None:
    deadline = time.monotonic() + 600
    get = f"{_TRAINING}/GetFineTuningJob"
    while int((making.wait(get, name, *_ACTIVE)["progress"] or {}).get("completed", 0)) < step:
        assert time.monotonic() < deadline, f"{name} did not come to step {step}"
        time.sleep(0.005)


def _job(making: Making, name: str, hyperparameters: Any, **settings: Any) -> str:
    parent, _, last = name.rpartition("/fineTuningJobs/")
    wanted = {
        "baseModel": MODEL,
        "rendering": f"{PARENT}/renderings/chat",
        "lora": {"rank": 1},
        "hyperparameters": {"numEpochs": 1000, "batchRows": 4, "learningRate": 0.01, **hyperparameters},
        "checkpointIntervalSteps": "3",
        **settings,
    }
    request = {"parent": parent, "fineTuningJobId": last, "fineTuningJob": wanted}
    making.call_once(f"{_TRAINING}/CreateFineTuningJob", request)
    return name


def _ended(making: Making, name: str, state: str) -> None:
    making.wait(f"{_TRAINING}/GetFineTuningJob", name, state)


def _evaluation(making: Making, last: str, arms: list[Any], **settings: Any) -> str:
    wanted = {"datasetVersion": VERSION, "arms": arms, "maxNewTokens": 8, **settings}
    request = {"parent": PARENT, "evaluationId": last, "evaluation": wanted}
    making.call_once(f"{_EVALUATION}/CreateEvaluation", request)
    return f"{PARENT}/evaluations/{last}"
