"""One contender measured by a script in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Peers are to stay on the processor and off the network, whatever the machine has.
_SURROUNDINGS = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_SHOWN_ERROR_CHARACTERS = 600

Measured = dict[str, Any]


def measured_apart(
    script: Path, arguments: Sequence[object], result: Path, missing: Sequence[str]
) -> Measured:
    """Return what a script writes to a file as JSON; `error` says why where it failed, or lacks packages."""
    if missing:
        return {"error": f"{', '.join(missing)} not installed (pip install -e .[bench])"}
    result.unlink(missing_ok=True)
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | _SURROUNDINGS, capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or not result.exists():
        return {"error": f"exit {done.returncode}: {done.stderr.strip()[-_SHOWN_ERROR_CHARACTERS:]}"}
    measured: Measured = json.loads(result.read_text())
    return measured
