"""What the making of a home needs: processes whose leases outlast it, and calls that can be asked again."""

from __future__ import annotations

import json
import time
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.e2e.conftest import SERVICES, Cluster
from tests.golden.answers import Answer, Asker, plain
from tests.golden.fake_worker import FakeWorker

from luthier.data.config import Config
from luthier.v1.data_service_pb2 import WriteUploadRequest

DATA = "luthier.v1.DataService"
PARENT, OTHER = "projects/default", "projects/other"
READY, FAILED, CANCELLED, SUCCEEDED = (
    f"STATE_{state}" for state in ("READY", "FAILED", "CANCELLED", "SUCCEEDED")
)
_FINAL = {READY, FAILED, CANCELLED, SUCCEEDED}
_WAIT_SECONDS = 240.0


class RestingCluster(Cluster):
    """Processes whose leases do not run out while a home is made or asked: what a dead worker held stays as it was.

    `worker_name` is the name of workers, and `lease_seconds` the lease of services, that are started from now on.
    """

    worker_name = ""
    lease_seconds = 3600.0
    # Three services migrate at once, on machines that others use too.
    serving_seconds = 240.0

    def environment(self) -> dict[str, str]:
        leases = {f"LUTHIER_{name.upper()}_LEASE_SECONDS": str(self.lease_seconds) for name in SERVICES}
        environment = super().environment() | leases | {"LUTHIER_WORKER_NAME": self.worker_name}
        if "keeping" in Config.__dataclass_fields__:
            # Homes grow old, and are asked for all that they ever told.
            environment |= {f"LUTHIER_{name.upper()}_EVENT_KEEP_SECONDS": "0" for name in SERVICES}
        # They have their stores in themselves, wherever those of other tests are.
        urls = ("_DATABASE_URL", "_BLOBS_URL")
        return {name: value for name, value in environment.items() if not name.endswith(urls)}

    def drain(self, name: str) -> None:
        """SIGTERM a worker, and wait until it has given back what it worked on."""
        process = self._processes.pop(name)
        process.terminate()
        process.wait(60)

    def api_key(self) -> str:
        """Return the key of the home, which a service has made."""
        return (self.home / "api-key").read_text().strip()


class Making:
    """A home in the making.

    Attributes:
        cluster: its processes.
        uploads: names of all uploads.
        repeatable: calls with a request id; made again, each must bring its first answer.
    """

    def __init__(self, cluster: RestingCluster, asker: Asker) -> None:
        self.cluster = cluster
        self.uploads: list[str] = []
        self.repeatable: list[Answer] = []
        self._asker = asker
        self._fakes: dict[str, FakeWorker] = {}

    def has(self, rpc: str) -> bool:
        """Tell whether the code has an rpc."""
        return self._asker.has(rpc)

    def call(self, rpc: str, request: Mapping[str, Any]) -> Any:
        """Make a call that cannot be asked again: its answer holds what only this home has."""
        return plain(self._asker.send(rpc, request))

    def call_once(self, rpc: str, request: Mapping[str, Any]) -> Any:
        """Make a call with a request id, to be asked again when the home is recorded."""
        sent = {**request, "requestId": str(uuid.uuid4())}
        response = self.call(rpc, sent)
        self.repeatable.append({"rpc": rpc, "request": sent})
        return response

    def wait(self, get: str, name: str, *states: str) -> Any:
        """Wait until a resource has one of some states, and return it. Another final state is a fault."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < deadline:
            resource = self.call(get, {"name": name})
            if resource["state"] in states:
                return resource
            assert resource["state"] not in _FINAL, resource
            time.sleep(0.05)
        raise AssertionError(f"{name} became none of {states} in {_WAIT_SECONDS:g} s")

    def upload(self, filename: str, data: bytes, parent: str = PARENT, *, finish: bool = True) -> str:
        """Upload bytes; returns the upload's name. Without `finish` it goes on receiving."""
        start = {"parent": parent, "upload": {"filename": filename}}
        name: str = self.call_once(f"{DATA}/StartUpload", start)["name"]
        self.uploads.append(name)
        if data:
            piece = WriteUploadRequest(name=name, data=data, crc32=zlib.crc32(data), finish=finish)
            self._asker.send(f"{DATA}/WriteUpload", [piece])
        return name

    def worker(self, service: str) -> FakeWorker:
        """Return a new process of the service's fake worker."""
        if service not in self._fakes:
            address = self.cluster.addresses[service]
            self._fakes[service] = FakeWorker(self.cluster.home, service, address, f"gone-{service}")
        self._fakes[service].start()
        return self._fakes[service]


def json_lines(records: list[Any]) -> bytes:
    """Return records as a file, one a line; a string is a line as it is."""
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    return "".join(f"{line}\n" for line in lines).encode()


def model_folder(cluster: Cluster, name: str) -> Path:
    """Return a folder that the Training service may read models from."""
    folder = cluster.home / "models" / name
    folder.mkdir(parents=True)
    return folder
