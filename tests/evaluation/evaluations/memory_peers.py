"""The other services in memory, with the models that the tests name."""

from __future__ import annotations

from dataclasses import dataclass, field

from luthier.errors import (
    NotFound,
)
from luthier.evaluation.asking import Taught
from luthier.evaluation.evaluations.service import ModelFacts, VersionFacts

PARENT = "projects/default"
BASE, TUNED, OTHER = (f"{PARENT}/models/{name}" for name in ("base", "tuned", "other"))
VERSION = f"{PARENT}/datasets/d/versions/v"


@dataclass
class MemoryPeers:
    """The other services, as far as evaluations ask them."""

    state: dict[str, str] = field(default_factory=dict)
    taught: dict[str, Taught] = field(default_factory=dict)
    templates: bool = True

    async def version(self, name: str) -> VersionFacts:
        state = self.state.get(name, "READY")
        return VersionFacts(
            name=name, ready=state == "READY", state=state, digest="dv", num_records={"TEST": 3, "TRAIN": 9}
        )

    async def model(self, name: str) -> ModelFacts:
        known = {BASE: "", TUNED: BASE, OTHER: ""}
        if name not in known:
            raise NotFound(f"{name} does not exist")
        state = self.state.get(name, "READY")
        return ModelFacts(
            name=name,
            ready=state == "READY",
            state=state,
            digest=f"digest-{name.rsplit('/', 1)[-1]}",
            base_model=known[name],
            has_chat_template=self.templates,
            taught=self.taught.get(name),
        )
