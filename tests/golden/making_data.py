"""Uploads, datasets, versions and renderings in every state where they may rest."""

from __future__ import annotations

from typing import Any

from tests.evaluation.tiny_models import write_base
from tests.golden.making import DATA, FAILED, OTHER, PARENT, READY, Making, json_lines, model_folder

from luthier.v1.rendering_pb2 import Rendering

MODELS = "luthier.v1.ModelService"
VERSION = f"{PARENT}/datasets/things/versions/v1"
MODEL = f"{PARENT}/models/tiny"
_COLOURS = ("red", "green", "blue")
_OWN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}: {{ message.content }}<|im_end|>\n"
    "{% endfor %}"
)
_REFUSING_TEMPLATE = (
    "{% if messages[0].content == 'colour of thing 3?' %}{{ raise_exception('not this') }}{% endif %}"
    + _OWN_TEMPLATE
)


def chat(number: int, **more: Any) -> Any:
    """Return a chat about a numbered thing."""
    answer = {"role": "assistant", "content": f'{{"colour": "{_COLOURS[number % 3]}"}}', **more}
    return {"messages": [{"role": "user", "content": f"colour of thing {number}?"}, answer]}


def make_finished_data(making: Making) -> None:
    """Make what workers have ended: needs all services, the data worker and the training worker."""
    folder = model_folder(making.cluster, "tiny")
    write_base(folder, seed=1)
    for parent, name in ((PARENT, "tiny"), (OTHER, "tiny")):
        register(making, parent, name, str(folder))
        making.wait(f"{MODELS}/GetModel", f"{parent}/models/{name}", READY)
    _make_uploads(making)
    _make_versions(making)
    _make_renderings(making)


def register(making: Making, parent: str, model_id: str, folder: str) -> str:
    """Register a model of a folder. Without a request id: the kept answer would name the folder in bytes."""
    model = {"directory": folder, "displayName": f"Modell „{model_id}“", "labels": {"team": "a"}}
    request = {"parent": parent, "model": model, "modelId": model_id}
    name: str = making.call(f"{MODELS}/RegisterBaseModel", request)["name"]
    return name


def _make_uploads(making: Making) -> None:
    making.upload("begun.jsonl", b"")
    making.upload("part.jsonl", b'{"messages": [', finish=False)
    given_up = making.upload("given-up.jsonl", b'{"messages": [', finish=False)
    making.call_once(f"{DATA}/CancelUpload", {"name": given_up})


def _make_versions(making: Making) -> None:
    things = [chat(number) for number in range(24)] + [chat(0), chat(1), chat(99, weight=0), _conversation()]
    _dataset(making, PARENT, "things", displayName="Dinge – 物 🎈", labels={"team": "a", "stage": "prod"})
    _dataset(making, PARENT, "mixed", displayName="Gemischt", labels={"team": "b"})
    _dataset(making, PARENT, "empty")
    _dataset(making, OTHER, "things", displayName="another project's", labels={"team": "a"})
    train = making.upload("train.jsonl", json_lines(things))
    test = making.upload("tëst.jsonl", json_lines([chat(number) for number in range(100, 106)]))
    sources = [{"upload": train}, {"upload": test, "split": "SPLIT_TEST"}]
    split = {"validationFraction": 0.2, "seed": 7}
    version(making, VERSION, sources, splitSettings=split, labels={"team": "a"})
    _ended(making, VERSION, READY)
    mixed = f"{PARENT}/datasets/mixed/versions"
    version(making, f"{mixed}/v1", _mixed_sources(making), invalidRecordPolicy="INVALID_RECORD_POLICY_SKIP")
    _ended(making, f"{mixed}/v1", READY)
    version(making, f"{mixed}/bad", _mixed_sources(making), labels={"team": "b"})
    _ended(making, f"{mixed}/bad", FAILED)
    pairs = [{"prompt": f"the colour of {number} is", "completion": " blue"} for number in range(6)]
    version(making, f"{mixed}/pairs", [{"upload": making.upload("pairs.jsonl", json_lines(pairs))}])
    _ended(making, f"{mixed}/pairs", READY)
    elsewhere = making.upload("train.jsonl", json_lines(things), OTHER)
    version(making, f"{OTHER}/datasets/things/versions/v1", [{"upload": elsewhere}])
    _ended(making, f"{OTHER}/datasets/things/versions/v1", READY)


def _conversation() -> Any:
    first, second = chat(50, weight=0)["messages"], chat(51)["messages"]
    return {"messages": [{"role": "system", "content": "Kürze ist Würze. 短く。"}, *first, *second]}


def _mixed_sources(making: Making) -> list[Any]:
    tool = {"type": "function", "function": {"name": "weigh", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "weigh", "arguments": '{"thing": 1}'}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    with_tools = {"messages": [{"role": "user", "content": "weigh 1"}, calling], "tools": [tool]}
    wrong = ["{not json", {"messages": []}, {"messages": [{"role": "user", "content": 3}]}]
    files = {
        "chats.jsonl": ([chat(1), with_tools, *wrong], {"format": "DATASET_FORMAT_OPENAI_CHAT"}),
        "pairs.jsonl": ([{"prompt": "1 + 1 =", "completion": " 2"}], {"split": "SPLIT_VALIDATION"}),
        "alpaca.jsonl": ([{"instruction": "Add.", "input": "1 1", "output": "2"}], {}),
    }
    return [
        {"upload": making.upload(name, json_lines(records)), **settings}
        for name, (records, settings) in files.items()
    ]


def _make_renderings(making: Making) -> None:
    skip = {"templateErrorPolicy": "TEMPLATE_ERROR_POLICY_SKIP", "chatTemplate": _REFUSING_TEMPLATE}
    own = {"chatTemplate": _OWN_TEMPLATE, "maskMode": "MASK_MODE_LAST_TURN", "labels": {"kind": "own"}}
    short = {"maxTokens": 40, "lengthPolicy": "LENGTH_POLICY_TRUNCATE"}
    _rendered(making, "chat", READY, labels={"team": "a"})
    _rendered(making, "own-template", READY, **own)
    _rendered(making, "short", READY, **short)
    _rendered(making, "pairs", READY, datasetVersion=f"{PARENT}/datasets/mixed/versions/pairs")
    _rendered(making, "refused", FAILED, chatTemplate=_REFUSING_TEMPLATE)
    if "split_turns" in Rendering.DESCRIPTOR.fields_by_name:
        _rendered(making, "turns", READY, splitTurns=True)
        _rendered(making, "skipping", READY, **skip)
    foreign = {"datasetVersion": f"{OTHER}/datasets/things/versions/v1", "model": f"{OTHER}/models/tiny"}
    making.wait(f"{DATA}/GetRendering", rendering(making, f"{OTHER}/renderings/chat", **foreign), READY)


def make_resting_data(making: Making) -> None:
    """Make what no worker has ended. The data worker stops here."""
    making.cluster.drain("data-worker")
    parent = f"{PARENT}/datasets/empty"
    source = [{"upload": making.upload("few.jsonl", json_lines([chat(number) for number in range(4)]))}]
    making.worker("data").claim(rendering(making, f"{PARENT}/renderings/lost"))
    data = making.worker("data")
    data.claim(f"{PARENT}/renderings/lost")
    if making.has(f"{DATA}/CancelDatasetVersion"):
        cancelled = version(making, f"{parent}/versions/cancelled", source)
        making.call_once(f"{DATA}/CancelDatasetVersion", {"name": cancelled})
        data.claim(version(making, f"{parent}/versions/cancelling", source))
        making.call_once(f"{DATA}/CancelDatasetVersion", {"name": f"{parent}/versions/cancelling"})
        cancelled = rendering(making, f"{PARENT}/renderings/cancelled")
        making.call_once(f"{DATA}/CancelRendering", {"name": cancelled})
        data.claim(rendering(making, f"{PARENT}/renderings/cancelling"))
        making.call_once(f"{DATA}/CancelRendering", {"name": f"{PARENT}/renderings/cancelling"})
    data.fail(data.claim(version(making, f"{parent}/versions/broken", source)), "the disk is broken")
    data.claim(version(making, f"{parent}/versions/building", source))
    data.claim(rendering(making, f"{PARENT}/renderings/rendering"))
    version(making, f"{parent}/versions/queued", source, labels={"team": "a"})
    rendering(making, f"{PARENT}/renderings/queued", labels={"team": "a"})


def version(making: Making, name: str, sources: list[Any], **settings: Any) -> str:
    """Start building a version."""
    parent, _, last = name.rpartition("/versions/")
    request = {"parent": parent, "datasetVersionId": last, "datasetVersion": {"sources": sources, **settings}}
    making.call_once(f"{DATA}/CreateDatasetVersion", request)
    return name


def rendering(making: Making, name: str, **settings: Any) -> str:
    """Start a rendering."""
    parent, _, last = name.rpartition("/renderings/")
    wanted = {"datasetVersion": VERSION, "model": MODEL, **settings}
    making.call_once(f"{DATA}/CreateRendering", {"parent": parent, "renderingId": last, "rendering": wanted})
    return name


def _rendered(making: Making, last: str, state: str, **settings: Any) -> None:
    making.wait(f"{DATA}/GetRendering", rendering(making, f"{PARENT}/renderings/{last}", **settings), state)


def _ended(making: Making, name: str, state: str) -> None:
    making.wait(f"{DATA}/GetDatasetVersion", name, state)


def _dataset(making: Making, parent: str, last: str, **settings: Any) -> None:
    making.call_once(f"{DATA}/CreateDataset", {"parent": parent, "datasetId": last, "dataset": settings})
