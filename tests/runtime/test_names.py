"""Resource names, page tokens, filters and orders: parsed once, refused with the value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import InvalidArgument, LuthierError
from luthier.runtime.filters import parse_filter, parse_order_by
from luthier.runtime.names import Pattern, check_id, new_id, project_named, project_of
from luthier.runtime.paging import PageTokens, fingerprint, page_size

DATASET = Pattern("projects/{project}/datasets/{dataset}")
ids = st.from_regex(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)


@given(ids, ids)
def test_a_name_reads_back_as_it_was_made(project: str, dataset: str) -> None:
    name = DATASET.format(project=project, dataset=dataset)
    assert DATASET.parse(name) == {"project": project, "dataset": dataset}
    assert project_of(name) == project


@pytest.mark.parametrize(
    "name",
    ["", "projects/p", "projects/p/datasets/", "projects/p/datasets/A", "projects/p/datasets/a/b", "x" * 500],
)
def test_a_name_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        DATASET.parse(name)
    assert "projects/{project}/datasets/{dataset}" in caught.value.message
    assert caught.value.violations[0].field == "name"


@pytest.mark.parametrize("value", ["", "1a", "a-", "A", "a" * 64, "a_b", "a/b", "ä"])
def test_an_id_against_the_rule_is_refused(value: str) -> None:
    with pytest.raises(InvalidArgument, match="lowercase letters"):
        check_id(value, field="dataset_id")


def test_new_ids_differ_and_keep_the_rule() -> None:
    made = {new_id("job") for _ in range(1000)}
    assert len(made) == 1000
    assert all(check_id(one, field="id") for one in made)


@pytest.mark.parametrize(
    ("name", "project"),
    [
        ("projects/a", "a"),
        ("projects/a/models/m", "a"),
        ("projects/-", None),
        ("projects/-/models/m", None),
        ("projects/a\n", None),
        ("projects/A/models/m", None),
        ("/projects/a", None),
        ("a", None),
        ("", None),
    ],
)
def test_what_no_resource_can_have_as_a_name_names_no_project(name: str, project: str | None) -> None:
    assert project_named(name) == project
    if project is None:
        with pytest.raises(InvalidArgument, match="must start with projects/"):
            project_of(name)


def test_page_sizes_keep_aip_158() -> None:
    assert [page_size(one) for one in (0, 1, 1000, 5000)] == [50, 1, 1000, 1000]
    with pytest.raises(InvalidArgument, match="must not be negative, got -1"):
        page_size(-1)


TOKENS = PageTokens(b"k" * 32)


@given(st.lists(st.text(), max_size=3))
def test_a_page_token_brings_its_cursor_back(cursor: list[str]) -> None:
    bound = fingerprint("List", "projects/p")
    assert TOKENS.decode(TOKENS.encode(cursor, bound), bound) == tuple(cursor)


def test_a_page_token_of_other_arguments_is_refused() -> None:
    token = TOKENS.encode(["1"], fingerprint("List", "projects/p"))
    forged = PageTokens(b"x" * 32).encode(["1"], fingerprint("List", "projects/p"))
    for wrong, arguments in (
        (token, "projects/q"),
        (forged, "projects/p"),
        ("%%", "projects/p"),
        ("AAAA", "projects/p"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            TOKENS.decode(wrong, fingerprint("List", arguments))
        assert caught.value.reason == "PAGE_TOKEN_INVALID"


def test_filters_join_equalities() -> None:
    text = 'state = "READY" AND labels.team = red'
    assert parse_filter(text, ("state", "labels")) == {"state": "READY", "labels.team": "red"}
    assert parse_filter("", ("state",)) == {}


@pytest.mark.parametrize(
    "text",
    [
        "state",
        "state = ",
        "state != READY",
        "state = A OR state = B",
        "size = 1",
        "state = A AND",
        "state = A state = B",
    ],
)
def test_filters_beyond_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_filter(text, ("state", "labels"))
    assert caught.value.reason == "FILTER_INVALID"


@given(st.text(max_size=40))
def test_no_filter_breaks_the_parser(text: str) -> None:
    try:
        parse_filter(text, ("state", "labels"))
    except LuthierError as error:
        assert error.reason == "FILTER_INVALID"  # noqa: PT017 - any other error is the failure looked for


def test_orders_are_by_creation_time() -> None:
    assert [parse_order_by(one) for one in ("", "create_time desc", "create_time")] == [True, True, False]
    with pytest.raises(InvalidArgument, match="got 'size'"):
        parse_order_by("size")
