"""Pages of large resources."""

from __future__ import annotations

from luthier.v1.model_pb2 import Model, Taught
from luthier.v1.model_service_pb2 import ListModelsRequest, ListModelsResponse
from luthier.work.listing import PAGE_BYTES, page_that_fits


async def test_page_that_fits_holds_fewer_of_what_is_large_and_one_at_least() -> None:
    asked: list[int] = []

    async def page(size: int) -> ListModelsResponse:
        async def read(request: ListModelsRequest) -> tuple[ListModelsResponse, int]:
            asked.append(request.page_size)
            large = Model(taught=Taught(chat_template="x" * size))
            return ListModelsResponse(models=[large] * min(request.page_size, 40)), min(request.page_size, 40)

        request = ListModelsRequest(page_size=1000)
        found = await page_that_fits(request, read)
        assert request.page_size == 1000
        return found

    assert len((await page(1 << 10)).models) == 40
    assert len((await page(1 << 18)).models) == 7
    assert (await page(1 << 18)).ByteSize() <= PAGE_BYTES
    assert len((await page(PAGE_BYTES + 1)).models) == 1
    assert asked[:1] == [1000]
