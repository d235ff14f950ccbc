"""What makes room works on a disk without any: every way to cancel and to delete, of every service."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from tests.e2e.conftest import path_of
from tests.e2e.test_fuzz import GOLDEN, METHODS, Sites, served
from tests.golden.home_files import unpack_home
from tests.small_disk import fill, fill_again, mounted

from luthier.errors import Reason
from luthier.storage.disk import Disk
from luthier.v1 import data_service_pb2, evaluation_service_pb2, model_service_pb2, upload_pb2
from luthier.work.peers import error_of

MIB = 1 << 20
PARENT = "projects/default"
MAKES_ROOM = {
    method.name: (service, method)
    for service, method in METHODS
    if re.match("Cancel|Delete|Purge|Pause", method.name)
}
ENDS = {
    "uploads/{upload}": ("CancelUpload", "DeleteUpload", "PurgeUpload"),
    "datasets/empty/versions/queued": ("CancelDatasetVersion", "DeleteDatasetVersion", "PurgeDatasetVersion"),
    "renderings/queued": ("CancelRendering", "DeleteRendering", "PurgeRendering"),
    "datasets/made": ("DeleteDataset", "PurgeDataset"),
    "fineTuningJobs/queued": (
        *("PauseFineTuningJob", "CancelFineTuningJob"),
        *("DeleteFineTuningJob", "PurgeFineTuningJob"),
    ),
    "models/made": ("CancelModel", "DeleteModel", "PurgeModel"),
    "evaluations/queued": ("CancelEvaluation", "DeleteEvaluation", "PurgeEvaluation"),
    "modelAliases/made": ("DeleteModelAlias",),
}
"""How each kind of resource goes, one step after another."""


def requests_that_create(name: str) -> dict[str, Message]:
    """Return what makes something new at each service, by the method's name."""
    model = model_service_pb2.RegisterBaseModelRequest(parent=PARENT, model_id=name)
    model.model.hub.repo_id = "a/b"
    return {
        "CreateDataset": data_service_pb2.CreateDatasetRequest(parent=PARENT, dataset_id=name),
        "RegisterBaseModel": model,
        "CreateModelAlias": evaluation_service_pb2.CreateModelAliasRequest(
            parent=PARENT, model_alias_id=name
        ),
    }


async def call(sites: Sites, name: str, request: Message) -> bytes:
    service, method = next((service, method) for service, method in METHODS if method.name == name)
    return await sites.call(service, path_of(method), request.SerializeToString(), sites.keys.api_key)


async def made(sites: Sites) -> str:
    """Make what is to go and is not in the golden home; return the id of an upload that has a byte of five."""
    for name, request in requests_that_create("made").items():
        await call(sites, name, request)
    upload = upload_pb2.Upload(filename="a.jsonl", size_bytes=5)
    start = data_service_pb2.StartUploadRequest(parent=PARENT, upload=upload)
    return upload_pb2.Upload.FromString(await call(sites, "StartUpload", start)).name.rpartition("/")[2]


async def require_refused(sites: Sites) -> None:
    for name, request in requests_that_create("late").items():
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(sites, name, request)
        assert error_of(caught.value).reason == Reason.DISK_FULL, name


async def test_every_way_to_cancel_and_to_delete_works_on_a_full_disk(tmp_path: Path) -> None:
    assert sorted(name for steps in ENDS.values() for name in steps) == sorted(MAKES_ROOM)
    with mounted(tmp_path / "roomy", 128) as folder:
        home = folder / "home"
        home.mkdir(mode=0o700)
        await asyncio.to_thread(unpack_home, GOLDEN, home)
        async with served(home, min_free_bytes=64 * MIB) as sites:
            upload = await made(sites)
            fill(folder)
            for resource, name in [(resource, name) for resource, steps in ENDS.items() for name in steps]:
                fill_again(folder)
                assert Disk(folder).free_bytes() == 0
                kind: Any = GetMessageClass(MAKES_ROOM[name][1].input_type)
                await call(sites, name, kind(name=f"{PARENT}/{resource.format(upload=upload)}"))
            fill_again(folder)
            await require_refused(sites)
