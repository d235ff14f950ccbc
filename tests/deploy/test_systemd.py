"""The units of systemd are what systemd itself finds right, and run commands that there are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from deploy.write import ROOT
from tests.daemon.test_luthierd import LUTHIERD

UNITS = ROOT / "deploy" / "systemd"
INSTALLED = "/opt/luthier/bin/luthierd"
KINDS = ("data", "training", "evaluation")


def installed(folder: Path) -> Path:
    """The units as on a machine where the command is installed: here it is elsewhere."""
    for unit in UNITS.iterdir():
        (folder / unit.name).write_text(unit.read_text().replace(INSTALLED, LUTHIERD))
    return folder


def verify(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.fail("systemd-analyze is missing: bash tests/debian.sh installs what the tests need of Debian")
    return subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(folder / name) for name in names)],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:"},
        capture_output=True,
        text=True,
        check=False,
    )


def told(done: subprocess.CompletedProcess[str], folder: Path) -> list[str]:
    """What is said of our units; the machine's own are none of our concern."""
    return [line for line in done.stderr.splitlines() if "luthier" in line.replace(str(folder), "")]


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    folder = installed(tmp_path)
    names = [f"luthier{of}@{kind}.service" for of in ("", "-worker") for kind in KINDS]
    done = verify(folder, "luthier.target", *names)
    assert (done.returncode, told(done, folder)) == (0, [])


def test_a_unit_that_is_wrong_is_found(tmp_path: Path) -> None:
    folder = installed(tmp_path)
    unit = folder / "luthier@.service"
    unit.write_text(unit.read_text().replace("Restart=always", "Restart=sometimes"))
    done = verify(folder, "luthier@data.service")
    assert "sometimes" in done.stderr


def test_the_target_wants_every_service_and_worker() -> None:
    wanted = re.findall(r"luthier\S*@\w+\.service", (UNITS / "luthier.target").read_text())
    assert sorted(wanted) == sorted(f"luthier{of}@{kind}.service" for of in ("", "-worker") for kind in KINDS)


def test_each_service_and_worker_can_be_enabled_by_itself(tmp_path: Path) -> None:
    if shutil.which("systemctl") is None:
        pytest.fail("systemctl is missing: bash tests/debian.sh installs what the tests need of Debian")
    folder = tmp_path / "etc" / "systemd" / "system"
    folder.mkdir(parents=True)
    installed(folder)
    names = [f"luthier{of}@{kind}.service" for of in ("", "-worker") for kind in KINDS]
    subprocess.run(["systemctl", f"--root={tmp_path}", "enable", *names], check=True, capture_output=True)
    assert sorted(one.name for one in (folder / "multi-user.target.wants").iterdir()) == sorted(names)


def test_an_upgrade_copies_what_nobody_writes_to_a_folder_of_its_own() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    steps = page.partition("## Upgrade")[2].strip().splitlines()
    stop, copy = (line.strip() for line in steps[:2])
    assert {f"'{unit.stem}*'" for unit in UNITS.glob("*@.service")} <= set(stop.split())
    assert "cp -aT " in copy, "into a folder that is there it would copy below it"
    assert "$(date " in copy


def test_the_doctor_is_asked_about_what_the_units_run() -> None:
    page = (ROOT / "docs" / "operating.md").read_text().replace("\\\n", "")
    asked = [line for line in page.splitlines() if line.endswith(f"{INSTALLED} doctor")]
    assert len(asked) == 2, "before the first start, and after an upgrade"
    settings = set((UNITS / "luthier-worker@.service").read_text().splitlines())
    for line in asked:
        given = re.findall(r"-p (\S+=\S+)", line)
        assert {"EnvironmentFile", "StateDirectory"} <= {one.partition("=")[0] for one in given}
        user, home = re.findall(r"--uid=(\S+)", line), re.findall(r"-E (\S+)", line)
        assert {*given, f"User={user[0]}", f"Environment={home[0]}"} <= settings


def test_a_worker_of_ray_may_be_let_to_its_sockets(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    (block,) = re.findall(r"((?:    .+\n)*    PrivateTmp=no\n(?:    .+\n)*)", page)
    folder = installed(tmp_path)
    changed = folder / "luthier-worker@training.service.d"
    changed.mkdir()
    (changed / "override.conf").write_text(re.sub(r"^    ", "", block, flags=re.MULTILINE))
    assert "ReadWritePaths=/tmp\n" in block, "all but the home is read-only where /tmp is not the unit's own"
    done = verify(folder, "luthier-worker@training.service")
    assert (done.returncode, told(done, folder)) == (0, [])


def test_a_worker_outlives_what_the_kernel_ends_for_want_of_memory() -> None:
    text = (UNITS / "luthier-worker@.service").read_text()
    assert {"OOMPolicy=continue", "KillMode=mixed"} <= set(text.splitlines())


def test_the_page_says_what_every_alert_asks_for() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    missing = [
        one.name for one in (ROOT / "docs" / "runbooks").iterdir() if f"(runbooks/{one.name})" not in page
    ]
    assert missing == []
