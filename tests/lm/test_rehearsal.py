"""Loading for practice leaves nothing behind that a training could see."""

from __future__ import annotations

import subprocess
import sys

import torch

from luthier.lm.rehearsal import rehearse

CODE = """
import sys
from luthier.lm.rehearsal import rehearse
rehearse()
before = set(sys.modules)
rehearse()
print(sorted(set(sys.modules) - before))
"""


def test_rehearse_uses_up_no_random_number_and_keeps_the_default_type() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    rehearse()
    assert torch.equal(torch.rand(3), wanted)
    assert torch.get_default_dtype() == torch.float32


def test_a_second_load_imports_nothing_more() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
