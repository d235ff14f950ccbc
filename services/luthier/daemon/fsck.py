"""Check what the services of a home keep: every reference has its blob, every blob its reference, digests hold.

And what is worked for holds the resources that it is made from, and no row holds one for what is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from luthier.data import needs as data_needs
from luthier.data import schema as data_schema
from luthier.data.config import Config as DataConfig
from luthier.errors import FailedPrecondition
from luthier.evaluation import needs as evaluation_needs
from luthier.evaluation import schema as evaluation_schema
from luthier.evaluation.config import Config as EvaluationConfig
from luthier.runtime.config import read
from luthier.storage.dialect import file_of
from luthier.storage.migrations import require_current
from luthier.storage.opening import open_readers, store_urls
from luthier.training import needs as training_needs
from luthier.training import schema as training_schema
from luthier.training.config import Config as TrainingConfig
from luthier.work import schema as work_schema
from luthier.work.blob_check import BlobCheck, Checked, Fault
from luthier.work.blob_needs import Needs
from luthier.work.hold_check import Holder, hold_faults
from luthier.work.ownership import require_own

_CONFIGS = {"data": DataConfig, "training": TrainingConfig, "evaluation": EvaluationConfig}
_MIGRATIONS: Mapping[str, Path] = {
    "data": data_schema.MIGRATIONS,
    "training": training_schema.MIGRATIONS,
    "evaluation": evaluation_schema.MIGRATIONS,
}
_NEEDS: Mapping[str, Needs] = {
    "data": data_needs.needs,
    "training": training_needs.needs,
    "evaluation": evaluation_needs.needs,
}
_HOLDERS: Mapping[str, Sequence[Holder]] = {
    "data": data_needs.HOLDERS,
    "training": training_needs.HOLDERS,
    "evaluation": evaluation_needs.HOLDERS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Something of a service: a fault, or once all its faults are told what was looked at."""

    service: str
    fault: Fault | None = None
    checked: Checked | None = None


async def check(home: Path, services: Collection[str], *, reads: bool) -> AsyncIterator[Found]:
    """Yield what is found of the services of a home, which may run meanwhile. With `reads` every byte is hashed.

    No file is changed. Raises FailedPrecondition where a service has no state there, or state of another version,
    or blobs that are another's; Unavailable where a service starts meanwhile.
    """
    for service in services:
        config: DataConfig | TrainingConfig | EvaluationConfig
        config = read(_CONFIGS[service], section=service.upper())
        urls = store_urls(home / service, config.database_url, config.blobs_url)
        path = file_of(urls.database)
        if not path.is_file():
            raise FailedPrecondition(
                f"{path} must be the {service} service's database, there is none; set LUTHIER_HOME to a home where "
                f"it has run, or leave it out with --service",
                metadata={"path": str(path)},
            )
        migrations = (work_schema.MIGRATIONS, _MIGRATIONS[service])
        await asyncio.to_thread(require_current, urls.database, migrations)
        stores = open_readers(urls)
        try:
            await require_own(stores.database, stores.blobs, service)
            checking = BlobCheck(
                database=stores.database,
                blobs=stores.blobs,
                needs=_NEEDS[service],
                grace_seconds=config.blob_grace_seconds,
                reads=reads,
            )
            async for fault in checking.faults():
                yield Found(service=service, fault=fault)
            async with stores.database.reading() as connection:
                held = [fault async for fault in hold_faults(connection, _HOLDERS[service])]
            for fault in held:
                yield Found(service=service, fault=fault)
            yield Found(service=service, checked=checking.checked)
        finally:
            await stores.database.close()


def json_of(found: Found) -> dict[str, object]:
    """Return what a program reads: `what` is fault or checked."""
    if found.fault is not None:
        return {"service": found.service, "what": "fault", **asdict(found.fault)}
    assert found.checked is not None, "a fault, or what was looked at"
    return {"service": found.service, "what": "checked", **asdict(found.checked)}


def line_of(found: Found) -> str:
    """Return what a person reads."""
    if found.fault is not None:
        fault = found.fault
        about = ", ".join(one for one in (fault.digest, fault.who) if one)
        return f"{found.service:<11}{fault.kind:<11}{about}: {fault.text}"
    assert found.checked is not None, "a fault, or what was looked at"
    checked = found.checked
    return (
        f"{found.service:<11}checked    {checked.num_needs} references, {checked.num_blobs} blobs of "
        f"{checked.num_bytes} bytes; {checked.num_loose} of {checked.loose_bytes} bytes wait to be collected"
    )
