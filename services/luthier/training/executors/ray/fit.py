"""The process that has joined the cluster for one training: it puts the ranks there, listens to them and judges them.

Its end, of whatever kind, is the end of all that it started in the cluster: it is their driver, as Ray says.
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer

from luthier.errors import LuthierError, Reason, ResourceExhausted, Unavailable
from luthier.runtime.config import put
from luthier.storage.disk import found_full
from luthier.storage.files import digest_of
from luthier.training.executors.pulse import Shown
from luthier.training.executors.ranks import ranks_for
from luthier.training.executors.ray import rank
from luthier.training.executors.ray.cluster import (
    NODE_LABEL,
    Node,
    described,
    found_nodes,
    joined_cluster,
    last_line,
    on_node,
    require_version,
)
from luthier.training.executors.ray.orders import FarRows, Fleet, Part, RayOrder
from luthier.training.executors.ray.post import Letter, Post
from luthier.training.executors.ray.sentry import Sentry
from luthier.training.executors.vigil import Vigil
from luthier.training.recipe_settings import ranks_of
from luthier.training.worker.order import RenderingRows, TrainEnd
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.work.child import Line

_LISTEN_SECONDS = 0.25
_ANSWER_SECONDS = 30.0
"""The post does next to nothing: one that does not answer for so long hangs."""
_CAUSE_SECONDS = 4.0
"""A rank that lost another says so at once; what became of the other Ray or a sentry knows some seconds later."""
_END_SECONDS = 20.0
_POLL_SECONDS = 0.2


def fitted(line: Line, given: RayOrder) -> TrainEnd:
    """Train on the ranks of a cluster, and return what the first one made.

    Raises:
        Unavailable: TOO_FEW_RANKS, the cluster has not so many now; RANK_LOST; CRASHED, there is no cluster.
        ResourceExhausted: OUT_OF_MEMORY, Ray ended a rank for want of it.
        LuthierError: what a rank raised.
    """
    with joined_cluster(given.fleet.address):
        nodes = [node for node in found_nodes() if node.room(given.fleet)]
        job = given.order.task.train.job
        num_ranks = ranks_now(job, given.fleet, nodes)
        wanted = ranks_for(job, given.fleet.num_ranks, "ray")
        if num_ranks < wanted:
            text = f"trains on {num_ranks} ranks in place of {wanted}: the cluster has {described(nodes)}"
            line.tell("log", (text, "WARNING"))
        return _Run(line, given, nodes, num_ranks).result()


def ranks_now(job: FineTuningJob, fleet: Fleet, nodes: Sequence[Node]) -> int:
    """Return on how many ranks of a cluster a job is trained, as the cluster is now.

    Raises:
        Unavailable: TOO_FEW_RANKS; another worker may have as many as the job takes, and nodes may come back.
    """
    least, _ = ranks_of(job)
    wanted = ranks_for(job, fleet.num_ranks, "ray")
    room = sum(node.room(fleet) for node in nodes)
    if room < least:
        raise Unavailable(
            f"the job takes at least {least} ranks, the cluster {fleet.address} has room for {room} now: it has "
            f"{described(nodes)}; add nodes, or lower ranks.min_ranks",
            reason=Reason.TOO_FEW_RANKS,
            metadata={"min_ranks": str(least), "ranks": str(room)},
        )
    return min(wanted, room)


class _Run:
    """One training on a cluster."""

    def __init__(self, line: Line, given: RayOrder, nodes: Sequence[Node], num_ranks: int) -> None:
        self._line = line
        self._given = given
        self._nodes = nodes
        self._num_ranks = num_ranks
        self._attempt = uuid.uuid4().hex
        here = on_node(ray.get_runtime_context().get_node_id())
        beside = ray.remote(num_cpus=0, max_restarts=0)
        self._place = given.order.scratch / "ranks"
        self._post = beside(Post).options(label_selector=here).remote(self._place)
        self._sentries = {
            node.host: beside(Sentry)
            .options(label_selector=on_node(node.node_id))
            .remote(self._post, self._attempt)
            for node in nodes
        }
        self._sights: Mapping[int, Shown] = {}
        looks = [partial(self._sight, number) for number in range(num_ranks)]
        self._vigil = Vigil(looks, given.fleet.bounds)
        self._gone: set[int] = set()
        self._complaint: LuthierError | None = None
        self._complained_at = 0.0
        self._result: TrainEnd | None = None
        self._serving: list[Future[None]] = []
        self._come: set[Path] = set()
        self._checkpoint: Letter | None = None
        self._is_begun = threading.Event()

    def result(self) -> TrainEnd:
        """Run to the end of all ranks, or to the first failure. Raises as `fitted`."""
        self._require_sentries()
        fit: Future[None] = Future()
        part = self._part()
        # A thread that nobody waits for: where this process is ended, all is.
        threading.Thread(
            target=_settle, args=(fit, partial(self._fit, part)), name="fit", daemon=True
        ).start()
        began = time.monotonic()
        server = ThreadPoolExecutor(1, "serving")
        while self._result is None or len(self._gone) < self._num_ranks:
            letters, self._sights = self._heard()
            for letter in letters:
                self._take(letter, server)
            self._begin_checkpoint()
            self._judge(fit, began)
        self._leave(fit)
        return self._result

    def _require_sentries(self) -> None:
        """Wait until all nodes can run ranks. Raises Unavailable: CRASHED."""
        for host, sentry in self._sentries.items():
            try:
                version = ray.get(sentry.version.remote(), timeout=self._given.fleet.place_seconds)
            except RayError as error:
                raise Unavailable(
                    f"the node {host} must run luthier's ranks, it cannot: {last_line(error)}",
                    reason=Reason.CRASHED,
                ) from error
            require_version(host, version)

    def _part(self) -> Part:
        return Part(
            attempt=self._attempt,
            task=self._given.order.task,
            rows=tuple(self._offered(rows) for rows in self._given.order.renderings),
            place=self._place,
            num_ranks=self._num_ranks,
            device=self._given.fleet.device,
            num_threads=self._given.fleet.num_threads,
        )

    def _offered(self, rows: RenderingRows) -> FarRows:
        with rows.path.open("rb") as file:
            sha256 = digest_of(file)
        self._asked(self._post.offer.remote(sha256, rows.path))
        return FarRows(sha256=sha256, size_bytes=rows.path.stat().st_size, rendering=rows.rendering)

    def _fit(self, part: Part) -> None:
        fleet = self._given.fleet
        put({"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(fleet.place_seconds)})
        ids = ",".join(node.node_id for node in self._nodes)
        is_gpu = fleet.device == "cuda"
        trainer = _Trainer(
            rank.train,
            train_loop_config={"part": part, "post": self._post},
            torch_config=rank.RankConfig(),
            scaling_config=ScalingConfig(
                num_workers=self._num_ranks,
                use_gpu=is_gpu,
                resources_per_worker=fleet.rank_takes,
                label_selector={NODE_LABEL: f"in({ids})"},
            ),
            run_config=RunConfig(
                name=self._attempt,
                storage_path=str(self._given.order.scratch / "ray"),
                # Nothing is tried again in here: what is lost is the attempt, and the queue makes another.
                failure_config=FailureConfig(
                    max_failures=0, max_preemption_failures=0, controller_failure_limit=0
                ),
                worker_runtime_env={"env_vars": _environment(is_gpu)},
            ),
        )
        trainer.fit()

    def _sight(self, number: int) -> Shown | None:
        return self._sights.get(number)

    def _asked(self, answer: Any, seconds: float = _ANSWER_SECONDS) -> Any:
        """Return what the post answers. Raises Unavailable: CRASHED, it is gone or hangs."""
        try:
            return ray.get(answer, timeout=seconds)
        except GetTimeoutError as error:
            raise Unavailable(
                f"the post of the ranks did not answer for {seconds:g} s", reason=Reason.CRASHED
            ) from error
        except RayError as error:
            raise Unavailable(
                f"the post of the ranks is gone: {last_line(error)}", reason=Reason.CRASHED
            ) from error

    def _heard(self) -> tuple[list[Letter], dict[int, Shown]]:
        heard: tuple[list[Letter], dict[int, Shown]] = self._asked(self._post.taken.remote(_LISTEN_SECONDS))
        return heard

    def _take(self, letter: Letter, server: ThreadPoolExecutor) -> None:
        if letter.name == "alive":
            self._line.alive()
        elif letter.name == "done":
            self._gone.add(letter.rank)
            if letter.rank == 0:
                [self._result] = letter.arguments
        elif letter.name == "refused":
            [error] = letter.arguments
            self._gone.add(letter.rank)
            if not _is_consequence(error):
                raise error
            self._complain(error)
        elif letter.name == "unsent":
            # Else its checkpoint would be waited for without end: that rank need not ask for anything more.
            [error] = letter.arguments
            raise found_full(RuntimeError(error), self._given.order.scratch) or error
        elif letter.name == "come":
            self._come.update(*letter.arguments)
        elif letter.name == "begin_checkpoint":
            self._checkpoint = letter
        else:
            # One after the other, and not here: the driver may wait for its service for as long as that is away.
            self._serving.append(server.submit(self._serve, letter))

    def _begin_checkpoint(self) -> None:
        """Begin the checkpoint that the first rank wants begun, if all of its files have come."""
        if self._checkpoint is not None and self._come.issuperset(self._checkpoint.arguments[1]):
            self._line.tell("begin_checkpoint", self._checkpoint.arguments)
            self._come.clear()
            self._checkpoint = None
            self._is_begun.set()

    def _serve(self, letter: Letter) -> None:
        if letter.number is None:
            self._line.tell(letter.name, letter.arguments, letter.named)
            return
        value = self._value(letter)
        self._asked(self._post.answer.remote(letter.number, value))

    def _value(self, letter: Letter) -> Any:
        if letter.name == "bring":
            [file] = letter.arguments
            path: Path = self._line.ask("fetch", (file,))
            self._asked(self._post.offer.remote(file.sha256, path))
            return path.stat().st_size
        if letter.name == "checkpoint_stored":
            return self._stored()
        return self._line.ask(letter.name, letter.arguments)

    def _stored(self) -> Any:
        """Return the files of the checkpoint that the first rank began, once the service has them."""
        self._is_begun.wait()
        self._is_begun.clear()
        while (files := self._line.ask("checkpoint_ready")) is None:
            time.sleep(_POLL_SECONDS)
        shutil.rmtree(self._place, ignore_errors=True)
        return files

    def _judge(self, fit: Future[None], began: float) -> None:
        """Return while the ranks go on together. Raises what ends them, the cause before what it led to."""
        served = [one for one in self._serving if one.done()]
        self._serving = [one for one in self._serving if not one.done()]
        for one in served:
            one.result()
        if fit.done() and (error := fit.exception()) is not None:
            if (lost := _lost(error, self._num_ranks)) is not None:
                raise lost from error
            self._complain(Unavailable(f"the ranks have ended: {last_line(error)}", reason=Reason.RANK_LOST))
        self._vigil.look(tuple(self._gone))
        if self._complaint is not None and time.monotonic() - self._complained_at > _CAUSE_SECONDS:
            raise self._complaint
        waited = time.monotonic() - began
        if not self._sights and not self._gone and waited > self._given.fleet.bounds.begin_seconds:
            raise Unavailable(
                f"none of {self._num_ranks} ranks has begun for {waited:.0f} s: their nodes do not reach one another, "
                "or cannot load what they need",
                reason=Reason.RANK_LOST,
            )

    def _complain(self, error: LuthierError) -> None:
        if self._complaint is None:
            self._complaint, self._complained_at = error, time.monotonic()

    def _leave(self, fit: Future[None]) -> None:
        """Let the ranks end in order, and clear what they left. What does not come to it ends with this process.

        All that was to be made has been made: a rank or a node that goes now loses nothing.
        """
        try:
            fit.result(_END_SECONDS)
            ray.get([sentry.leave.remote() for sentry in self._sentries.values()], timeout=_ANSWER_SECONDS)
        except (RayError, TrainingFailedError, TimeoutError) as error:
            self._line.tell("log", (f"the ranks have not ended in order: {last_line(error)}", "WARNING"))


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray is not looked into
    def _create_default_callbacks(self) -> list[Any]:
        # An actor that outlives its driver, to free room that Ray frees by itself when a driver is gone. Without Ray's
        # dashboard it never learns of that, and one would stay for each attempt that is ended.
        found = super()._create_default_callbacks()
        return [one for one in found if type(one).__name__ != "PlacementGroupCleanerCallback"]


def _settle(fit: Future[None], work: Callable[[], None]) -> None:
    try:
        work()
    except BaseException as error:  # whoever waits for it is told
        fit.set_exception(error)
    else:
        fit.set_result(None)


def _environment(is_gpu: bool) -> dict[str, str]:
    """Return what must be set in a rank before it imports torch, as `ChosenDevice.environment` has it."""
    return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if is_gpu else {}


def _is_consequence(error: Exception) -> bool:
    """Whether a rank failed for want of another one, or of its driver."""
    return isinstance(error, LuthierError) and error.reason == Reason.RANK_LOST


def _lost(error: BaseException, num_ranks: int) -> LuthierError | None:
    """Return what Ray says of a rank that is gone, or of ranks that it could not start; None: of none by itself."""
    if isinstance(error, ControllerError):
        cause = error.controller_failure
        if type(cause).__name__ == "WorkerGroupStartupTimeoutError":
            return Unavailable(
                f"the cluster has no room for {num_ranks} ranks: others use it, it made none in time",
                reason=Reason.TOO_FEW_RANKS,
            )
        return Unavailable(f"the ranks could not be started: {last_line(cause)}", reason=Reason.RANK_LOST)
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    for number, failure in sorted(failures.items()):
        cause = getattr(failure, "health_check_failure", failure)
        metadata = {"rank": str(number)}
        if isinstance(cause, OutOfMemoryError):
            return ResourceExhausted(
                f"rank {number} of {num_ranks} was ended by Ray for want of memory: {last_line(cause)}",
                reason=Reason.OUT_OF_MEMORY,
                metadata=metadata,
            )
        if isinstance(cause, RayError):
            return Unavailable(
                f"rank {number} of {num_ranks} is lost: {last_line(cause)}",
                reason=Reason.RANK_LOST,
                metadata=metadata,
            )
    return None
