"""The manifest of a Ray cluster against the schema that KubeRay has a Kubernetes cluster check it by."""

from __future__ import annotations

import copy
import gzip
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from luthier.daemon.__main__ import main

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy" / "ray" / "cluster.yaml"


@cache
def schema() -> dict[str, Any]:
    """The schema of what is stored, as strictly as `kubectl apply` reads: a name that nobody declares is an error."""
    text = gzip.decompress((Path(__file__).parent / "kuberay_rayclusters.yaml.gz").read_bytes())
    crd = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    assert (crd["spec"]["group"], crd["spec"]["names"]["kind"]) == ("ray.io", "RayCluster")
    [stored] = [one for one in crd["spec"]["versions"] if one["storage"]]
    assert stored["name"] == "v1"
    found: dict[str, Any] = stored["schema"]["openAPIV3Schema"]
    found["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    for part in _objects(found):
        if "properties" in part and not part.get("x-kubernetes-preserve-unknown-fields"):
            part.setdefault("additionalProperties", False)
    return found


def _objects(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        yield part
        # Not before all are visited: what is set on the way is no part of it.
        for value in list(part.values()):
            yield from _objects(value)
    elif isinstance(part, list):
        for value in part:
            yield from _objects(value)


def manifest() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(MANIFEST.read_text())
    return found


def problems(found: dict[str, Any]) -> list[str]:
    checked = jsonschema.Draft4Validator(schema()).iter_errors(found)
    return [f"{'/'.join(map(str, one.absolute_path))}: {one.message}" for one in checked]


def containers() -> list[dict[str, Any]]:
    spec = manifest()["spec"]
    templates = [
        spec["headGroupSpec"]["template"],
        *(group["template"] for group in spec["workerGroupSpecs"]),
    ]
    return [container for template in templates for container in template["spec"]["containers"]]


def test_the_manifest_is_what_kuberay_takes() -> None:
    found = manifest()
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayCluster")
    assert problems(found) == []


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("spec", "rayVersoin"), "2.60.0", "rayVersoin"),
        (("spec", "authOptions", "mode"), "password", "password"),
        (("spec", "workerGroupSpecs", 0, "replicas"), "two", "two"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "imagee"), "x", "imagee"),
    ],
)
def test_what_kuberay_refuses_is_found(place: tuple[str | int, ...], value: str, words: str) -> None:
    found = copy.deepcopy(manifest())
    part: Any = found
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    assert any(words in one for one in problems(found))


def test_the_worker_has_the_options_and_settings_that_the_manifest_gives_it() -> None:
    head = containers()[0]
    [line] = re.findall(r"luthierd worker training (.*?) &$", head["args"][0], re.MULTILINE)
    shown = CliRunner().invoke(main, ["worker", "--help"]).output
    options = [word for word in line.split() if word.startswith("--")]
    assert options == ["--executor", "--device", "--ranks"]
    assert all(option in shown for option in options)
    names = {one["name"] for container in containers() for one in container["env"]}
    assert {name for name in names if name.startswith("LUTHIER_")} == {
        "LUTHIER_HOME",
        "LUTHIER_DATA_ADDRESS",
        "LUTHIER_TRAINING_ADDRESS",
    }


def test_there_are_as_many_gpus_as_ranks() -> None:
    [ranks] = re.findall(r"--ranks (\d+)", containers()[0]["args"][0])
    gpus = [
        group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
        for group in manifest()["spec"]["workerGroupSpecs"]
        for container in group["template"]["spec"]["containers"]
    ]
    assert int(ranks) == sum(gpus)


def test_only_the_head_has_a_key() -> None:
    texts = [yaml.safe_dump(group["template"]) for group in manifest()["spec"]["workerGroupSpecs"]]
    assert not any("secret" in text or "worker-key" in text for text in texts)


def test_image_and_manifest_name_a_ray_that_the_extra_takes() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["ray"]
    [least] = re.findall(r"ray\[train\]>=(\d+\.\d+)", extras[0])
    dockerfile = (ROOT / "deploy" / "ray" / "Dockerfile").read_text()
    for text in (manifest()["spec"]["rayVersion"], re.findall(r"rayproject/ray:([\d.]+)", dockerfile)[0]):
        assert tuple(map(int, text.split(".")[:2])) >= tuple(map(int, least.split(".")))
