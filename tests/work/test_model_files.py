"""A model's files through absences and breaks: fetched with a token of now, given up within a second."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from luthier.errors import Cancelled, DataLoss, PermissionDenied, Reason, Unavailable
from luthier.runtime.digests import files_digest
from luthier.v1 import model_pb2, model_service_pb2, model_service_pb2_grpc
from luthier.work.cache import BlobCache
from luthier.work.model_files import fetch_model
from luthier.work.peers import channel
from luthier.worker.v1.task_pb2 import ModelReference

DATA = bytes(range(256)) * 40
SHA256 = hashlib.sha256(DATA).hexdigest()
MODEL = ModelReference(name="models/m", digest=files_digest({"weights": SHA256}))
PIECE = 1024


class Service(model_service_pb2_grpc.ModelServiceServicer):
    """One model, its files alike, listed one a page; `meets` says what a call meets, by method and number."""

    def __init__(self) -> None:
        self.meets: dict[tuple[str, int], str] = {}
        self.calls: list[tuple[str, str, int]] = []
        self.paths: tuple[str, ...] = ("weights",)
        self.began, self.ending = threading.Event(), threading.Event()

    def ListModelFiles(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._meet("list", 0, context)
        number = int(request.page_token or 0)
        file = model_pb2.ModelFile(path=self.paths[number], size_bytes=len(DATA), sha256=SHA256)
        following = str(number + 1) if number + 1 < len(self.paths) else ""
        return model_service_pb2.ListModelFilesResponse(files=[file], next_page_token=following)

    def DownloadModelFile(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        for offset in range(request.start_offset, len(DATA), PIECE):
            if offset in (request.start_offset, 4 * PIECE):
                self._meet("download", offset, context)
            yield model_service_pb2.DownloadModelFileResponse(
                offset=offset, data=DATA[offset : offset + PIECE]
            )

    def _meet(self, method: str, offset: int, context: Any) -> None:
        (token,) = [value for key, value in context.invocation_metadata() if key == "authorization"]
        self.calls.append((method, token.removeprefix("Bearer "), offset))
        self.began.set()
        what = self.meets.get((method, offset), "")
        if what == "hangs":
            self.ending.wait(60)
        elif what:
            self.meets.pop((method, offset))
            context.abort(grpc.StatusCode[what], "told")


@pytest.fixture
def service() -> Iterator[Service]:
    serving = Service()  # type: ignore[abstract]
    yield serving
    serving.ending.set()


@contextmanager
def connected(service: Service) -> Iterator[grpc.Channel]:
    server = grpc.server(futures.ThreadPoolExecutor(8))
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with channel(f"127.0.0.1:{port}") as opened:
            yield opened
    finally:
        service.ending.set()
        server.stop(None).wait()


def fetch(
    opened: grpc.Channel, folder: Path, token: Callable[[], str], check: Callable[[], None] = lambda: None
) -> bytes:
    cache = BlobCache(folder / "cache", 1 << 30)
    return (fetch_model(opened, token, MODEL, cache, folder / "m", check) / "weights").read_bytes()


def test_a_download_that_breaks_off_goes_on_where_it_stopped_with_a_fresh_token(
    service: Service, tmp_path: Path
) -> None:
    service.meets[("download", 4 * PIECE)] = "UNAVAILABLE"
    number = iter(range(100))
    with connected(service) as opened:
        assert fetch(opened, tmp_path, lambda: f"token-{next(number)}") == DATA
    assert service.calls == [
        ("list", "token-0", 0),
        ("download", "token-1", 0),
        ("download", "token-1", 4 * PIECE),
        ("download", "token-2", 4 * PIECE),
    ]


@pytest.mark.parametrize("where", [("list", 0), ("download", 0), ("download", 4 * PIECE)])
def test_who_waits_for_a_service_that_hangs_hears_within_a_second(
    service: Service, tmp_path: Path, where: tuple[str, int]
) -> None:
    service.meets[where] = "hangs"
    assert heard_after(service, tmp_path) < 1.0
    assert service.calls[-1][::2] == where


def heard_after(service: Service, folder: Path) -> float:
    """Seconds from the wish to stop until the fetching ended."""
    stop = threading.Event()
    asked_at = [0.0]

    def ask_soon() -> None:
        service.began.wait(10)
        time.sleep(0.5)
        asked_at[0] = time.monotonic()
        stop.set()

    def check() -> None:
        if stop.is_set():
            raise Cancelled("nobody wants it")

    asking = threading.Thread(target=ask_soon)
    with connected(service) as opened:
        asking.start()
        with pytest.raises(Cancelled, match="nobody wants it"):
            fetch(opened, folder, lambda: "token", check)
        heard = time.monotonic() - asked_at[0]
    asking.join()
    return heard


def test_who_waits_for_a_service_that_is_away_hears_within_a_second(tmp_path: Path) -> None:
    stop_at = time.monotonic() + 2.0  # by then the pauses between two tries are longer than a second

    def check() -> None:
        if time.monotonic() > stop_at:
            raise Cancelled("nobody wants it")

    with channel("127.0.0.1:1") as opened, pytest.raises(Cancelled):
        fetch(opened, tmp_path, lambda: "token", check)
    assert time.monotonic() - stop_at < 1.0


def test_files_that_are_not_those_of_the_digest_are_not_fetched(service: Service, tmp_path: Path) -> None:
    other, cache = ModelReference(name="models/m", digest="0" * 64), BlobCache(tmp_path / "cache", 1 << 30)
    with connected(service) as opened, pytest.raises(DataLoss, match="used again") as caught:
        fetch_model(opened, lambda: "token", other, cache, tmp_path / "m")
    assert caught.value.metadata == {"name": "models/m", "expected": "0" * 64, "actual": MODEL.digest}
    assert [method for method, _, _ in service.calls] == ["list"]


def test_a_list_of_files_on_several_pages_is_read_to_its_end(service: Service, tmp_path: Path) -> None:
    service.paths = ("a", "b", "weights")
    wanted = ModelReference(name="models/m", digest=files_digest(dict.fromkeys(service.paths, SHA256)))
    cache = BlobCache(tmp_path / "cache", 1 << 30)
    with connected(service) as opened:
        folder = fetch_model(opened, lambda: "token", wanted, cache, tmp_path / "m")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == dict.fromkeys(service.paths, DATA)


def test_a_refusal_ends_the_fetching_at_once(service: Service, tmp_path: Path) -> None:
    service.meets[("download", 4 * PIECE)] = "PERMISSION_DENIED"
    with connected(service) as opened, pytest.raises(Unavailable) as caught:
        fetch(opened, tmp_path, lambda: "token")
    assert caught.value.reason == Reason.PEER_REFUSED
    assert not isinstance(caught.value, PermissionDenied)
    assert list((tmp_path / "cache").glob("[!.]*")) == []
