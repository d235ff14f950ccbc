"""What tuned models learnt from, as far back as they go on from one another."""

from __future__ import annotations

from dataclasses import dataclass, field

from luthier.errors import NotFound
from luthier.evaluation.lineage import learnt_from
from luthier.v1.dataset_pb2 import DatasetVersion
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, RenderingShare
from luthier.v1.model_pb2 import Model
from luthier.v1.reference_pb2 import Reference
from luthier.v1.rendering_pb2 import Rendering


@dataclass
class MemoryOrigins:
    """The other services in memory; a resource's uid is its name and a number."""

    found: dict[str, object] = field(default_factory=dict)

    def add(self, one: object, number: int = 1) -> None:
        one.uid = f"{one.name}#{number}"  # type: ignore[attr-defined]
        self.found[one.name] = one  # type: ignore[attr-defined]

    def _get(self, name: str) -> object:
        if name not in self.found:
            raise NotFound(f"{name} does not exist")
        return self.found[name]

    async def model(self, name: str) -> Model:
        return self._get(name)  # type: ignore[return-value]

    async def job(self, name: str) -> FineTuningJob:
        return self._get(name)  # type: ignore[return-value]

    async def rendering(self, name: str) -> Rendering:
        return self._get(name)  # type: ignore[return-value]

    async def version(self, name: str) -> DatasetVersion:
        return self._get(name)  # type: ignore[return-value]


def reference(name: str, number: int = 1) -> Reference:
    return Reference(name=name, uid=f"{name}#{number}")


def tuned(
    origins: MemoryOrigins, name: str, versions: list[str], base: str = "base", start_from: str = ""
) -> Model:
    """Add a model, its job, and a rendering of each version."""
    job = f"job-{name}"
    renderings = [f"r-{version}" for version in versions]
    model = Model(
        name=name, base_model=base, fine_tuning_job=job, start_from=start_from, references=[reference(job)]
    )
    origins.add(model)
    mixed = [RenderingShare(rendering=one) for one in renderings[1:]]
    origins.add(
        FineTuningJob(
            name=job,
            rendering=renderings[0],
            mixed_renderings=mixed,
            references=[reference(one) for one in renderings],
        )
    )
    for version, rendering in zip(versions, renderings, strict=True):
        origins.add(Rendering(name=rendering, dataset_version=version, references=[reference(version)]))
        origins.add(DatasetVersion(name=version, digest=f"digest of {version}"))
    return model


def origins_with_base() -> MemoryOrigins:
    origins = MemoryOrigins()
    origins.add(Model(name="base"))
    return origins


async def test_all_renderings_of_all_models_lead_to_their_versions() -> None:
    origins = origins_with_base()
    first = tuned(origins, "first", ["a", "b"])
    second = tuned(origins, "second", ["c"], start_from="first")
    found = await learnt_from([second], origins)
    assert {one.name: (one.uid, one.digest) for one in found.versions} == {
        name: (f"{name}#1", f"digest of {name}") for name in ("a", "b", "c")
    }
    assert found.unknown == ()
    assert {one.name for one in (await learnt_from([first], origins)).versions} == {"a", "b"}


async def test_a_base_that_was_tuned_itself_is_followed() -> None:
    origins = origins_with_base()
    tuned(origins, "whole", ["a"], base="")
    adapter = tuned(origins, "adapter", ["b"], base="whole")
    assert {one.name for one in (await learnt_from([adapter], origins)).versions} == {"a", "b"}


async def test_models_that_go_on_from_each_other_are_followed_once() -> None:
    origins = origins_with_base()
    one = tuned(origins, "one", ["a"], start_from="two")
    tuned(origins, "two", ["b"], start_from="one")
    assert len((await learnt_from([one, one], origins)).versions) == 2


async def test_what_is_gone_or_another_one_makes_the_model_unknown_and_keeps_the_rest() -> None:
    for gone in ("job-second", "r-c", "c", "first"):
        origins = origins_with_base()
        tuned(origins, "first", ["a"])
        second = tuned(origins, "second", ["c"], start_from="first")
        other = tuned(origins, "other", ["d"])
        del origins.found[gone]
        found = await learnt_from([second, other], origins)
        assert found.unknown == ("second",), gone
        assert "d" in {one.name for one in found.versions}
    origins = origins_with_base()
    model = tuned(origins, "model", ["a"])
    origins.add(DatasetVersion(name="a", digest="new"), number=2)
    assert (await learnt_from([model], origins)).unknown == ("model",)


async def test_a_model_that_took_over_an_ancestors_name_is_not_followed() -> None:
    origins = origins_with_base()
    tuned(origins, "first", ["a"])
    second = tuned(origins, "second", ["c"], start_from="first")
    second.references.append(reference("first"))
    tuned(origins, "first", ["foreign"])
    origins.add(origins.found["first"], number=2)
    found = await learnt_from([second], origins)
    assert {one.name for one in found.versions} == {"c"}
    assert found.unknown == ("second",)


async def test_a_base_that_is_gone_keeps_nobody_from_following_what_the_model_went_on_from() -> None:
    origins = origins_with_base()
    tuned(origins, "first", ["a"], base="there")
    origins.add(Model(name="there"))
    second = tuned(origins, "second", ["c"], start_from="first")
    del origins.found["base"]
    found = await learnt_from([second], origins)
    assert {one.name for one in found.versions} == {"a", "c"}
    assert found.unknown == ("second",)


async def test_an_adapter_that_no_job_tuned_is_unknown() -> None:
    origins = origins_with_base()
    assert (await learnt_from([Model(name="x", base_model="base")], origins)).unknown == ("x",)
    assert await learnt_from([], origins) == await learnt_from([Model(name="base")], origins)
