"""A device asked for by name is the one taken, or none is. There is no GPU here: torch is told of some."""

import pytest
import torch

from luthier.errors import InvalidArgument
from luthier.lm.device import choose_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    count: int = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU model {index}")


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
    ],
    indirect=["gpus"],
)
@pytest.mark.usefixtures("gpus")
def test_choose_device_refuses_what_is_not_there_and_names_what_is(wanted: str, there: str) -> None:
    with pytest.raises(InvalidArgument, match=there):
        choose_device(wanted)
