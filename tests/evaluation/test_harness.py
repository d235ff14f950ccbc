"""Tasks of lm-evaluation-harness on a model of ours give the numbers that its own backend for transformers gives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tests.evaluation.conftest import Site

from luthier.client import Client, harness
from luthier.client.config import ClientConfig
from luthier.client.harness import LuthierLM, arm_result, run_tasks
from luthier.errors import InvalidArgument, NotFound
from luthier.evaluation.worker import computing
from luthier.lm.load import load_model
from luthier.v1.text_score_pb2 import TextToScore

QUESTIONS = [
    {
        "question": f"what colour has thing {number}?",
        "choices": ["red", "green", "blue"],
        "answer": number % 3,
    }
    for number in range(12)
]
TASKS: dict[str, dict[str, Any]] = {
    "things_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "things_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} it is {{choices[answer]}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "things_said": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["t"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
LONG = " ".join(f"thing {number} has the colour {number % 7} and more" for number in range(120))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "things.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    for name, said in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "things.jsonl")}},
            "test_split": "test",
            "metadata": {"version": 1.0},
            **said,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))
    return folder


@pytest.fixture(scope="module")
def theirs(model_folders: dict[str, Path]) -> HFLM:
    return HFLM(pretrained=str(model_folders["base"]), dtype="float32", device="cpu", batch_size=4)


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the worker hold weights as the harness's backend does, so that what differs is not rounding."""

    def load(folder: Path, *, device: Any, precision: Any) -> Any:
        return load_model(folder, torch.float32, device, precision=precision)

    monkeypatch.setattr(computing, "load_model", load)


@pytest.fixture
def ours(site: Site) -> Iterator[LuthierLM]:
    site.models.context_lengths["base"] = 1024
    config = ClientConfig(
        api_key=site.keys.api_key,
        evaluation_address=site.address,
        data_address=site.address,
        training_address=site.address,
    )
    with Client(config) as client:
        yield LuthierLM("base", client=client)


def instances(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=index) for index, one in enumerate(arguments)
    ]


async def asked(site: Site, work: Any) -> Any:
    """Run what blocks beside a worker."""
    async with site.worker():
        return await asyncio.to_thread(work)


async def test_likelihoods_are_those_of_the_harness(site: Site, ours: LuthierLM, theirs: HFLM) -> None:
    pairs = [
        ("what colour has the thing", " red"),
        ("what colour has the thing ", "red and blue"),
        ("", "what colour"),
        ("what is its number\n", "7"),
        (LONG, " red"),
    ]
    requests = instances("loglikelihood", *pairs)
    found = await asked(site, lambda: ours.loglikelihood(requests))
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], rel=1e-5)
    likeliest = theirs.tok_decode(_greedy(theirs, pairs[0][0]))
    both = instances("loglikelihood", (pairs[0][0], likeliest), (pairs[0][0], " red"))
    greedy = await asked(site, lambda: ours.loglikelihood(both))
    assert [one[1] for one in greedy] == [one[1] for one in theirs.loglikelihood(both, disable_tqdm=True)]


def _greedy(model: HFLM, context: str) -> list[int]:
    ids = torch.tensor([model.tok_encode(context)])
    with torch.no_grad():
        return [int(model.model(ids).logits[0, -1].argmax())]


async def test_whole_texts_are_read_in_the_harness_s_windows(
    site: Site, ours: LuthierLM, theirs: HFLM
) -> None:
    assert len(theirs.tok_encode(LONG)) > 1024, "longer than the model reads"
    requests = instances("loglikelihood_rolling", ("what colour has the thing",), (LONG,))
    found = await asked(site, lambda: ours.loglikelihood_rolling(requests))
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-5)


async def test_answers_are_cut_where_the_harness_cuts_them(site: Site, ours: LuthierLM, theirs: HFLM) -> None:
    wanted = {"until": ["t", "zz"], "max_gen_toks": 8, "do_sample": False}
    requests = instances(
        "generate_until", *((f"what colour has thing {number}?", dict(wanted)) for number in range(4))
    )
    found = await asked(site, lambda: ours.generate_until(requests))
    assert found == theirs.generate_until(requests, disable_tqdm=True)
    assert all("t" not in one for one in found)


async def test_tasks_from_files_have_the_same_results(
    site: Site, ours: LuthierLM, theirs: HFLM, tasks: Path
) -> None:
    found = await asked(site, lambda: run_tasks(ours, list(TASKS), folders=[tasks]))
    expected = run_tasks(theirs, list(TASKS), folders=[tasks])
    left, right = (arm_result("base", results) for results in (found, expected))
    names = [one.score for one in left.scores]
    assert names == [one.score for one in right.scores]
    assert {
        "lm_eval.things_choice.acc",
        "lm_eval.things_choice.acc_norm",
        "lm_eval.things_said.exact_match",
        "lm_eval.things_text.word_perplexity",
        "lm_eval.things_text.bits_per_byte",
    } <= set(names)
    for mine, other in zip(left.scores, right.scores, strict=True):
        assert mine.value == pytest.approx(other.value, rel=1e-5), mine.score
        assert mine.count == other.count == len(QUESTIONS)
        assert (mine.kind, mine.direction) == (other.kind, other.direction)


async def test_what_cannot_be_scored_says_why(site: Site, ours: LuthierLM) -> None:
    client = ours._client
    text = TextToScore(context="a", continuation="b")
    with pytest.raises(InvalidArgument, match="texts: must hold 1 to 64 texts, got 0"):
        await asyncio.to_thread(client.evaluations.score_texts, "base", [])
    with pytest.raises(InvalidArgument, match=r"texts\[1\].continuation: must be at most"):
        await asyncio.to_thread(client.evaluations.score_texts, "base", [text, TextToScore(context="a")])
    rolling = TextToScore(context="a", continuation="b", rolling=True)
    with pytest.raises(InvalidArgument, match=r"texts\[0\].context: must be empty where"):
        await asyncio.to_thread(client.evaluations.score_texts, "base", [rolling])
    with pytest.raises(NotFound):
        await asyncio.to_thread(client.evaluations.score_texts, "none", [text])
    long = TextToScore(context="a", continuation=LONG)
    with pytest.raises(
        InvalidArgument, match=r"texts\[1\].continuation: must have at most 1024 tokens, got \d+"
    ):
        await asked(site, lambda: client.evaluations.score_texts("base", [text, long]))


async def test_how_much_of_a_context_was_cut_is_told(site: Site, ours: LuthierLM) -> None:
    texts = [TextToScore(context=LONG, continuation=" red"), TextToScore(context="what", continuation=" red")]
    found = await asked(site, lambda: ours._client.evaluations.score_texts("base", texts))
    assert found.scores[0].num_cut_tokens > 100
    assert found.scores[1].num_cut_tokens == 0
    assert found.scores[0].num_tokens == found.scores[1].num_tokens > 0


async def test_turns_are_put_into_the_worker_s_template(site: Site, ours: LuthierLM) -> None:
    turns = ours.apply_chat_template([{"role": "user", "content": "what colour?"}])
    asked_twice = instances(
        "generate_until", (turns, {"max_gen_toks": 6}), ("what colour?", {"max_gen_toks": 6, "until": "\n\n"})
    )
    said, plain = await asked(site, lambda: ours.generate_until(asked_twice))
    template = "<|im_start|>user\nwhat colour?<|im_end|>\n<|im_start|>assistant\n"
    same = instances("generate_until", (template, {"max_gen_toks": 6}))
    assert said == (await asked(site, lambda: ours.generate_until(same)))[0]
    assert said != plain
    with pytest.raises(InvalidArgument, match=r"the last turn must be the user.s"):
        ours.apply_chat_template([{"role": "assistant", "content": "It"}], add_generation_prompt=False)


def test_arguments_of_generation_that_are_none_of_ours_are_refused(ours: LuthierLM) -> None:
    with pytest.raises(InvalidArgument, match=r"generation_kwargs must be some of until, .* got num_beams"):
        ours.generate_until(instances("generate_until", ("a", {"num_beams": 4})))


def test_a_task_that_nobody_has_is_named(
    ours: LuthierLM, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def manager(folders: Any, *, own: bool) -> TaskManager:
        asked.append(own)
        return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)

    monkeypatch.setattr(harness, "_manager", manager)
    with pytest.raises(InvalidArgument, match="has, or files, got things_none"):
        run_tasks(ours, ["things_said", "things_none"], folders=[tasks])
    assert asked == [False, True], "the harness's own are read only where they are needed"
