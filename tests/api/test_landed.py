"""What was stored or sent by the last landed state stays readable."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUF = Path(sys.executable).with_name("buf")
LANDED = ROOT / "tests" / "golden" / "protos.binpb.gz"


def breaking(protos: Path) -> subprocess.CompletedProcess[str]:
    command = [str(BUF), "breaking", str(protos), "--against", str(LANDED)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_no_number_or_type_of_a_field_has_changed() -> None:
    done = breaking(ROOT / "protos")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("luthier/v1/dataset.proto", "string display_name = 3", "string display_name = 33"),
        ("luthier/v1/dataset.proto", "string digest = 8", "int64 digest = 8"),
        ("luthier/stored/v1/data.proto", "string model_digest = 1", "bool model_digest = 1"),
    ],
)
def test_a_change_that_old_rows_would_not_survive_is_found(
    tmp_path: Path, file: str, old: str, new: str
) -> None:
    protos = tmp_path / "protos"
    shutil.copytree(ROOT / "protos", protos)
    path = protos / file
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    done = breaking(protos)
    assert done.returncode != 0
    assert file in done.stdout
