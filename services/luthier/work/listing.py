"""List calls: page arguments of a request into a page of resources."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

from google.protobuf.message import Message
from sqlalchemy import Select
from sqlalchemy.engine import RowMapping

from luthier.runtime.filters import parse_filter, parse_order_by
from luthier.runtime.paging import PageTokens, fingerprint, page_size
from luthier.storage.database import Database
from luthier.storage.pages import Cursor, Page, Wanted

T = TypeVar("T")
Value = TypeVar("Value")
Asked = TypeVar("Asked", bound="PagedRequest")
Answer = TypeVar("Answer", bound=Message)
ENTRIES_A_PAGE = 200
"""Of what is numbered and small, where a call says nothing."""
PAGE_BYTES = 2 << 20
"""A page ends before it grows beyond this, whatever was asked for: clients accept 4 MiB a message."""


Live = Callable[[str], Awaitable[Sequence[str]]]
"""Returns what tells the resource that has a name now from others of that name: its uid, and its digest for what was
made from it before uids were kept. Empty when none has the name."""


def told_apart(uid: str, digest: str = "") -> Sequence[str]:
    """Return what tells a resource from others of its name."""
    return [one for one in (uid, digest) if one]


class ListRequest(Protocol):
    """What every request of a standard List call has (AIP-132)."""

    @property
    def parent(self) -> str:
        """Resource that the listed ones belong to."""
        ...

    @property
    def page_size(self) -> int:
        """Resources on a page at most; 0 means the default."""
        ...

    @property
    def page_token(self) -> str:
        """Token of the page, empty for the first."""
        ...

    @property
    def filter(self) -> str:
        """Which resources to list."""
        ...

    @property
    def order_by(self) -> str:
        """In which order."""
        ...


class PagedRequest(ListRequest, Protocol):
    """The message of such a request, to ask with again: a protocol cannot be a `Message` too."""

    page_size: int

    def CopyFrom(self, other_msg: Self) -> None:
        """As a message's."""


class EntriesRequest(Protocol):
    """What every request has that pages through numbered entries of one resource."""

    @property
    def page_size(self) -> int:
        """Entries on a page at most; 0 means the default."""
        ...

    @property
    def page_token(self) -> str:
        """Token of the page, empty for the first."""
        ...


class Listed(Protocol[Value]):
    """Resources that can be read by pages."""

    def page_statement(
        self,
        *,
        parent: str,
        limit: int,
        after: Cursor | None,
        equals: Mapping[str, Wanted],
        newest_first: bool,
        deleted: bool = False,
    ) -> Select[Any]:
        """Return what finds a page, of those that are deleted or of the others."""
        ...

    def page_of(self, rows: Sequence[RowMapping], limit: int) -> Page[Value]:
        """Return the page that the statement found."""
        ...


async def list_page(
    database: Database,
    resources: Listed[T],
    tokens: PageTokens,
    request: ListRequest,
    *,
    filters: Collection[str] = ("state", "labels"),
    live: Mapping[str, Live] | None = None,
    parent_uid: str = "",
) -> tuple[tuple[T, ...], str]:
    """Return the resources of a page and the token of the next one, empty after the last.

    A parent that can be deleted has a `parent_uid`: no token leads from it to another one of its name. `live` finds the
    resource that has a name now, for each filter that names one.

    Raises:
        InvalidArgument: page_size, page_token, filter or order_by is not valid.
    """
    equals, meant = await _by_uid(parse_filter(request.filter, filters), request.parent, live or {})
    newest_first = parse_order_by(request.order_by)
    scope = parent_uid or request.parent
    bound = fingerprint(
        type(request).__name__, scope, request.filter, request.order_by, *meant, *_words(request)
    )
    parts = tokens.decode(request.page_token, bound)
    limit = page_size(request.page_size)
    found = [
        await database.rows(
            resources.page_statement(
                parent=request.parent,
                limit=limit,
                after=Cursor.of(parts) if parts is not None else None,
                equals=equals,
                newest_first=newest_first,
                deleted=deleted,
            )
        )
        for deleted in ((False, True) if _shows_deleted(request) else (False,))
    ]
    rows = found[0]
    if len(found) > 1:
        # Each has an index of its own: together they are a page.
        keyed = (*found[0], *found[1])
        rows = sorted(keyed, key=lambda row: (row["create_time_us"], row["name"]), reverse=newest_first)
        rows = rows[: limit + 1]
    page = resources.page_of(rows, limit)
    return page.values, tokens.encode(page.next.parts(), bound) if page.next is not None else ""


def _shows_deleted(request: Any) -> bool:
    """Return whether a request asks for deleted resources too; that of a kind that has none cannot."""
    return bool(getattr(request, "show_deleted", False))


def _words(request: Any) -> Sequence[str]:
    return ["show_deleted"] if _shows_deleted(request) else []


async def _by_uid(
    equals: Mapping[str, str], parent: str, live: Mapping[str, Live]
) -> tuple[Mapping[str, Wanted], Sequence[str]]:
    """Return a filter that finds what was made from the resource that has a name now, and what tells that one.

    Nothing was made from what is elsewhere than in the project. While no resource has the name, what was made from any
    that had it is found.
    """
    wanted: dict[str, Wanted] = dict(equals)
    meant: list[str] = []
    for field, find in live.items():
        if not equals.get(field, "").startswith(f"{parent}/"):
            continue
        told = await find(equals[field])
        if told:
            del wanted[field]
            # One value is found in the order of pages; several are sorted first.
            wanted[f"{field}_uid"] = told[0] if len(told) == 1 else tuple(told)
            meant += told
    return wanted, meant


async def page_that_fits(request: Asked, read: Callable[[Asked], Awaitable[tuple[Answer, int]]]) -> Answer:
    """Return the page that `read` makes of a request, with fewer resources where they are too large for a message.

    `read` returns a page and how many resources stand on it; it is called again for as many as should fit by their
    mean size, until they do or one is left.
    """
    asked = type(request)()
    asked.CopyFrom(request)
    while True:
        page, count = await read(asked)
        if count <= 1 or page.ByteSize() <= PAGE_BYTES:
            return page
        fitting = count * PAGE_BYTES // page.ByteSize()
        asked.page_size = min(max(1, fitting), count - 1)


async def entries_page(
    tokens: PageTokens,
    request: EntriesRequest,
    uid: str,
    read: Callable[[str, int, int], Awaitable[Sequence[T]]],
    number: Callable[[T], int],
) -> tuple[Sequence[T], str]:
    """Return a page of the numbered entries of the resource of a uid, and the token of the next, empty after the last.

    `read` returns at most so many entries (third) of a uid (first) after a number (second), in order.

    Raises:
        InvalidArgument: page_size or page_token is not valid.
    """
    limit = page_size(request.page_size, default=ENTRIES_A_PAGE)
    method = type(request).__name__.removesuffix("Request")
    last, bound = row_page_arguments(tokens, method, (uid,), request.page_token)
    found = await read(uid, last, limit + 1)
    token = tokens.encode((str(number(found[limit - 1])),), bound) if len(found) > limit else ""
    return found[:limit], token


def row_page_arguments(
    tokens: PageTokens, request_name: str, scope: Collection[str], page_token: str
) -> tuple[int, str]:
    """Return the first row of a page of numbered rows, and what binds the next page's token.

    `scope` is the uid of the resource that has the rows, for its name may be another one's by the next page, and
    what else the rows are chosen by.

    Raises:
        InvalidArgument: the token was made for other arguments.
    """
    bound = fingerprint(request_name, *scope)
    parts = tokens.decode(page_token, bound)
    return (int(parts[0]) if parts is not None else 0), bound
