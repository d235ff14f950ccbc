"""Addresses that operators allow: a host, a host with a port, and nothing else."""

from __future__ import annotations

import pytest

from luthier.errors import InvalidArgument, Reason
from luthier.work.addresses import AllowedAddresses

ALLOWED = AllowedAddresses(["127.0.0.1", "localhost:7000", "[::1]", "rewards.example.com:443"])


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:1",
        "127.0.0.1:65535",
        "localhost:7000",
        "LOCALHOST:7000",
        "[::1]:9",
        "rewards.example.com:443",
    ],
)
def test_allowed_addresses_pass(address: str) -> None:
    ALLOWED.require(address, "f")


@pytest.mark.parametrize(
    "address",
    [
        "localhost:7001",
        "127.0.0.2:1",
        "rewards.example.com:80",
        "rewards.example.com.evil.org:443",
        "evil.org:1",
        "127.0.0.1",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "unix:/tmp/socket",
        "unix:5",
        "dns:///127.0.0.1:1",
        "127.0.0.1:1,evil.org:1",
        "127.0.0.1:1\n",
        "[::2]:9",
        "",
    ],
)
def test_other_addresses_are_refused_by_name(address: str) -> None:
    with pytest.raises(InvalidArgument, match="LUTHIER_REWARD_ADDRESSES allows") as caught:
        ALLOWED.require(address, "grader.remote.address")
    assert caught.value.reason == Reason.ADDRESS_NOT_ALLOWED
    assert [one.field for one in caught.value.violations] == ["grader.remote.address"]


@pytest.mark.parametrize("entry", ["http://a", "a:b", "a:0", "a:70000", "", "a b", "*"])
def test_an_entry_that_is_no_address_is_refused(entry: str) -> None:
    with pytest.raises(InvalidArgument, match="must hold host or host:port"):
        AllowedAddresses([entry])


def test_no_address_is_allowed_where_none_is_named() -> None:
    with pytest.raises(InvalidArgument, match="must be host:port of nobody"):
        AllowedAddresses([]).require("127.0.0.1:1", "f")


def test_a_refusal_names_the_setting_and_what_the_field_holds() -> None:
    with pytest.raises(InvalidArgument, match=r"LUTHIER_OTHER must hold host or host:port, e\.g\. "):
        AllowedAddresses(["a b"], "LUTHIER_OTHER")
    with pytest.raises(
        InvalidArgument, match=r"of 127\.0\.0\.1, which LUTHIER_OTHER allows, got 'http://a/b'"
    ):
        AllowedAddresses(["127.0.0.1"], "LUTHIER_OTHER").require("a:80", "f", "http://a/b")
