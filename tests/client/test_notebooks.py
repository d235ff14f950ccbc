"""How resources, lists of them and listings look in a notebook, and that nothing in them becomes HTML."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import grpc
import pytest
from google.rpc.status_pb2 import Status
from IPython.core.interactiveshell import InteractiveShell

from luthier.client import AsyncClient, Client
from luthier.client.metric_table import MetricTable
from luthier.client.notebooks import MOST_ROWS, list_html, load_ipython_extension
from luthier.errors import NotFound
from luthier.v1.chat_pb2 import ChatMessage
from luthier.v1.evaluation_pb2 import Prediction
from luthier.v1.event_pb2 import Event, LogLine, MetricValues
from luthier.v1.fine_tuning_job_pb2 import Checkpoint, FineTuningJob, MetricPoint
from luthier.v1.grader_pb2 import Grader
from luthier.v1.model_alias_pb2 import AliasMove, ModelAlias
from luthier.v1.reference_pb2 import Reference
from luthier.v1.training_service_pb2 import ListFineTuningJobEventsResponse, ListFineTuningJobsResponse
from luthier.v1.webhook_pb2 import Webhook

HOSTILE = "</td></table><script>alert(1)</script><b onclick='x()'>\u202e\x1b[2J\"&amp;"
SHOWN = "</td></table><script>alert(1)</script><b onclick='x()'>\\u202e\\x1b[2J\"&amp;"
TAGS = {"table", "caption", "thead", "tbody", "tr", "th", "td", "b", "details", "summary", "pre", "p"}


class Page(HTMLParser):
    """The tables of a page, cell by cell; fails for tags and attributes that are not ours, or are left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        assert [name for name, _ in attrs] in ([], ["style"]), attrs
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    """IPython, as a notebook runs it."""
    made = InteractiveShell.instance()
    load_ipython_extension(made)
    yield made
    InteractiveShell.clear_instance()


def page(shell: InteractiveShell, value: object) -> Page:
    display: Any = shell.display_formatter
    shown, _ = display.format(value)
    return Page(shown["text/html"])


def jobs(count: int) -> list[FineTuningJob]:
    return [
        FineTuningJob(name=f"projects/default/fineTuningJobs/j{number}", uid="u") for number in range(count)
    ]


def serve(services: Any, count: int, size: int = 20) -> None:
    """Let the jobs of a project be listed in pages."""

    def answer(request: Any, context: grpc.ServicerContext) -> ListFineTuningJobsResponse:
        first = int(request.page_token or 0)
        token = str(first + size) if first + size < count else ""
        return ListFineTuningJobsResponse(
            fine_tuning_jobs=jobs(count)[first : first + size], next_page_token=token
        )

    services.answers["ListFineTuningJobs"] = answer


def test_a_listing_is_a_table_and_still_brings_everything(
    shell: InteractiveShell, services: Any, client: Client
) -> None:
    serve(services, 30)
    listing = client.jobs.list()
    shown = page(shell, listing)
    assert "30 of FineTuningJob" in shown.text
    assert shown.rows == [["name"], *([f"j{number}"] for number in range(30))]
    assert page(shell, listing).rows == shown.rows, "drawing it again changes nothing"
    assert list(listing) == jobs(30)
    assert services.calls["ListFineTuningJobs"] == 2
    assert page(shell, listing).text == "0 items"


def test_a_listing_that_was_read_in_part_shows_the_rest(
    shell: InteractiveShell, services: Any, client: Client
) -> None:
    serve(services, 3)
    listing = client.jobs.list()
    assert next(listing).name.endswith("/j0")
    assert page(shell, listing).rows == [["name"], ["j1"], ["j2"]]
    assert [one.name[-2:] for one in listing] == ["j1", "j2"]


@pytest.mark.parametrize("count", [MOST_ROWS, MOST_ROWS + 1, 1000])
def test_of_a_long_listing_the_first_are_shown_and_no_more_pages_are_asked_for(
    shell: InteractiveShell, services: Any, client: Client, count: int
) -> None:
    serve(services, count)
    listing = client.jobs.list()
    shown = page(shell, listing)
    said = f"{count} of FineTuningJob" if count == MOST_ROWS else f"the first {MOST_ROWS} of FineTuningJob"
    assert shown.text.startswith(said)
    assert len(shown.rows) == 1 + MOST_ROWS
    assert services.calls["ListFineTuningJobs"] == 3
    assert list(listing) == jobs(count)


def test_every_list_of_the_client_is_a_listing_and_what_is_watched_is_none(client: Client) -> None:
    projects = (
        client.datasets,
        client.renderings,
        client.models,
        client.jobs,
        client.evaluations,
        client.aliases,
    )
    listings: list[object] = [resource.list() for resource in projects]
    listings += [client.datasets.list_uploads(), client.datasets.versions.list("d")]
    listings += [client.datasets.versions.errors("d/v"), client.datasets.versions.records("d/v")]
    listings += [client.renderings.errors("r"), client.renderings.preview("r"), client.models.files("m")]
    listings += [client.jobs.events("j"), client.jobs.metrics("j"), client.jobs.checkpoints("j")]
    listings += [client.jobs.rollouts("j"), client.jobs.deliveries("j"), client.aliases.moves("a")]
    listings += [client.evaluations.predictions("e"), client.evaluations.deliveries("e")]
    for listing in listings:
        assert hasattr(listing, "_repr_html_")
    # Showing what goes on would wait for its end.
    for watching in (client.jobs.watch("j"), client.generate("m", "Once")):
        assert not hasattr(watching, "_repr_html_")


def test_a_listing_that_is_refused_says_so(services: Any, client: Client) -> None:
    def refuse(request: Any, context: grpc.ServicerContext) -> None:
        services.refuse(context, grpc.StatusCode.NOT_FOUND, "no such project", reason="RESOURCE_NOT_FOUND")

    services.answers["ListFineTuningJobs"] = refuse
    listing: Any = client.jobs.list()
    with pytest.raises(NotFound):
        listing._repr_html_()


def test_a_listing_whose_second_page_is_refused_is_never_taken_for_whole(
    services: Any, client: Client
) -> None:
    serve(services, 30)
    answer = services.answers["ListFineTuningJobs"]

    def refuse(request: Any, context: grpc.ServicerContext) -> Any:
        if request.page_token:
            services.refuse(context, grpc.StatusCode.NOT_FOUND, "no such page", reason="RESOURCE_NOT_FOUND")
        return answer(request, context)

    services.answers["ListFineTuningJobs"] = refuse
    listing: Any = client.jobs.list()
    for _ in range(2):
        with pytest.raises(NotFound, match="no such page"):
            listing._repr_html_()
    assert [next(listing) for _ in range(20)] == jobs(20), "what had come before comes first"
    for _ in range(2):
        with pytest.raises(NotFound, match="no such page"):
            list(listing)
    assert services.calls["ListFineTuningJobs"] == 2


def test_a_listing_that_was_closed_brings_nothing_that_was_shown(
    shell: InteractiveShell, services: Any, client: Client
) -> None:
    serve(services, 30)
    with client.jobs.list() as listing:
        page(shell, listing)
        next(listing)
    assert list(listing) == []
    assert page(shell, listing).text == "0 items"


async def test_of_the_async_client_what_was_read_is_shown(
    shell: InteractiveShell, services: Any, async_client: AsyncClient
) -> None:
    serve(services, 2)
    listing = async_client.jobs.list()
    assert not hasattr(listing, "_repr_html_"), "whoever draws a cell cannot wait"
    assert page(shell, [one async for one in listing]).rows == [["name"], ["j0"], ["j1"]]


def test_nothing_that_others_wrote_becomes_html(
    shell: InteractiveShell, services: Any, client: Client
) -> None:
    job = FineTuningJob(
        name=f"projects/default/fineTuningJobs/{HOSTILE}",
        uid="u",
        display_name=HOSTILE,
        base_model=f"projects/default/models/{HOSTILE}",
        labels={HOSTILE: HOSTILE},
        error=Status(code=3, message=HOSTILE * 20),
        webhooks=[Webhook(url=HOSTILE)],
    )
    services.answers["ListFineTuningJobs"] = lambda request, context: ListFineTuningJobsResponse(
        fine_tuning_jobs=[job]
    )
    services.answers["ListFineTuningJobEvents"] = lambda request, context: ListFineTuningJobEventsResponse(
        events=[Event(sequence=1, log=LogLine(text=HOSTILE))]
    )
    services.answers["GetFineTuningJob"] = lambda request, context: job
    points = [MetricPoint(step=1, values={HOSTILE: 1.0})]
    written = '\\"'.join(SHOWN.split('"'))
    for value, said in (
        (job, SHOWN),
        ([job], SHOWN),
        (job.webhooks, SHOWN),
        (client.jobs.list(), SHOWN),
        (client.jobs.handle("j"), SHOWN),
        (client.jobs.events("j"), "<script>alert(1)</script>"),
        (points, "<script>alert(1)</script>"),
        (MetricTable(points), SHOWN),
        ([Prediction(reference=HOSTILE, prompt=[ChatMessage(content=HOSTILE)])], SHOWN),
        (
            [ModelAlias(name="projects/p/modelAliases/a", uid="u", current=AliasMove(model=HOSTILE))],
            "<script>",
        ),
    ):
        shown = page(shell, value)
        assert said in shown.text or written in shown.text, shown.text
        assert not set("\u202e\x1b") & set(shown.text)


def test_lists_show_what_tells_their_messages_apart(shell: InteractiveShell) -> None:
    events = [
        Event(sequence=1, log=LogLine(text="so far")),
        Event(sequence=2, step=3, metrics=MetricValues(values={"train_loss": 2.5})),
    ]
    header, first, second = page(shell, events).rows
    assert header == ["sequence", "step", "metrics", "log"]
    assert first[:3] == ["1", "0", ""]
    assert "so far" in first[3]
    assert second[:2] == ["2", "3"]
    assert "train_loss" in second[2]
    stood = [
        FineTuningJob(name="projects/p/fineTuningJobs/a", state=FineTuningJob.STATE_RUNNING, uid="u"),
        FineTuningJob(name="projects/p/fineTuningJobs/b", display_name="projects/p/models/c", uid="u"),
    ]
    assert page(shell, stood).rows == [
        ["name", "state", "display_name"],
        ["a", "RUNNING", ""],
        ["b", "", "projects/p/models/c"],
    ], "only names of resources are made short"


def test_a_name_that_is_no_resources_is_shown_whole(shell: InteractiveShell) -> None:
    """Who speaks in a chat, and how a grader is called, is whatever somebody wrote."""
    name = "projects/p/models/c"
    assert page(shell, [ChatMessage(name=name)]).rows[1] == [name]
    assert page(shell, Grader(name=name)).rows == [["name", name]]
    for resource in (Reference(name=name), Checkpoint(name=name), ModelAlias(name=name)):
        assert page(shell, resource).rows == [["name", "c"]]


def test_a_list_of_anything_else_is_not_walked(shell: InteractiveShell) -> None:
    class Unwalked(list[object]):
        def __iter__(self) -> Iterator[object]:
            raise AssertionError("a list of a million numbers would be read to its end")

    assert list_html(Unwalked([1, ChatMessage()])) is None
    assert list_html([]) is None
    assert list_html([ChatMessage(content="x"), 1]) is None, "not all are messages"
