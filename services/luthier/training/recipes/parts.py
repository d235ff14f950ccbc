"""Parts of tensors in files, by torch.distributed.checkpoint: each rank writes what it holds, and any number read it.

The files are safetensors that say of each tensor where in the whole it belongs. A file of whole tensors is read as one
of a single part. Each rank writes by itself, so that nobody waits for another.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from luthier.errors import DataLoss

_SAID = "__metadata__"
_FILE_BYTES = 256 << 20
"""Of a file, all of which is held twice while it is written."""
_MOST_FILES = 200
"""Of all ranks together, but for each rank's last one: a checkpoint has 1,000 at most, masters and moments in them."""


def part_files(folder: Path, stem: str) -> list[Path]:
    """Return the files in a folder that `write_parts` wrote, those of all ranks."""
    return sorted(folder.glob(f"{stem}-part-*.safetensors"))


def is_part(name: str, stem: str) -> bool:
    """Whether a file of this name is one that `write_parts` wrote."""
    return name.startswith(f"{stem}-part-")


def write_parts(folder: Path, stem: str, tensors: Mapping[str, Tensor], rank: int) -> list[Path]:
    """Write what a rank holds of tensors, DTensors or whole ones, into a folder; returns the files.

    A whole one should be written by one rank alone. Takes twice the memory of one file, which is 256 MiB, or the 200th
    part of all tensors, or the largest part.
    """
    if not tensors:
        return []
    written = []
    with tempfile.TemporaryDirectory(dir=folder) as aside, _quiet():
        writer = HuggingFaceStorageWriter(
            aside, fqn_to_index_mapping=_numbered(tensors), save_distributed=True
        )
        save(dict(tensors), storage_writer=writer, planner=_Own(), no_dist=True)
        for number, path in enumerate(sorted(Path(aside).iterdir())):
            _order_header(path)
            written.append(path.replace(folder / f"{stem}-part-{rank:05d}-{number:05d}.safetensors"))
    return written


def read_parts(files: Sequence[Path], into: Mapping[str, Tensor]) -> None:
    """Read tensors, DTensors or whole ones, from the files of all ranks that wrote them, in place.

    Raises:
        DataLoss: the files do not hold exactly these tensors, each whole.
    """
    if not files:
        raise DataLoss("a checkpoint must have the files of every rank that wrote it, got none")
    with tempfile.TemporaryDirectory(dir=files[0].parent) as folder, _quiet():
        for number, file in enumerate(files):
            (Path(folder) / f"{number}.safetensors").symlink_to(file.resolve())
        reader = HuggingFaceStorageReader(folder)
        # What safetensors raises is a class of its own for some files, and the system's for others.
        try:
            found = reader.read_metadata()
        except Exception as error:
            raise DataLoss(f"{files[0].name} and the others cannot be read: {error}") from error
        _require(found, into, files)
        load({name: tensor.detach() for name, tensor in into.items()}, storage_reader=reader, no_dist=True)


class _Own(DefaultSavePlanner):
    """A plan of one rank, where torch's would miss the parts of the others."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return the plan itself: files say themselves what they hold."""
        self.global_plan, self.metadata = all_plans, Metadata(state_dict_metadata={})
        return self.global_plan, self.metadata


def _order_header(path: Path) -> None:
    """Bring what a file says of itself into one order: safetensors has it in any, and equal parts have equal bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header[_SAID] = dict(sorted(header[_SAID].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the same words in another order"
        file.seek(8)
        file.write(text.ljust(length))


def _numbered(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return into which file each tensor goes, from 1."""
    numbers, number, held = {}, 1, 0
    # Of a DTensor that of all ranks together.
    whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    file_bytes = max(_FILE_BYTES, whole // _MOST_FILES)
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if held and held + local.nbytes > file_bytes:
            number, held = number + 1, 0
        held += local.nbytes
        numbers[name] = number
    return numbers


def _require(found: Metadata, wanted: Mapping[str, Tensor], files: Sequence[Path]) -> None:
    kept: Mapping[str, Any] = found.state_dict_metadata
    differing = sorted(
        name
        for name in kept.keys() | wanted.keys()
        if name not in kept or name not in wanted or not _is_whole(kept[name], wanted[name])
    )
    if differing:
        raise DataLoss(
            f"{files[0].name} and the {len(files) - 1} files beside it must hold the tensors of this run, each whole, "
            f"they do not of {len(differing)}: {differing[0]}"
        )


def _is_whole(kept: TensorStorageMetadata, wanted: Tensor) -> bool:
    held = sum(math.prod(chunk.sizes) for chunk in kept.chunks)
    is_alike = kept.size == wanted.shape and kept.properties.dtype == wanted.dtype
    return is_alike and held == wanted.numel()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from saying that ranks write by themselves, which is meant."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    finally:
        logger.setLevel(level)
