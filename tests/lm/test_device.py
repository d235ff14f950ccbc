"""A device asked for by name is the one taken, or none is. There is no GPU here: torch is told of some."""

import pytest
import torch

from luthier.errors import InvalidArgument
from luthier.lm import device as device_module
from luthier.lm.device import choose_device, described, fault


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    count: int = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU model {index}")
    monkeypatch.setattr(device_module, "fault", lambda device: "")


@pytest.mark.parametrize(
    ("gpus", "wanted", "device"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, "auto", "cuda:0"),
        (2, "cpu", "cpu"),
        (2, "cuda", "cuda:0"),
        (2, "cuda:0", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
    ],
    indirect=["gpus"],
)
@pytest.mark.usefixtures("gpus")
def test_choose_device_takes_what_is_asked_for(wanted: str, device: str) -> None:
    assert choose_device(wanted) == torch.device(device)


@pytest.mark.parametrize(
    ("gpus", "wanted", "there"),
    [
        (0, "cuda", r"got 'cuda'; there is cpu; torch .* sees no GPU"),
        (0, "cuda:0", r"got 'cuda:0'; there is cpu"),
        (2, "cuda:2", r"there is cpu, cuda:0 \(GPU model 0\), cuda:1 \(GPU model 1\)$"),
        (2, "gpu", "got 'gpu'"),
        (2, "cuda:-1", "got 'cuda:-1'"),
        (2, "", "got ''"),
        (2, "rocm", r"got 'rocm'; there is cpu, cuda:0"),
    ],
    indirect=["gpus"],
)
@pytest.mark.usefixtures("gpus")
def test_choose_device_refuses_what_is_not_there_and_names_what_is(wanted: str, there: str) -> None:
    with pytest.raises(InvalidArgument, match=there):
        choose_device(wanted)


@pytest.mark.parametrize("gpus", [2], indirect=True)
@pytest.mark.usefixtures("gpus")
def test_a_torch_for_rocm_takes_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for wanted in ("rocm:1", "cuda:1"):
        assert choose_device(wanted) == torch.device("cuda:1")
    with pytest.raises(InvalidArgument, match=r"there is cpu, rocm:0 \(GPU model 0\)"):
        choose_device("rocm:2")


@pytest.mark.parametrize("gpus", [2], indirect=True)
@pytest.mark.usefixtures("gpus")
def test_a_gpu_that_does_not_work_is_passed_over_by_auto_and_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = {0}
    monkeypatch.setattr(device_module, "fault", lambda device: "no kernel" if device.index in broken else "")
    warnings: list[str] = []
    assert choose_device("auto", warnings.append) == torch.device("cuda:1")
    assert warnings == ["the GPU cuda:0 does not work and is passed over: no kernel"]
    with pytest.raises(InvalidArgument, match="cuda:0 does not: no kernel; there is cpu, cuda:0"):
        choose_device("cuda:0")
    broken.add(1)
    assert choose_device("auto", warnings.append) == torch.device("cpu")


def test_fault_finds_what_cannot_compute() -> None:
    assert fault(torch.device("cpu")) == ""
    assert "meta" in fault(torch.device("meta")).lower()


def test_described_is_what_a_process_without_torch_reads() -> None:
    assert described("cpu") == {"device": "cpu", "warnings": []}
    assert "must be auto, cpu" in described("tpu")["error"]
