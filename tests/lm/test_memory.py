"""Freed memory stays while a run wants it and goes back afterwards: seen in the process's resident size."""

import subprocess
import sys

import torch

from luthier.lm import memory

SCRIPT = """
import sys, torch
from luthier.lm.memory import freed_memory_kept

def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20

def allocate_and_free():
    made = [torch.ones(2**20) for _ in range(64)]

allocate_and_free()
before = resident_mb()
with freed_memory_kept(*map(int, sys.argv[1:])):
    allocate_and_free()
    inside = resident_mb()
print(inside - before, resident_mb() - before)
"""


def test_freed_memory_stays_inside_the_block_and_goes_after_it() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    inside_mb, after_mb = map(int, done.stdout.split())
    assert inside_mb > 200
    assert after_mb < 50


def test_blocks_that_are_larger_than_what_is_kept_go_at_once() -> None:
    command = [sys.executable, "-c", SCRIPT, str(1 << 19)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    inside_mb, after_mb = map(int, done.stdout.split())
    assert inside_mb < 50
    assert after_mb < 50


def test_a_peak_is_what_was_held_since_it_was_watched() -> None:
    device = torch.device("cpu")
    memory.give_back(device)
    memory.watch_peak(device)
    before = memory.peak_bytes(device)
    held = torch.ones(16 << 20)
    assert memory.peak_bytes(device) >= before + (60 << 20)
    assert memory.resident_bytes() > held.numel() * 4
    del held
    memory.give_back(device)
    memory.watch_peak(device)
    assert memory.peak_bytes(device) < before + (32 << 20)


def test_what_may_be_held_is_what_is_held_and_an_equal_part_of_what_is_left() -> None:
    device = torch.device("cpu")
    assert memory.limit_bytes(device, None) == 0
    for available, sharing, more in ((3 << 30, 1, 3 << 30), (3 << 30, 2, 3 << 29), (-5, 1, 0)):
        held = memory.resident_bytes()
        assert abs(memory.limit_bytes(device, available, sharing) - held - more) < 16 << 20
