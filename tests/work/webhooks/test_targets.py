"""Where webhooks may go: URLs, the operator's list, and the addresses behind names."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

from luthier.errors import InvalidArgument, Reason
from luthier.runtime.config import read
from luthier.v1.webhook_pb2 import Webhook
from luthier.work.webhooks.config import WebhookConfig
from luthier.work.webhooks.targets import NotAllowed, Target, Targets, target_of


def test_a_url_is_taken_apart() -> None:
    target = target_of("https://Hooks.Example.com/a/b?key=s3cret")
    assert target == Target(is_secure=True, host="hooks.example.com", port=443, path="/a/b?key=s3cret")
    assert (target.origin, target.authority) == ("https://hooks.example.com:443", "hooks.example.com")
    other = target_of("http://[::1]:8080")
    assert (other.path, other.origin, other.authority) == ("/", "http://[::1]:8080", "[::1]:8080")


def test_what_a_url_asks_for_is_not_shown() -> None:
    assert "s3cret" not in repr(target_of("https://hooks.example.com/s3cret?s3cret"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://a.example/x", "got the scheme 'ftp'"),
        ("a.example/x", "got the scheme ''"),
        ("https://user:pw@a.example/", "another part"),
        ("https://a.example/#part", "another part"),
        ("https:///path", "without a host"),
        ("https://a.example:0/", "another part"),
        ("https://a.example:99999/", "host or port"),
        ("https://a.example:x/", "host or port"),
        ("https://[::1/", "host or port"),
        ("https://a b.example/", "characters"),
        ("https://a.example/\r\nx-evil: 1", "characters"),
        ("https://ä.example/", "characters"),
        ("https://a.example\\@b.example/", "another part"),
        ("https://a.example/" + "x" * 2048, "got 2066 characters"),
        ("", "got 0 characters"),
    ],
)
def test_what_is_no_url_of_a_webhook_is_refused(url: str, said: str) -> None:
    with pytest.raises(ValueError, match="must be https://host"):
        target_of(url)
    with pytest.raises(InvalidArgument) as caught:
        Targets(["a.example"]).require([Webhook(url=url)], "job.webhooks")
    (violation,) = caught.value.violations
    assert violation.field == "job.webhooks[0].url"
    assert said in violation.description


def test_hosts_and_ports_are_those_of_the_operator() -> None:
    targets = Targets(["hooks.example.com", "other.example:8443", "[::1]:80"])
    allowed = [
        "https://hooks.example.com/x",
        "https://HOOKS.example.com:9443/x",
        "https://other.example:8443/",
        "http://[::1]/",
    ]
    targets.require([Webhook(url=url) for url in allowed], "f")
    for url, shown in (
        ("https://other.example/key=s3cret", "https://other.example:443"),
        ("https://sub.hooks.example.com/", "https://sub.hooks.example.com:443"),
        ("https://169.254.169.254/latest/meta-data", "https://169.254.169.254:443"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            targets.require([Webhook(url=allowed[0]), Webhook(url=url)], "f")
        (violation,) = caught.value.violations
        assert (violation.field, violation.reason) == ("f[1].url", Reason.ADDRESS_NOT_ALLOWED)
        assert violation.description == (
            "must lead to host:port of hooks.example.com, other.example:8443, [::1]:80, which "
            f"LUTHIER_WEBHOOKS_ADDRESSES allows, got {shown}"
        )


def test_without_a_list_nothing_is_called() -> None:
    with pytest.raises(InvalidArgument, match="must lead to host:port of nobody"):
        Targets(()).require([Webhook(url="http://127.0.0.1/")], "f")


@pytest.mark.parametrize("entry", ["https://a.example", "a.example:x", "a.example:70000", ""])
def test_an_entry_that_is_no_address_is_refused(entry: str) -> None:
    with pytest.raises(InvalidArgument, match="LUTHIER_WEBHOOKS_ADDRESSES must hold host or host:port"):
        Targets([entry])


def test_an_entry_that_is_no_network_is_refused() -> None:
    with pytest.raises(
        InvalidArgument, match=r"LUTHIER_WEBHOOKS_NETWORKS must hold networks.*got '10\.0\.0\.1/8'"
    ):
        Targets([], ["10.0.0.1/8"])


Leads = Callable[..., None]


@pytest.fixture
def leads(monkeypatch: pytest.MonkeyPatch) -> Leads:
    """Has every name lead to given addresses."""

    def lead(*addresses: str) -> None:
        def found(host: str, port: int, **_: Any) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", found)

    return lead


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "192.168.0.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1",
        "fd00::1",
        "::ffff:10.1.2.3",
        "64:ff9b::a01:203",
        "2002:a01:203::1",
        "2002:7f00:1::1",
        "2001:0:a01:203::1",
        "fec0::1",
        "::10.1.2.3",
        "::ffff:0:10.1.2.3",
        "64:ff9b:1::a01:203",
        "64:ff9b:1:a01:2:300::",
        "4000::1",
        "ff0e::1",
    ],
)
async def test_a_name_that_leads_inside_is_not_called(leads: Leads, address: str) -> None:
    """Whoever owns the name chooses where it leads, and when."""
    leads(address)
    targets = Targets(["hooks.example.com"])
    with pytest.raises(NotAllowed, match="leads to no address that may be called") as caught:
        await targets.addresses(target_of("https://hooks.example.com/x"))
    assert address not in str(caught.value), "what the name leads to is nothing for whoever wrote the URL"


async def test_only_the_addresses_that_may_be_called_are_given(leads: Leads) -> None:
    leads("10.1.2.3", "93.184.216.34", "93.184.216.34", "2606:2800:220:1::1")
    targets = Targets(["hooks.example.com"])
    found = await targets.addresses(target_of("https://hooks.example.com/x"))
    assert found == ["93.184.216.34", "2606:2800:220:1::1"]


async def test_networks_of_the_operator_may_be_called_also_without_tls(leads: Leads) -> None:
    leads("10.1.2.3")
    targets = Targets(["hooks.corp"], ["10.1.0.0/16", "fd00::/8"])
    assert await targets.addresses(target_of("http://hooks.corp/x")) == ["10.1.2.3"]
    leads("10.2.2.3")
    with pytest.raises(NotAllowed):
        await targets.addresses(target_of("https://hooks.corp/x"))


async def test_nothing_goes_over_the_internet_without_tls(leads: Leads) -> None:
    leads("93.184.216.34")
    with pytest.raises(NotAllowed, match="http goes to no others"):
        await Targets(["hooks.example.com"]).addresses(target_of("http://hooks.example.com/x"))


async def test_an_address_that_the_operator_wrote_himself_is_allowed(leads: Leads) -> None:
    leads("127.0.0.1")
    targets = Targets(["127.0.0.1", "localhost", "hooks.example.com"])
    assert await targets.addresses(target_of("http://127.0.0.1:1/")) == ["127.0.0.1"]
    assert await targets.addresses(target_of("http://localhost:1/")) == ["127.0.0.1"]
    leads("10.1.2.3")
    with pytest.raises(NotAllowed):
        await targets.addresses(target_of("http://localhost:1/"))


async def test_a_host_that_is_no_longer_allowed_is_not_called() -> None:
    with pytest.raises(NotAllowed, match=r"http://127\.0\.0\.1:80 is not host:port of nobody"):
        await Targets(()).addresses(target_of("http://127.0.0.1/"))


async def test_a_name_that_no_resolver_takes_is_not_known() -> None:
    host = "a" * 70 + ".example"
    with pytest.raises(OSError, match="not known"):
        await Targets([host]).addresses(target_of(f"https://{host}/"))


def test_settings_are_read_and_times_are_bounded() -> None:
    environ = {
        "LUTHIER_WEBHOOKS_ADDRESSES": "hooks.example.com,127.0.0.1:9000",
        "LUTHIER_WEBHOOKS_MAX_AGE_SECONDS": "60",
    }
    config = read(WebhookConfig, section="WEBHOOKS", environ=environ)
    assert (config.addresses, config.networks) == (("hooks.example.com", "127.0.0.1:9000"), ())
    assert (config.max_age_seconds, config.first_delay_seconds) == (60.0, 5.0)
    with pytest.raises(
        InvalidArgument, match="LUTHIER_WEBHOOKS_TIMEOUT_SECONDS must be above 0 and at most 300"
    ):
        read(WebhookConfig, section="WEBHOOKS", environ={"LUTHIER_WEBHOOKS_TIMEOUT_SECONDS": "0"})
