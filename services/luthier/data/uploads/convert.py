"""Uploads between the wire and values."""

from __future__ import annotations

from luthier.data.convert import set_time
from luthier.data.uploads.domain import Chunk, Upload
from luthier.v1 import data_service_pb2, upload_pb2


def upload_to_proto(upload: Upload) -> upload_pb2.Upload:
    """Write an upload."""
    message = upload_pb2.Upload(
        name=upload.name,
        uid=upload.uid,
        state=upload_pb2.Upload.State.Value(f"STATE_{upload.state}"),
        filename=upload.filename,
        size_bytes=upload.size_bytes,
        sha256=upload.sha256,
        persisted_size_bytes=upload.persisted_size_bytes,
        etag=f'"{upload.revision}"',
    )
    set_time(message.create_time, upload.create_time)
    set_time(message.update_time, upload.update_time)
    return message


def chunk_from_proto(message: data_service_pb2.WriteUploadRequest) -> Chunk:
    """Read a chunk."""
    return Chunk(offset=message.offset, data=message.data, crc32=message.crc32, finish=message.finish)
