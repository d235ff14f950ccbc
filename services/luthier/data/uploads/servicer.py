"""Uploads on the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from luthier.data.names import UPLOAD
from luthier.data.uploads.service import UploadService
from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.runtime.names import PROJECT
from luthier.runtime.paging import PageTokens
from luthier.v1 import data_service_pb2, upload_pb2
from luthier.work.standard_methods import StandardMethods

Context = grpc.aio.ServicerContext[Any, Any]


class UploadsServicer:
    """The uploads' part of DataService."""

    def __init__(self, uploads: UploadService, page_tokens: PageTokens) -> None:
        self._uploads = uploads
        standard = StandardMethods(pattern=UPLOAD, tokens=page_tokens)
        self.GetUpload = standard.get(uploads.get)
        self.ListUploads = standard.list(
            uploads.list_page,
            lambda found, token: data_service_pb2.ListUploadsResponse(uploads=found, next_page_token=token),
        )
        self.CancelUpload = standard.cancel(uploads.cancel)
        self.DeleteUpload = standard.delete(uploads.delete)
        self.UndeleteUpload = standard.undelete(uploads.undeleting)
        self.PurgeUpload = standard.purge(uploads.undeleting)

    async def StartUpload(
        self, request: data_service_pb2.StartUploadRequest, context: Context
    ) -> upload_pb2.Upload:
        """Announce a file."""
        PROJECT.parse(request.parent, field="parent")
        return await self._uploads.start(request)

    async def WriteUpload(
        self, request_iterator: AsyncIterator[data_service_pb2.WriteUploadRequest], context: Context
    ) -> upload_pb2.Upload:
        """Append chunks; a break, or the end of the process, loses at most the one under way."""
        turn = None
        name = ""
        async for request in request_iterator:
            if turn is None:
                name = request.name
                UPLOAD.parse(name)
                turn = self._uploads.turn(name)
            upload = await self._uploads.write(name, request)
            if request.finish:
                return upload
        if turn is None:
            description = "the first message must name the upload, got a stream without messages"
            violation = FieldViolation(field="name", description=description, reason=Reason.FIELD_REQUIRED)
            raise InvalidArgument.of_fields(violation)
        return await self._uploads.get(name)
