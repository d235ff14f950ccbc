"""A device's peak is found by its name, and a share of it where it is known."""

from __future__ import annotations

import pytest
from gpu_peaks import peak_of, share_of, why_no_share


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GeForce RTX 4090", 0.0),
        ("NVIDIA GB300", 0.0),
        ("NVIDIA A100X", 0.0),
        ("NVIDIA XB200", 0.0),
        ("NVIDIA H200 MIG 1g.18gb", 0.0),
    ],
)
def test_a_device_is_known_by_words_of_its_name(name: str, peak: float) -> None:
    assert peak_of(name) == peak


def test_a_share_is_of_a_peak_that_is_known() -> None:
    assert share_of(500, 1.0, 1e6) == 0.5
    assert share_of(500, 1.0, 0.0) is None


def test_why_there_is_no_share_is_said() -> None:
    assert why_no_share("NVIDIA H200") == ""
    assert why_no_share("Another") == "no peak in bfloat16 is known of 'Another' (benchmarks/gpu_peaks.py)"
    assert why_no_share(None) == "there is no device: what a processor takes is no share of a GPU's peak"
