"""What makers of GPUs state of their products in bfloat16, for the shares of it that runs reach."""

from __future__ import annotations

import re
from collections.abc import Mapping

PEAKS: Mapping[str, float] = {
    "A100": 312e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
}
"""Operations a second in bfloat16, dense, as makers state them, by whole words of the name that torch gives a device.

Of several that a name holds the longest is meant: an H100 without more words in its name is the one on a SXM module.
"""


def peak_of(name: str) -> float:
    """Return what the maker of a device states; 0: not known here, as of a slice of one (MIG)."""
    if _holds(name, "MIG"):
        return 0.0
    held = [words for words in PEAKS if _holds(name, words)]
    return PEAKS[max(held, key=len)] if held else 0.0


def _holds(name: str, words: str) -> bool:
    return re.search(rf"\b{re.escape(words)}\b", name) is not None


def why_no_share(name: str | None) -> str:
    """Say why nothing is a share of a device's peak; empty where its peak is known. None is no device."""
    if name is None:
        return "there is no device: what a processor takes is no share of a GPU's peak"
    return "" if peak_of(name) else f"no peak in bfloat16 is known of {name!r} (benchmarks/gpu_peaks.py)"


def share_of(operations: int, milliseconds: float, peak: float) -> float | None:
    """Return the share of a peak that so many operations in so long a time reach; None where there is no peak."""
    return operations / (milliseconds / 1e3) / peak if peak else None
