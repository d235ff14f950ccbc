"""Freed memory stays while a run wants it and goes back afterwards: seen in the process's resident size."""

import subprocess
import sys

SCRIPT = """
import sys, torch
from luthier.lm.memory import freed_memory_kept

def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20

def allocate_and_free():
    made = [torch.ones(2**20) for _ in range(64)]

allocate_and_free()
before = resident_mb()
with freed_memory_kept():
    allocate_and_free()
    inside = resident_mb()
print(inside - before, resident_mb() - before)
"""


def test_freed_memory_stays_inside_the_block_and_goes_after_it() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    inside_mb, after_mb = map(int, done.stdout.split())
    assert inside_mb > 200
    assert after_mb < 50
