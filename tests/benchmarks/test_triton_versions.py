"""Environments with other versions of triton: made once, of the right commands, and their results side by side."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import triton_versions


def test_commands_take_the_projects_constraints(tmp_path: Path) -> None:
    empty, install = triton_versions.commands(tmp_path, ["triton==3.7.1", "packaging"])
    assert empty == [sys.executable, "-m", "venv", "--clear", str(tmp_path)]
    assert install[0] == str(tmp_path / "bin" / "python")
    assert install[1:4] == ["-m", "pip", "install"]
    constraints = Path(install[install.index("-c") + 1])
    assert "torch>=" in constraints.read_text()
    assert install[-2:] == ["triton==3.7.1", "packaging"]


def test_environment_is_made_once_and_sees_the_packages_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run(command: Sequence[str], *, check: bool) -> None:
        assert check
        ran.append("empty" if "venv" in command else "install")
        site = sysconfig.get_path("purelib", scheme="venv", vars={"base": str(tmp_path / "one")})
        if "venv" in command:
            Path(site).mkdir(parents=True, exist_ok=True)
        else:
            assert repr(sysconfig.get_path("purelib")) in (Path(site) / "seen.pth").read_text()

    monkeypatch.setattr(triton_versions, "FOLDER", tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        assert triton_versions.make("one", ["triton==3.7.1"]) == tmp_path / "one" / "bin" / "python"
    assert ran == ["empty", "install"]
    triton_versions.make("one", ["triton==3.9.0"])
    assert ran == ["empty", "install"] * 2


def test_environment_that_could_not_be_made_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Sequence[str]] = []

    def run(command: Sequence[str], *, check: bool) -> None:
        ran.append(command)
        raise subprocess.CalledProcessError(1, list(command))

    monkeypatch.setattr(triton_versions, "FOLDER", tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            triton_versions.make("one", [])
    assert len(ran) == 2


def torch_metadata(*requires: str) -> dict[str, Any]:
    return {"version": "2.13.0", "requires_dist": list(requires)}


def test_version_that_torch_asks_for_is_read_from_its_metadata() -> None:
    asked = 'triton==3.7.1; platform_system == "Linux"'
    assert triton_versions.asked_by(torch_metadata("filelock", asked)) == "3.7.1"
    with pytest.raises(ValueError, match=r"torch 2\.13\.0 must ask for one version of triton, got \[\]"):
        triton_versions.asked_by(torch_metadata("filelock", "pytorch-triton==3.7.1"))


@pytest.mark.parametrize(
    ("newest", "expected"),
    [
        ("3.9.0", {"3.9.0": "newest", "3.7.1": "asked for by torch 2.13.0"}),
        ("3.7.1", {"3.7.1": "newest, asked for by torch 2.13.0"}),
    ],
)
def test_versions_are_the_newest_and_the_one_asked_for(
    monkeypatch: pytest.MonkeyPatch, newest: str, expected: dict[str, str]
) -> None:
    known = {"triton": {"version": newest}, "torch===2.13.0": torch_metadata("triton==3.7.1")}
    monkeypatch.setattr(triton_versions, "_metadata", known.__getitem__)
    monkeypatch.setattr("importlib.metadata.version", {"torch": "2.13.0+cpu"}.__getitem__)
    found = triton_versions.versions()
    assert found == expected
    assert list(found) == list(expected)


SCRIPT = """
import json, sys
path = sys.argv[sys.argv.index("--results") + 1]
version = path.split("-")[-1].removesuffix(".json")
if "--fails" not in sys.argv:
    report = {"triton": version, "spills": 0, "targets": ["sm_90"], "usages": [{"case": version}]}
    open(path, "w").write(json.dumps(report))
sys.exit(version == "3.7.1")
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    monkeypatch.setattr(triton_versions, "FOLDER", tmp_path)
    monkeypatch.setattr(triton_versions, "versions", lambda: {"3.9.0": "newest", "3.7.1": "asked for"})
    monkeypatch.setattr(triton_versions, "make", lambda name, requirements: Path(sys.executable))
    return path


def test_results_of_the_newest_stand_beside_the_summaries_of_all(script: Path) -> None:
    code, found = triton_versions.run_each(script)
    assert code == 1
    assert found == {
        "tritons": {
            "3.9.0": {"why": "newest", "spills": 0, "targets": ["sm_90"]},
            "3.7.1": {"why": "asked for", "spills": 0, "targets": ["sm_90"]},
        },
        "triton": "3.9.0",
        "spills": 0,
        "targets": ["sm_90"],
        "usages": [{"case": "3.9.0"}],
    }


def test_old_results_are_not_taken_for_those_of_a_run_that_failed(script: Path) -> None:
    triton_versions.run_each(script)
    with pytest.raises(FileNotFoundError):
        triton_versions.run_each(script, ["--fails"])
