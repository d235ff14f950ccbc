"""The documentation is true as far as a program can tell."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
import tomllib
from base64 import b64encode
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from luthier.client.message_files import assign, read_message
from luthier.errors import Reason
from luthier.grading.checks import grader_violations
from luthier.text.formats import Format, detect, parse_record
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.grader_pb2 import Grader
from luthier.work.webhooks.config import WebhookConfig
from luthier.work.webhooks.signing import signed_headers

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks() -> list[tuple[str, str]]:
    return [
        (f"{page.name}-{number}", block)
        for page in PAGES
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    ]


def commands() -> list[str]:
    """Every `luthier ...` line of an indented block."""
    lines = [
        line for page in PAGES for line in re.findall(r"^    (luthier .*)$", page.read_text(), re.MULTILINE)
    ]
    assert len(lines) > 5
    return lines


def test_readme_names_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.replace("/", ".") for name in settings["tool"]["scikit-build"]["wheel"]["packages"]}
    packages |= {"luthier.v1", "luthier.errors", "luthier.client"}
    named = set(re.findall(r"^\| `(luthier[\w.]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named == packages


def test_clients_have_the_version_of_the_services() -> None:
    files = ("pyproject.toml", "clients/python/pyproject.toml")
    versions = {tomllib.loads((ROOT / file).read_text())["project"]["version"] for file in files}
    package = json.loads((ROOT / "clients" / "typescript" / "package.json").read_text())
    assert versions == {package["version"]}


def test_errors_page_lists_every_reason() -> None:
    listed = re.findall(r"^\| ([A-Z_]+) \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(reason.value for reason in Reason)


@pytest.mark.parametrize(("name", "block"), python_blocks(), ids=lambda value: value[:30])
def test_python_blocks_compile_and_import(name: str, block: str) -> None:
    compile(block, name, "exec")
    imports = "\n".join(re.findall(r"^from luthier.*$", block, re.MULTILINE))
    if imports:
        subprocess.run([sys.executable, "-c", imports], check=True)


@cache
def help_of(*command: str) -> str:
    """What a command says of itself, which many lines show."""
    program = str(Path(sys.executable).with_name("luthier"))
    return subprocess.run([program, *command, "--help"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("line", commands())
def test_commands_have_the_options_shown(line: str) -> None:
    words = shlex.split(line, comments=True)
    command = [word for word in words[1:3] if not word.startswith("-")]
    if command[0] == "generate":
        command = command[:1]
    shown = help_of(*command)
    for option in (word for word in words if word.startswith("--")):
        assert option.partition("=")[0] in shown, option


def test_each_format_has_examples_that_are_read_as_such() -> None:
    page = (ROOT / "docs" / "datasets.md").read_text()
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    assert sorted(sections) == sorted(Format)
    for name, section in sections.items():
        (block,) = re.findall(r"```json\n(.*?)```", section, re.DOTALL)
        for line in block.splitlines():
            value = json.loads(line)
            assert detect([value]) == name
            parse_record(value, Format(name))


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([\w./-]+\.md)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_yaml_blocks_are_messages() -> None:
    text = (ROOT / "docs" / "files.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    job = read_message(block.encode(), FineTuningJob, source="job.yaml").message
    assert (job.hyperparameters.learning_rate, job.lora.rank, dict(job.labels)) == (1e-4, 16, {"team": "nlp"})


def test_graders_of_the_page_are_graders() -> None:
    """Each kind there is has an example, and each example is one that the service takes."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "graders.md").read_text(), re.DOTALL)
    kinds = set()
    for block in blocks:
        grader = read_message(block.encode(), Grader, source="grader.yaml").message
        assert list(grader_violations(grader, "grader")) == []
        kinds.add(grader.WhichOneof("kind"))
    assert kinds == {one.name for one in Grader.DESCRIPTOR.oneofs_by_name["kind"].fields}


def test_assignments_do_what_is_said() -> None:
    table = (ROOT / "docs" / "files.md").read_text().partition("## Assignments")[2].partition("\n## ")[0]
    assignments = [
        one
        for line in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
        for one in line.strip("`").split("`, `")
    ]
    assert len(assignments) > 7
    job, evaluation = FineTuningJob(), Evaluation()
    for assignment in assignments:
        path, _, value = assignment.partition("=")
        message = evaluation if path.startswith(("arms", "metrics")) else job
        assign(message, path, value, source=assignment)
    assert [arm.model for arm in evaluation.arms] == ["m"]


def test_the_receiver_of_the_page_on_webhooks_believes_ours_alone() -> None:
    """What is sent is verified by the page's own code, and by nobody else's secret or much later."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "webhooks.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    is_ours, body = names["is_ours"], b'{"type":"fine_tuning_job.succeeded"}'
    secrets = [f"whsec_{b64encode(bytes([number] * 32)).decode()}" for number in range(3)]
    headers = signed_headers(secrets[:2], "msg_1", int(time.time()), body)
    assert is_ours(secrets[0], headers, body)
    assert is_ours(secrets[1], headers, body)
    assert not is_ours(secrets[2], headers, body)
    assert not is_ours(secrets[0], headers, body + b" ")
    assert not is_ours(secrets[0], {**headers, "webhook-id": "msg_2"}, body)
    assert not is_ours(secrets[0], signed_headers(secrets, "msg_1", int(time.time()) - 301, body), body)


def test_the_page_on_webhooks_has_every_setting_with_its_default() -> None:
    page = (ROOT / "docs" / "webhooks.md").read_text()
    for field in fields(WebhookConfig):
        setting = f"`LUTHIER_WEBHOOKS_{field.name.upper()}`"
        (default,) = re.findall(rf"^\| {setting} \| ([^|]*) \|", page, re.MULTILINE)
        if isinstance(field.default, float):
            assert default.split(" ")[0] == f"{field.default:g}"
        else:
            assert default.split(":")[0] in ("empty", "none")
            assert not field.default
