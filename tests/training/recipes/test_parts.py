"""Parts of tensors in files: of any number of ranks, read whole or by parts, and refused where one is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.training.recipes.crews import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from luthier.errors import DataLoss
from luthier.training.recipes import parts
from luthier.training.recipes.collective import Collective
from luthier.training.recipes.parts import is_part, part_files, read_parts, write_parts

WHOLE: Mapping[str, Tensor] = {
    "even": torch.arange(24.0).view(6, 4),
    "odd.weight": torch.arange(21.0).view(7, 3),
    "short": torch.arange(2.0),
    "wide": torch.arange(10.0).bfloat16(),
}


def divided(collective: Collective, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (collective.num_ranks,))
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        chunks = torch.chunk(tensor, collective.num_ranks)
        is_there = collective.rank < len(chunks)
        part = chunks[collective.rank] if is_there else tensor[:0]
        placed = DTensor.from_local(
            part.clone(), mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
        found[name] = placed
    return found


def write(folder: Path, num_ranks: int) -> None:
    def work(collective: Collective) -> int:
        return len(write_parts(folder, "some", divided(collective, WHOLE), collective.rank))

    folder.mkdir(parents=True)
    assert min(on_ranks(num_ranks, folder / "meeting", work)) >= 1


def zeros() -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()}


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_parts_are_read_whole_and_by_other_parts(num_ranks: int, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    write(folder, num_ranks)
    files = part_files(folder, "some")
    assert len(files) == num_ranks
    assert all(is_part(path.name, "some") and not is_part(path.name, "other") for path in files)
    assert part_files(folder, "other") == []
    found = zeros()
    read_parts(files, found)
    assert all(torch.equal(found[name], tensor) for name, tensor in WHOLE.items())

    def work(collective: Collective) -> bool:
        read, wanted = divided(collective, zeros()), divided(collective, WHOLE)
        read_parts(files, read)
        return all(torch.equal(read[name].to_local(), wanted[name].to_local()) for name in WHOLE)  # type: ignore[attr-defined]

    assert on_ranks(5 - num_ranks, tmp_path / "meeting", work) == [True] * (5 - num_ranks)


def test_a_file_of_whole_tensors_is_one_part(tmp_path: Path) -> None:
    save_file(dict(WHOLE), tmp_path / "whole.safetensors")
    found = zeros()
    read_parts([tmp_path / "whole.safetensors"], found)
    assert all(torch.equal(found[name], tensor) for name, tensor in WHOLE.items())


def test_large_parts_are_in_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_FILE_BYTES", 100)
    written = write_parts(tmp_path, "some", WHOLE, 4)
    assert [path.name for path in written] == [
        f"some-part-00004-0000{number}.safetensors" for number in range(3)
    ]
    found = zeros()
    read_parts(written, found)
    assert all(torch.equal(found[name], tensor) for name, tensor in WHOLE.items())
    assert write_parts(tmp_path, "none", {}, 0) == []


def test_however_large_a_model_is_there_are_not_many_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that has more than 1,000 would be refused when all of it is written."""
    monkeypatch.setattr(parts, "_FILE_BYTES", 100)
    monkeypatch.setattr(parts, "_MOST_FILES", 4)
    many = {f"weight-{number:02d}": torch.full((100,), float(number)) for number in range(40)}
    written = write_parts(tmp_path, "some", many, 0)
    assert len(written) == 4
    found = {name: torch.zeros(100) for name in many}
    read_parts(written, found)
    assert all(torch.equal(found[name], tensor) for name, tensor in many.items())


def test_equal_parts_have_equal_bytes(tmp_path: Path) -> None:
    """What safetensors says of a file has another order each time."""
    found = set()
    for number in range(8):
        (tmp_path / f"{number}").mkdir()
        found.add(write_parts(tmp_path / f"{number}", "some", WHOLE, 0)[0].read_bytes())
    assert len(found) == 1


def _without_a_rank(files: list[Path]) -> list[Path]:
    return files[:1] + files[2:]


def _of_nobody(_: list[Path]) -> list[Path]:
    return []


def _unreadable(files: list[Path]) -> list[Path]:
    files[1].write_bytes(b"no tensors")
    return files


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_a_rank, "must hold the tensors of this run, each whole, they do not of"),
        (_of_nobody, "must have the files of every rank that wrote it, got none"),
        (_unreadable, "cannot be read"),
    ],
)
def test_files_that_lack_a_part_are_refused(
    spoil: Callable[[list[Path]], list[Path]], message: str, tmp_path: Path
) -> None:
    """The middle one of three: the tensors' sizes are what they were."""
    write(tmp_path / "parts", 3)
    with pytest.raises(DataLoss, match=message):
        read_parts(spoil(part_files(tmp_path / "parts", "some")), zeros())


@pytest.mark.parametrize("name", ["even", "more"])
def test_files_of_other_tensors_are_refused(name: str, tmp_path: Path) -> None:
    save_file(dict(WHOLE), tmp_path / "whole.safetensors")
    others = zeros() | {name: torch.zeros(5, 4)}
    with pytest.raises(DataLoss, match=f"they do not of 1: {name}"):
        read_parts([tmp_path / "whole.safetensors"], others)
    wider = zeros() | {"wide": torch.zeros(10)}
    with pytest.raises(DataLoss, match="they do not of 1: wide"):
        read_parts([tmp_path / "whole.safetensors"], wider)
