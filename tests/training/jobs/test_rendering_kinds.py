"""Which kinds of rendering a job learns from."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.errors import FailedPrecondition, NotFound, Reason


@pytest.mark.parametrize("kind", ["PREFERENCE", "UNPAIRED", "PROMPT"])
async def test_create_and_plan_refuse_a_rendering_whose_rows_are_not_to_be_learnt_one_by_one(
    bench: Any, kind: str
) -> None:
    """Else both sides of a pair would be learnt, the rejected one too."""
    version = "projects/default/datasets/d/versions/v"
    bench.add_rendering(kind=f"RENDERING_KIND_{kind}", dataset_version=version)
    for refused in (bench.create("one"), bench.plan()):
        with pytest.raises(FailedPrecondition) as caught:
            await refused
        assert caught.value.reason == Reason.RENDERING_KIND_MISMATCH
        assert caught.value.message == (
            f"{bench.RENDERING} must be of kind SUPERVISED, it is of kind {kind}; create a rendering of {version} of "
            "kind SUPERVISED for this job"
        )
        assert caught.value.metadata == {"name": bench.RENDERING, "kind": kind}
    with pytest.raises(NotFound):
        await bench.job("projects/default/fineTuningJobs/one")
    bench.add_rendering(kind="RENDERING_KIND_SUPERVISED")
    await bench.create("one")
