"""Divergences of two models, all words counted, against what torch makes of their logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.evaluation.tiny_models import write_adapter, write_base

from luthier.errors import InvalidArgument
from luthier.lm.adapter_files import load_adapter
from luthier.lm.divergence import divergences, write_distributions
from luthier.lm.load import load_model
from luthier.lm.lora import use_adapter

SEQUENCES = [list(range(3, 60)), [7], list(range(100, 150))]
MASKS = [[at > 5 for at in range(57)], [True], [at % 3 == 0 for at in range(50)]]
NUM_TOKENS = [51, 0, 16]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_base(root / "base", 0)
    write_base(root / "other", 1)
    write_adapter(root / "base", root / "tuned", 2)
    return root


def logprobs(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)


def test_a_model_does_not_differ_from_itself(folders: Path, tmp_path: Path) -> None:
    model = load_model(folders / "base")
    write_distributions(model, SEQUENCES, MASKS, tmp_path / "kept")
    found = divergences(model, SEQUENCES, MASKS, tmp_path / "kept")
    assert [one.num_tokens for one in found] == NUM_TOKENS
    assert [one.nats for one in found] == pytest.approx([0.0] * 3, abs=1e-5)


def test_it_is_torchs_of_the_same_logits_and_not_the_other_way_round(folders: Path, tmp_path: Path) -> None:
    base, other = load_model(folders / "base"), load_model(folders / "other")
    write_distributions(base, SEQUENCES, MASKS, tmp_path / "kept")
    found = divergences(other, SEQUENCES, MASKS, tmp_path / "kept")
    for ids, mask, one in zip(SEQUENCES, MASKS, found, strict=True):
        places = [at - 1 for at in range(1, len(ids)) if mask[at]]
        p, q = (logprobs(model, ids)[places] for model in (base, other))
        assert one.nats == pytest.approx(float((p.exp() * (p - q)).sum()), rel=0.05, abs=1e-6)
    write_distributions(other, SEQUENCES, MASKS, tmp_path / "turned")
    turned = divergences(base, SEQUENCES, MASKS, tmp_path / "turned")
    assert turned[0].nats != pytest.approx(found[0].nats, rel=0.01)


def test_an_adapter_differs_from_its_base(folders: Path, tmp_path: Path) -> None:
    model = load_model(folders / "base")
    load_adapter(model, folders / "tuned", "tuned")
    with use_adapter(model, None):
        write_distributions(model, SEQUENCES, MASKS, tmp_path / "kept")
        same = divergences(model, SEQUENCES, MASKS, tmp_path / "kept")
    with use_adapter(model, "tuned"):
        found = divergences(model, SEQUENCES, MASKS, tmp_path / "kept")
    assert same[0].nats == pytest.approx(0.0, abs=1e-5)
    assert found[0].nats > 0.01


def test_a_file_of_other_tokens_is_refused(folders: Path, tmp_path: Path) -> None:
    model = load_model(folders / "base")
    write_distributions(model, SEQUENCES[:1], MASKS[:1], tmp_path / "kept")
    with pytest.raises(
        InvalidArgument, match=r"distributions of 67 tokens over 400 words must have 107200 bytes"
    ):
        divergences(model, SEQUENCES, MASKS, tmp_path / "kept")
    assert divergences(model, SEQUENCES[1:2], MASKS[1:2], _empty(tmp_path))[0].num_tokens == 0


def _empty(folder: Path) -> Path:
    (folder / "empty").touch()
    return folder / "empty"
