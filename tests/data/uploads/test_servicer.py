"""Uploads over a real port, by clients that break off."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, Reason
from luthier.v1 import data_service_pb2, upload_pb2

PROJECT = "projects/default"
MIB = 1 << 20

CLIENT = """
import sys, time, zlib, grpc
from luthier.v1 import data_service_pb2 as messages, data_service_pb2_grpc as services
address, key, name, path, offset, pause = sys.argv[1:]

def chunks():
    with open(path, "rb") as file:
        file.seek(int(offset))
        at = int(offset)
        while data := file.read(1 << 18):
            yield messages.WriteUploadRequest(name=name, offset=at, data=data, crc32=zlib.crc32(data))
            at += len(data)
            time.sleep(float(pause))
        yield messages.WriteUploadRequest(name=name, offset=at, finish=True)

with grpc.insecure_channel(address) as channel:
    stub = services.DataServiceStub(channel)
    print(stub.WriteUpload(chunks(), metadata=[("authorization", f"Bearer {key}")]).persisted_size_bytes)
"""


async def started(service: Any, size_bytes: int = 0, sha256: str = "") -> str:
    upload = upload_pb2.Upload(filename="a.jsonl", size_bytes=size_bytes, sha256=sha256)
    request = data_service_pb2.StartUploadRequest(parent=PROJECT, upload=upload)
    return str((await service.call("StartUpload", request)).name)


async def persisted(service: Any, name: str) -> int:
    upload = await service.call("GetUpload", data_service_pb2.GetUploadRequest(name=name))
    return int(upload.persisted_size_bytes)


async def write(service: Any, *requests: Any) -> Any:
    async def sent() -> AsyncIterator[Any]:
        for request in requests:
            yield request

    return await service.call("WriteUpload", sent())


def chunk(name: str, offset: int, data: bytes, **fields: Any) -> Any:
    values = {"crc32": zlib.crc32(data), **fields}
    return data_service_pb2.WriteUploadRequest(name=name, offset=offset, data=data, **values)


async def test_write_upload_resumes_byte_exact_after_the_client_was_killed(
    service: Any, tmp_path: Path
) -> None:
    data = random.Random(7).randbytes(5 * MIB + 12_345)
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    name = await started(service, len(data), hashlib.sha256(data).hexdigest())

    def client(offset: int, pause: float) -> subprocess.Popen[str]:
        arguments = [service.address, service.keys.api_key, name, str(path), str(offset), str(pause)]
        return subprocess.Popen([sys.executable, "-c", CLIENT, *arguments], stdout=subprocess.PIPE, text=True)

    offset = 0
    for _ in range(2):
        with client(offset, 0.05) as slow:
            goal = offset + MIB
            while await persisted(service, name) < goal:
                pass
            os.kill(slow.pid, signal.SIGKILL)
        offset = await persisted(service, name)
        assert goal <= offset < len(data)
    with client(offset, 0.0) as quick:
        output = await asyncio.to_thread(quick.communicate)
    assert int(output[0]) == len(data)
    done = await service.call("GetUpload", data_service_pb2.GetUploadRequest(name=name))
    assert done.state == upload_pb2.Upload.STATE_COMPLETE
    assert await service.blobs.read_bytes(hashlib.sha256(data).hexdigest()) == data


async def test_write_upload_with_a_wrong_checksum_keeps_what_came_before(service: Any) -> None:
    name = await started(service)
    with pytest.raises(InvalidArgument) as caught:
        await write(service, chunk(name, 0, b"good"), chunk(name, 4, b"bad", crc32=1))
    assert caught.value.reason == Reason.CHECKSUM_MISMATCH
    assert caught.value.message == (
        f"crc32: must be the CRC-32 of data, {zlib.crc32(b'bad'):#010x}, got 0x00000001; "
        "send the chunk at offset 4 again"
    )
    assert await persisted(service, name) == 4


async def test_write_upload_at_a_wrong_offset_keeps_what_came_before(service: Any) -> None:
    name = await started(service)
    with pytest.raises(InvalidArgument) as caught:
        await write(service, chunk(name, 0, b"good"), chunk("", 2, b"overlap"))
    assert caught.value.reason == Reason.OFFSET_MISMATCH
    assert caught.value.message == f"offset: must be 4, the persisted size of {name}, got 2"
    assert await persisted(service, name) == 4


async def test_write_upload_needs_the_name_of_an_upload_that_is_there(service: Any) -> None:
    with pytest.raises(InvalidArgument, match="name: the first message must name the upload"):
        await write(service)
    with pytest.raises(InvalidArgument) as caught:
        await write(service, chunk("", 0, b"x"))
    assert caught.value.reason == Reason.FIELD_REQUIRED
    with pytest.raises(NotFound):
        await write(service, chunk(f"{PROJECT}/uploads/nothing", 0, b"x"))


async def test_write_upload_that_ends_without_finish_stays_open(service: Any) -> None:
    name = await started(service)
    open_ = await write(service, chunk(name, 0, b"some"))
    assert (open_.state, open_.persisted_size_bytes) == (upload_pb2.Upload.STATE_RECEIVING, 4)
    done = await write(service, chunk(name, 4, b"", finish=True))
    assert done.state == upload_pb2.Upload.STATE_COMPLETE


async def listed(service: Any, **page: Any) -> Any:
    request = data_service_pb2.ListUploadsRequest(parent=page.pop("parent", PROJECT), **page)
    return await service.call("ListUploads", request)


async def test_uploads_are_listed_with_how_far_each_has_come(service: Any) -> None:
    begun, given_up = await started(service, size_bytes=9), await started(service)
    await write(service, chunk(begun, 0, b"some"))
    await service.call("CancelUpload", data_service_pb2.CancelUploadRequest(name=given_up))
    done = await service.uploaded(b"whole")
    await service.uploaded(b"theirs", parent="projects/second")
    State = upload_pb2.Upload.State
    found = [(one.name, one.state, one.persisted_size_bytes) for one in (await listed(service)).uploads]
    assert found == [
        (done, State.STATE_COMPLETE, 5),
        (given_up, State.STATE_CANCELLED, 0),
        (begun, State.STATE_RECEIVING, 4),
    ]
    for one in (await listed(service)).uploads:
        assert one == await service.call("GetUpload", data_service_pb2.GetUploadRequest(name=one.name))
    going_on = await listed(service, filter='state = "RECEIVING"')
    assert [one.name for one in going_on.uploads] == [begun]
    first = await listed(service, page_size=2, order_by="create_time")
    rest = await listed(service, page_size=2, order_by="create_time", page_token=first.next_page_token)
    assert [one.name for page in (first, rest) for one in page.uploads] == [begun, given_up, done]
    assert not rest.next_page_token
    await service.call("DeleteUpload", data_service_pb2.DeleteUploadRequest(name=given_up))
    assert given_up not in [one.name for one in (await listed(service)).uploads]


async def test_a_list_of_uploads_that_cannot_be_meant_is_refused(service: Any) -> None:
    for wrong, said in (
        ({"filter": 'labels.team = "a"'}, "filter"),
        ({"order_by": "size_bytes"}, "order_by"),
        ({"page_token": "x"}, "page_token"),
        ({"parent": "projects/default/uploads/u"}, "parent: must be projects/{project}"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            await listed(service, **wrong)
        assert said in caught.value.message


async def test_cancel_upload_removes_the_bytes_and_checks_state_and_etag(service: Any) -> None:
    name = await started(service)
    await write(service, chunk(name, 0, b"some"))
    cancel = data_service_pb2.CancelUploadRequest(name=name, etag='"9"')
    with pytest.raises(Aborted) as caught:
        await service.call("CancelUpload", cancel)
    assert caught.value.reason == Reason.ETAG_MISMATCH
    cancel.etag = ""
    cancelled = await service.call("CancelUpload", cancel)
    assert cancelled.state == upload_pb2.Upload.STATE_CANCELLED
    assert await persisted(service, name) == 0
    done = await service.uploaded(b"x")
    with pytest.raises(FailedPrecondition, match="is COMPLETE"):
        await service.call("CancelUpload", data_service_pb2.CancelUploadRequest(name=done))
