"""Where traces go is said in the environment; what is kept is what a span is around."""

from __future__ import annotations

import socket
import sys
import time

import pytest
from tests.kept_spans import kept_spans

from luthier.errors import FailedPrecondition, InvalidArgument
from luthier.runtime import tracing
from luthier.runtime.otel import otlp_tracer


def test_nothing_is_kept_and_nothing_is_carried_where_nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUTHIER_TRACES_ADDRESS", raising=False)
    with tracing.traced("data"), tracing.span("a", parent="") as span:
        assert not tracing.is_on()
        assert (span.trace_id, span.traceparent, tracing.carried()) == ("", "", ())
        tracing.past("b", 1.0)


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("ADDRESS", "collector:4317", "host:port on loopback or https://host:port"),
        ("ADDRESS", "http://127.0.0.1:4317", "host:port on loopback"),
        ("ADDRESS", "127.0.0.1", "host:port on loopback"),
        ("SHARE", "1.5", "in 0..1, got 1.5"),
        ("SHARE", "much", "a number, got 'much'"),
        ("RATIO", "1", "LUTHIER_TRACES_RATIO is not a setting"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, right: str
) -> None:
    monkeypatch.setenv("LUTHIER_TRACES_ADDRESS", "127.0.0.1:4317")
    monkeypatch.setenv(f"LUTHIER_TRACES_{name}", value)
    with pytest.raises(InvalidArgument, match=right), tracing.traced("data"):
        pass
    assert not tracing.is_on()


def test_without_the_extra_the_setting_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_TRACES_ADDRESS", "127.0.0.1:4317")
    # A part of it alone is there where another package asks for that.
    for name in list(sys.modules):
        if name.startswith("luthier.runtime.otel"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(FailedPrecondition, match=r"pip install 'luthier\[otel\]'"), tracing.traced("data"):
        pass


def test_an_sdk_that_keeps_nothing_is_refused_together_with_an_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "True")
    with tracing.traced("data"):
        assert not tracing.is_on()
    monkeypatch.setenv("LUTHIER_TRACES_ADDRESS", "127.0.0.1:4317")
    with pytest.raises(InvalidArgument, match="OTEL_SDK_DISABLED=true"), tracing.traced("data"):
        pass


@pytest.mark.parametrize("answers", ["refused", "never"])
def test_a_receiver_that_is_away_does_not_hold_the_end(
    answers: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        if answers == "refused":
            mute.close()
        tracer = otlp_tracer(f"127.0.0.1:{port}", 1.0, "data", "")
        with tracer.span("root", "internal", "", (), {}):
            for _ in range(1500):  # three batches
                tracer.past("part", 1.0, {}, "")
        began = time.monotonic()
        tracer.close(0.5)
        assert time.monotonic() - began < 2.0
    assert "the last spans are lost" in caplog.text


def test_a_part_is_of_the_span_around_it_and_of_none_where_there_is_none() -> None:
    with kept_spans() as kept:
        tracing.past("alone", 1.0)
        with tracing.span("nobody's"):
            pass
        with tracing.span("root", parent="") as root, tracing.span("part"):
            tracing.past("over", 2.0, {"x": 1}, failed="CRASHED")
            assert tracing.carried() == (("traceparent", tracing.current().traceparent),)
            assert tracing.current().traceparent != root.traceparent
    assert {span.name for span in kept.all} == {"root", "part", "over"}
    over = kept.one("over")
    assert over.start_time is not None
    assert over.end_time is not None
    assert over.end_time - over.start_time == 2_000_000_000
    assert (over.status.description, dict(over.attributes or {})) == ("CRASHED", {"x": 1})
    assert kept.below(kept.one("root")) == ["part"]
    assert kept.below(kept.one("part")) == ["over"]


def test_a_share_of_none_keeps_none_and_says_so_to_others() -> None:
    with kept_spans(share=0.0) as kept, tracing.span("root", parent="") as root:
        assert root.trace_id == ""
        assert not int(root.traceparent[-2:], 16) & 1, "others are not to keep it either"
        assert tracing.carried()
        tracing.past("over", 1.0)
    assert kept.all == ()
