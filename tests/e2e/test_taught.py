"""What is asked is what was taught, over real processes: a template of one's own on a base that has none."""

from __future__ import annotations

import json
import sqlite3
import tempfile
import threading
import time
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tests.e2e.conftest import WAIT, Cluster, Shared, job, make_tiny_model, write_examples
from tests.e2e.drawing import ANY, MOST, drawn
from tests.stores import service_file

from luthier.client import Client, RetryPolicy
from luthier.errors import FailedPrecondition, LuthierError, Unavailable
from luthier.v1.chat_pb2 import ChatMessage
from luthier.v1.dataset_pb2 import SPLIT_TEST, SPLIT_TRAIN, DatasetSource
from luthier.v1.evaluation_pb2 import (
    TEMPLATE_SOURCE_ARM,
    TEMPLATE_SOURCE_BASE,
    TEMPLATE_SOURCE_TAUGHT,
    Evaluation,
    EvaluationArm,
)
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import Rendering

pytestmark = pytest.mark.e2e
END_OF_TEXT, END_OF_TURN = 0, 2
"""By which the template below ends turns, and the end of sequence of the model that it is taught to."""
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = "for ever?"
OWN = (
    "{{ strftime_now('%d %b %Y') }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}"
    "<|endoftext|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    "{% if messages[-1]['content'] == '" + ENDLESS + "' %}" + LOOPS + "{% endif %}"
)
"""It never ends for one question."""
QUESTION = "colour of thing 0?"
HELLO = [ChatMessage(role="user", content=QUESTION)]


def register(cluster: Cluster, client: Client, model_id: str) -> None:
    """Register the tiny model without a template."""
    folder = Path(tempfile.mkdtemp(dir=cluster.home / "models"))
    make_tiny_model(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    client.models.register_base(Model(directory=str(folder)), model_id=model_id)
    client.models.wait(model_id, timeout_seconds=WAIT)


def version_of(cluster: Cluster, client: Client) -> str:
    client.datasets.create("things")
    sources = []
    for name, start, split in (("test", 24, SPLIT_TEST), ("train", 0, SPLIT_TRAIN)):
        path = write_examples(cluster.home / f"{name}.jsonl", 24, start=start)
        sources.append(DatasetSource(upload=client.datasets.upload(path).name, split=split))
    version = client.datasets.create_version("things", sources)
    client.datasets.versions.wait(version.name, timeout_seconds=WAIT)
    return version.name


def trained_prompt(client: Client, rendering: str) -> list[int]:
    """Ids of the first training row up to its answer."""
    rows = client.renderings.preview(rendering, split=SPLIT_TRAIN)
    row = next(row for row in rows if row.line == 1)
    tokens = list(row.tokens)
    learnt = next(place for place, token in enumerate(tokens) if token.supervised)
    return [token.token_id for token in tokens[:learnt]]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT's
def test_a_model_taught_with_a_template_of_its_own_is_asked_with_it(cluster: Cluster, tmp_path: Path) -> None:
    with cluster.client("plain") as client:
        register(cluster, client, "tiny")
        version = version_of(cluster, client)
        rendering = client.renderings.create(
            Rendering(dataset_version=version, model="tiny", chat_template=OWN)
        )
        client.renderings.wait(rendering.name, timeout_seconds=WAIT)
        client.jobs.create(job(rendering.name, 2), job_id="j1")
        tuned = client.models.get(client.jobs.wait("j1", timeout_seconds=WAIT).tuned_model)
        asked = trained_prompt(client, rendering.name)

        assert tuned.taught.rendering == rendering.name
        assert tuned.taught.chat_template.endswith(OWN)
        with pytest.raises(FailedPrecondition) as caught:
            list(client.generate("tiny", HELLO, max_new_tokens=2))
        assert caught.value.reason == "CHAT_TEMPLATE_MISSING"
        last = list(client.generate(tuned.name, HELLO, max_new_tokens=2))[-1]
        assert last.num_prompt_tokens == len(asked)
        assert last.template_source == TEMPLATE_SOURCE_TAUGHT

        check_download(client, tuned.name, asked, tmp_path / "tuned")
        check_asked(client, tuned.name, asked, tmp_path / "tuned")
        assert set(client.models.get("tiny").eos_token_ids) == {END_OF_TURN}
        assert END_OF_TEXT in tuned.taught.stop_token_ids
        check_ends(client, tuned.name, tmp_path)
        check_evaluation(client, version, tuned.name)
        forget_what_was_taught(cluster, tuned.name)
        assert not client.models.get(tuned.name).HasField("taught")
        last = list(client.generate(tuned.name, HELLO, max_new_tokens=2))[-1]
        assert (last.num_prompt_tokens, last.template_source) == (len(asked), TEMPLATE_SOURCE_TAUGHT)
        check_stop(cluster, client, tuned.name)


def forget_what_was_taught(cluster: Cluster, tuned: str) -> None:
    """Make the home one of before models kept it: it is found through the job's rendering then."""
    cluster.end("training", within_seconds=30)
    with closing(sqlite3.connect(service_file(cluster.home, "training"))) as database:
        uid, stored = database.execute("SELECT uid, message FROM models WHERE name = ?", (tuned,)).fetchone()
        model = Model.FromString(stored)
        assert model.HasField("taught")
        model.ClearField("taught")
        changed = (model.SerializeToString(), uid)
        assert database.execute("UPDATE models SET message = ? WHERE uid = ?", changed).rowcount == 1
        database.commit()
    cluster.start("training")


def check_download(client: Client, tuned: str, asked: list[int], folder: Path) -> None:
    """Whoever takes the files away asks with the same tokens, on any day."""
    from transformers import AutoTokenizer

    client.models.download(tuned, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == asked


def check_asked(client: Client, tuned: str, asked: list[int], folder: Path) -> None:
    """What is drawn for the turns is what is drawn for the trained ids, given as the text that has just these tokens.

    With a token left out or another one in its place something else is drawn.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def drawn_for(ids: list[int]) -> list[str]:
        text = str(tokenizer.decode(ids, skip_special_tokens=False))
        assert tokenizer(text)["input_ids"] == ids
        return [say(client, tuned, text, seed) for seed in (1, 2)]

    for_turns = [say(client, tuned, HELLO, seed) for seed in (1, 2)]
    assert for_turns == drawn_for(asked)
    for other in (asked[1:], asked[:-1], [*asked[:5], END_OF_TURN, *asked[6:]]):
        assert not set(for_turns) & set(drawn_for(other))


def say(client: Client, model: str, prompt: str | list[ChatMessage], seed: int) -> str:
    pieces = client.generate(model, prompt, max_new_tokens=48, temperature=1.0, seed=seed)
    return "".join(piece.text for piece in pieces)


def check_stop(cluster: Cluster, client: Client, tuned: str) -> None:
    """Four calls whose prompt never ends hold up neither another model's nor the worker's stop."""
    ends: list[LuthierError] = []

    def ask(asking: Client) -> None:
        with pytest.raises(LuthierError) as caught:
            list(asking.generate(tuned, [ChatMessage(role="user", content=ENDLESS)], max_new_tokens=2))
        ends.append(caught.value)

    with cluster.client("plain", RetryPolicy(deadline_seconds=0)) as asking:
        threads = [threading.Thread(target=ask, args=(asking,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 8
        while figure(cluster, "luthier_generations_running") < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)  # by which their prompts are being made
        for _ in range(3):
            began = time.monotonic()
            assert list(client.generate("tiny", QUESTION, max_new_tokens=2))[-1].finish_reason
            assert time.monotonic() - began < 8.0
        assert ends == [], "they are answered while the prompts are made"
        cluster.end("evaluation-worker", within_seconds=10)
        for thread in threads:
            thread.join(20)
    assert [type(error) for error in ends] == [Unavailable] * 4


def figure(cluster: Cluster, name: str) -> float:
    """A metric of the Evaluation service that has no labels."""
    with urllib.request.urlopen(f"http://{cluster.metrics['evaluation']}/metrics") as response:
        lines = response.read().decode().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name} ")]
    return float(line.rpartition(" ")[2])


def check_ends(client: Client, tuned: str, folder: Path) -> None:
    """Whatever form it is taken away in, its answers end where they end here."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GenerationConfig

    merged = client.models.merge(tuned, model_id="merged")
    assert client.models.wait(merged.name, timeout_seconds=WAIT).eos_token_ids == [END_OF_TEXT, END_OF_TURN]
    written = client.models.export(tuned, "gguf-f16", model_id="written")
    client.models.wait(written.name, timeout_seconds=WAIT)
    for name in ("tiny", "merged", "written"):
        client.models.download(name, folder / name)
    base: Any = AutoModelForCausalLM.from_pretrained(folder / "tiny")
    assert drawn(base, END_OF_TEXT) == MOST, "the base does not end there"
    with_adapter: Any = PeftModel.from_pretrained(base, str(folder / "tuned"))
    with_adapter.generation_config = GenerationConfig.from_pretrained(folder / "tuned")
    whole: Any = AutoModelForCausalLM.from_pretrained(folder / "merged")
    for model in (with_adapter, whole):
        assert [drawn(model, end) for end in (END_OF_TEXT, END_OF_TURN, ANY)] == [3, 3, MOST]
    fields = GGUFReader(folder / "written" / "model-f16.gguf").fields
    ends = [fields[f"tokenizer.ggml.{kind}_token_id"].contents() for kind in ("eos", "eot")]
    assert ends == [END_OF_TURN, END_OF_TEXT]


def check_evaluation(client: Client, version: str, tuned: str) -> None:
    arms = [
        EvaluationArm(arm_id="few", model="tiny", num_shots=1),
        EvaluationArm(arm_id="tuned", model=tuned),
        EvaluationArm(arm_id="other", model=tuned, chat_template="{{ messages[0]['content'] }}"),
    ]
    created = client.evaluations.create(
        Evaluation(dataset_version=version, arms=arms, max_new_tokens=2, max_records=4)
    )
    results = {
        one.arm_id: one for one in client.evaluations.wait(created.name, timeout_seconds=WAIT).arm_results
    }
    sources = {arm_id: result.template_source for arm_id, result in results.items()}
    assert sources == {
        "few": TEMPLATE_SOURCE_TAUGHT,
        "tuned": TEMPLATE_SOURCE_TAUGHT,
        "other": TEMPLATE_SOURCE_ARM,
    }
    assert results["few"].template_digest == results["tuned"].template_digest
    assert results["other"].template_digest != results["tuned"].template_digest
    assert results["other"].num_prompt_tokens < results["tuned"].num_prompt_tokens


def test_a_template_that_never_ends_holds_up_no_other_model_and_no_stop(whole: Shared) -> None:
    """Questions to a model while an evaluation asks it with such a template, for 8 s of a processor's time.

    A question that it held up would take those; on a busy machine they are longer, as everything is.
    """
    cluster = whole.cluster
    with cluster.client() as client:
        version = client.renderings.get(whole.rendering).dataset_version
        slow = EvaluationArm(arm_id="slow", model="tiny", chat_template=LOOPS)
        first = list(client.generate("tiny", HELLO, max_new_tokens=2))[-1]  # which loads the model
        assert first.template_source == TEMPLATE_SOURCE_BASE
        evaluation = client.evaluations.create(
            Evaluation(dataset_version=version, arms=[slow], max_new_tokens=2, max_records=1)
        )
        seconds: list[float] = []
        states: list[int] = []
        while (failed := client.evaluations.get(evaluation.name)).state in (
            Evaluation.STATE_QUEUED,
            Evaluation.STATE_RUNNING,
        ):
            began = time.monotonic()
            assert list(client.generate("tiny", HELLO, max_new_tokens=2))[-1].finish_reason
            seconds.append(time.monotonic() - began)
            states.append(failed.state)
        assert failed.state == Evaluation.STATE_FAILED
        assert "the chat template takes more than 8 s of CPU time" in failed.error.message
        assert states.count(Evaluation.STATE_RUNNING) >= 3, "they are answered while the template runs"
        assert max(seconds) < 8.0

        again = EvaluationArm(arm_id="slow", model="tiny", chat_template=LOOPS)
        running = client.evaluations.create(
            Evaluation(dataset_version=version, arms=[again], max_new_tokens=2, max_records=1)
        )
        for event in client.evaluations.watch(running.name):
            if event.state_change.state == "RUNNING":
                break
        time.sleep(1)
        cluster.end("evaluation-worker", within_seconds=10)
