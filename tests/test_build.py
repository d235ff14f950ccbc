"""What `make` and CI do before they test: the TypeScript client is built first, and CI cannot go without it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "clients" / "typescript"


def _folder_of(tmp_path: Path, *programs: str) -> str:
    """Return a folder with these programs alone, for a PATH."""
    for program in programs:
        found = shutil.which(program)
        assert found, program
        (tmp_path / program).symlink_to(found)
    return str(tmp_path)


@pytest.mark.parametrize("goal", ["test", "check", "check-all"])
def test_make_builds_the_typescript_client_anew_before_tests_where_npm_is(goal: str, tmp_path: Path) -> None:
    path = _folder_of(tmp_path, "make", "bash", "sh", "awk")
    changed = "--what-if=clients/typescript/src/client.ts"

    def planned() -> list[str]:
        done = subprocess.run(
            ["make", "--dry-run", changed, goal],
            cwd=ROOT,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()

    assert not any("npm" in line for line in planned())
    (tmp_path / "npm").write_text("#!/bin/sh\n")
    (tmp_path / "npm").chmod(0o755)
    lines = planned()
    built = next(number for number, line in enumerate(lines) if "build-tests" in line)
    tested = next(number for number, line in enumerate(lines) if "pytest" in line or "tests/check.sh" in line)
    assert built < tested


def test_ci_does_not_go_without_npm(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / ".ci" / "run"],
        env={"PATH": _folder_of(tmp_path, "bash", "dirname")},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 1
    assert "CI needs npm" in done.stderr


def test_npm_is_never_told_to_keep_its_errors_to_itself() -> None:
    for path in (ROOT / "Makefile", ROOT / "tests" / "typescript.sh", ROOT / "tests" / "clients.sh"):
        silent = [line for line in path.read_text().splitlines() if "npm" in line and "--silent" in line]
        assert silent == [], path


def test_one_version_of_node_is_asked_for_everywhere() -> None:
    package = json.loads((PACKAGE / "package.json").read_text())
    lock = json.loads((PACKAGE / "package-lock.json").read_text())
    least = package["engines"]["node"]
    assert lock["packages"][""]["engines"]["node"] == least
    for path in (PACKAGE / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run"):
        said = re.findall(r"Node (\d+\.\d+) or newer", path.read_text())
        assert {f">={version}" for version in said} == {least}, path
