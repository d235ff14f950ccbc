"""Models of a site, asked without its service, and a reward model among them."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.evaluation.here import NO_ROOM, Here
from tests.evaluation.peer_servers import digest_of
from tests.evaluation.tiny_models import write_adapter

from luthier.evaluation.worker.loaded_model import LoadedModel
from luthier.evaluation.worker.models import Models
from luthier.evaluation.worker.room import Room
from luthier.lm.adapter_files import SCORE_KEY
from luthier.runtime.auth import TaskTokens
from luthier.v1.model_pb2 import Model
from luthier.work.cache import BlobCache
from luthier.work.retry import Token
from luthier.worker.v1 import task_pb2


class Bench:
    """Models of a site, with a token for all of them."""

    def __init__(self, site: Any) -> None:
        self.site = site
        self.folder = site.home / "laid-out"
        site.models.folders = dict(site.models.folders)  # the session's own stay as they are
        token = TaskTokens(site.keys.token_secret).mint("default", (site.PARENT,), 1, "t", 600)
        self.token: Token = lambda: token
        self._lock = threading.Lock()

    def models(self, room: Room = NO_ROOM) -> Models:
        cache = BlobCache(self.site.home / "cache", 1 << 30)
        return Models(self.site.peers_address, cache, self.folder, Here, room)

    def reference(self, name: str, digest: str = "") -> task_pb2.ModelReference:
        return task_pb2.ModelReference(
            name=f"{self.site.PARENT}/models/{name}",
            digest=digest or digest_of(self.site.models.folders[name]),
        )

    @contextmanager
    def adapter(self, models: Models, loaded: LoadedModel, number: int) -> Iterator[str]:
        """One of many adapters, which differ by a file that says their number."""
        wanted = f"tuned-{number}"
        with self._lock:
            if wanted not in self.site.models.folders:
                self.site.models.folders[wanted] = self._numbered(wanted)
        with models.adapter(loaded, self.reference(wanted), self.token) as name:
            assert name is not None
            yield name

    def _numbered(self, name: str) -> Path:
        folder: Path = self.site.home / name
        shutil.copytree(self.site.models.folders["tuned"], folder)
        (folder / "number").write_text(name)
        return folder


@pytest.fixture
def bench(site: Any) -> Bench:
    return Bench(site)


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path]) -> Path:
    """A random adapter of the base model with a random head."""
    folder = tmp_path_factory.mktemp("judge") / "tuned-judge"
    write_adapter(model_folders["base"], folder, 5)
    weights = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(5)
    weights[SCORE_KEY] = torch.randn((1, 32), generator=generator)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["score"]}))
    return folder


@pytest.fixture
def judged(site: Any, judge_folder: Path) -> Any:
    """A site that has a reward model, `tuned-judge`."""
    site.models.folders = {**site.models.folders, "tuned-judge": judge_folder}
    site.models.kinds["tuned-judge"] = Model.KIND_REWARD
    return site
