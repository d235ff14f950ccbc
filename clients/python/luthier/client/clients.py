"""The two clients. Each owns its channels; close it, or use it in a `with`."""

from __future__ import annotations

from types import TracebackType

from luthier.client.aliases import Aliases, AsyncAliases
from luthier.client.async_driver import AsyncDriver, AsyncResource, async_method, async_stream_method
from luthier.client.config import ClientConfig, ConfigArguments, read_config
from luthier.client.datasets import AsyncDatasets, Datasets
from luthier.client.evaluations import AsyncEvaluations, Evaluations, generate
from luthier.client.jobs import AsyncJobs, Jobs
from luthier.client.learning_curve import learning_curve
from luthier.client.models import AsyncModels, Models
from luthier.client.notebooks import register
from luthier.client.renderings import AsyncRenderings, Renderings
from luthier.client.sync_driver import SyncDriver, SyncResource, method, stream_method


class Client(SyncResource):
    """Talks to the three services over `grpc`. May be used by many threads.

    `config` says everything, or as `ConfigArguments` a part of it; for the rest the environment and the home of
    `luthierd up` say where the services are and which key to send, see `luthier.client.config.read_config`. Nothing is
    sent before the first call.

    Raises:
        InvalidArgument: The configuration is wrong.
        Unauthenticated: There is no API key.
    """

    generate = stream_method(generate)
    learning_curve = method(learning_curve)

    def __init__(self, config: ClientConfig | ConfigArguments | None = None) -> None:
        chosen = config if isinstance(config, ClientConfig) else read_config(config or ConfigArguments())
        driver = SyncDriver(chosen)
        super().__init__(driver)
        self.datasets = Datasets(driver)
        self.renderings = Renderings(driver)
        self.models = Models(driver)
        self.jobs = Jobs(driver)
        self.evaluations = Evaluations(driver)
        self.aliases = Aliases(driver)
        register()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channels. Running calls end with `Cancelled`."""
        self._driver.close()


class AsyncClient(AsyncResource):
    """Talks to the three services over `grpc.aio`.

    Belongs to the event loop of its first call. Otherwise as `Client`.
    """

    generate = async_stream_method(generate)
    learning_curve = async_method(learning_curve)

    def __init__(self, config: ClientConfig | ConfigArguments | None = None) -> None:
        chosen = config if isinstance(config, ClientConfig) else read_config(config or ConfigArguments())
        driver = AsyncDriver(chosen)
        super().__init__(driver)
        self.datasets = AsyncDatasets(driver)
        self.renderings = AsyncRenderings(driver)
        self.models = AsyncModels(driver)
        self.jobs = AsyncJobs(driver)
        self.evaluations = AsyncEvaluations(driver)
        self.aliases = AsyncAliases(driver)
        register()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channels. Running calls end with `Cancelled`."""
        await self._driver.close()
