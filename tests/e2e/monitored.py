"""A real Prometheus that scrapes a real Luthier at work: jobs that end well and badly, webhooks, a lost worker.

`python -m tests.e2e.monitored FOLDER` draws each dashboard from what it saw.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from deploy.asking import Prometheus
from deploy.grafana.dashboards import DASHBOARDS
from deploy.pictures import Line, Times, draw
from deploy.write import ROOT
from tests.e2e.conftest import (
    SERVICES,
    TUNING_WORKERS,
    Cluster,
    free_ports,
    job,
    prepare,
    write_examples,
)
from tests.e2e.test_kill import when_step
from tests.e2e.test_reinforcement import LETTERS, reinforced
from tests.work.webhooks.receiver import receiving

from luthier.client import Client, JobFailed
from luthier.v1.chat_pb2 import ChatMessage
from luthier.v1.dataset_pb2 import (
    INVALID_RECORD_POLICY_SKIP,
    SPLIT_TRAIN,
    SPLIT_VALIDATION,
    DatasetSource,
    DatasetVersion,
)
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm
from luthier.v1.grader_pb2 import Grader, RegexGrader
from luthier.v1.rendering_pb2 import RENDERING_KIND_PROMPT, Rendering

RATE_SECONDS = 15
PATIENCE_SECONDS = 900.0
STEP_SECONDS = 2
VARIABLES = {"$__rate_interval": f"{RATE_SECONDS}s", "$fine_tuning_job": ".*", "$grpc_service": ".*"}
HELLO = [ChatMessage(role="user", content="colour of thing 3?")]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What each panel of each dashboard shows of a run, by the dashboard's uid and the panel's title."""

    panels: dict[str, dict[str, list[Line]]]
    times: Times


class _Patient(Cluster):
    """Services beside much else."""

    serving_seconds = PATIENCE_SECONDS


def monitored(home: Path) -> Seen:
    """Let a cluster work for a minute or two, and ask Prometheus for every panel."""
    cluster = _Patient(home)
    with prometheus(cluster, home.parent / "prometheus") as asked:
        began = time.time()
        try:
            cluster.start(*SERVICES)
            cluster.start(*TUNING_WORKERS, "evaluation-worker")
            with cluster.client() as client, receiving(home.parent) as receiver:
                work(cluster, client, receiver.origin)
                time.sleep(RATE_SECONDS)  # what came last is seen, and its rate
                ended = time.time()  # and not how all of it is stopped
        finally:
            cluster.stop()
        panels = {
            board.uid: asked.panels(board, VARIABLES, began, ended, STEP_SECONDS) for board in DASHBOARDS
        }
    return Seen(panels=panels, times=Times(first=began, last=ended, step=STEP_SECONDS))


@contextmanager
def prometheus(cluster: Cluster, folder: Path) -> Iterator[Prometheus]:
    """Scrape a cluster's services every two seconds, with the rules of `deploy`."""
    folder.mkdir()
    (port,) = free_ports(1)
    targets = [{"targets": [cluster.metrics[name]], "labels": {"service": name}} for name in SERVICES]
    rules = ROOT / "deploy" / "prometheus"
    config = {
        "global": {"scrape_interval": "2s", "evaluation_interval": "2s"},
        "rule_files": [str(rules / "rules.yml"), str(rules / "alerts.yml")],
        "scrape_configs": [{"job_name": "luthier", "static_configs": targets}],
    }
    path = folder / "prometheus.yml"
    path.write_text(json.dumps(config))
    command = ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        try:
            process = subprocess.Popen(
                [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
            )
        except FileNotFoundError:
            pytest.fail("prometheus is missing: bash tests/debian.sh installs what the tests need of Debian")
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(30)


def work(cluster: Cluster, client: Client, told: str) -> None:
    """Prepare data, train well and badly, lose a worker, evaluate, generate, purge; `told` is who receives webhooks."""
    version = client.renderings.get(prepare(cluster, client)).dataset_version
    spoilt_version(cluster, client)
    rendering = validated_rendering(cluster, client)
    prompt_rows = Rendering(dataset_version=version, model="tiny", kind=RENDERING_KIND_PROMPT)
    prompts = client.renderings.wait(
        client.renderings.create(prompt_rows).name, timeout_seconds=PATIENCE_SECONDS
    ).name

    taught = job(rendering, 240, checkpoint_interval_steps=30, validation_interval_steps=20)
    taught.webhooks.add(url=f"{told}/ok")
    client.jobs.create(taught, job_id="taught")
    client.jobs.create(reinforced(prompts, LETTERS, 20, kl_weight=0.05), job_id="rewarded")
    anything = Grader(name="any", regex=RegexGrader(input="{{sample.output_text}}", pattern="(?s).*"))
    hopeless = reinforced(prompts, anything, 2)
    hopeless.webhooks.add(url=f"{told}/fail")
    client.jobs.create(hopeless, job_id="hopeless")
    when_step(client, "taught", 120, lambda: cluster.kill("training-worker"))
    cluster.start("training-worker")
    client.jobs.wait("taught", timeout_seconds=PATIENCE_SECONDS)

    arms = [
        EvaluationArm(arm_id="base", model="tiny"),
        EvaluationArm(arm_id="shots", model="tiny", num_shots=2),
    ]
    evaluation = client.evaluations.create(Evaluation(dataset_version=version, arms=arms, max_new_tokens=60))
    for _ in range(10):
        list(client.generate("tiny", HELLO, max_new_tokens=40, temperature=1.0))
        time.sleep(1.0)
    client.evaluations.wait(evaluation.name, timeout_seconds=PATIENCE_SECONDS)
    client.evaluations.delete(evaluation.name)
    client.evaluations.purge(evaluation.name)
    client.jobs.wait("rewarded", timeout_seconds=PATIENCE_SECONDS)
    with pytest.raises(JobFailed):
        client.jobs.wait("hopeless", timeout_seconds=PATIENCE_SECONDS)


def validated_rendering(cluster: Cluster, client: Client) -> str:
    """A rendering with rows to validate on; returns its name."""
    client.datasets.create("validated")
    sources = []
    for name, count, start, split in (("taught", 48, 200, SPLIT_TRAIN), ("asked", 9, 300, SPLIT_VALIDATION)):
        path = write_examples(cluster.home / f"{name}.jsonl", count, start=start)
        sources.append(DatasetSource(upload=client.datasets.upload(path).name, split=split))
    version = client.datasets.create_version("validated", sources)
    client.datasets.versions.wait(version.name, timeout_seconds=PATIENCE_SECONDS)
    rendering = client.renderings.create(Rendering(dataset_version=version.name, model="tiny"))
    return client.renderings.wait(rendering.name, timeout_seconds=PATIENCE_SECONDS).name


def spoilt_version(cluster: Cluster, client: Client) -> None:
    """A version with records that are left out."""
    path = cluster.home / "spoilt.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"})
    path.write_text(
        "\n".join([good, "{", json.dumps({"prompt": 1, "completion": "b"}), good.replace("a", "c")]) + "\n"
    )
    client.datasets.create("spoilt")
    source = DatasetSource(upload=client.datasets.upload(path).name, split=SPLIT_TRAIN)
    skipping = DatasetVersion(invalid_record_policy=INVALID_RECORD_POLICY_SKIP)
    version = client.datasets.create_version("spoilt", [source], settings=skipping)
    client.datasets.versions.wait(version.name, timeout_seconds=PATIENCE_SECONDS)


def draw_all(seen: Seen, folder: Path) -> None:
    """Draw each dashboard into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    note = (
        f"Drawn without Grafana from the answers of a Prometheus that scraped a run of {seen.times.span:.0f} s "
        f"with a tiny model, its rates over {RATE_SECONDS} s."
    )
    for board in DASHBOARDS:
        picture = draw(board, seen.panels[board.uid], seen.times, note)
        (folder / f"{board.uid}.svg").write_text(picture, encoding="utf-8")


def main() -> None:
    """Let a cluster work, and draw what was seen."""
    with tempfile.TemporaryDirectory() as folder:
        draw_all(monitored(Path(folder) / "home"), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
