"""Shares of calls and of work that went wrong, over the windows that alerts on burn rates compare.

What is promised is promised to callers: the worker protocol is left out. Its ClaimTask waits for up to 30 s, as it is
meant to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deploy.prometheus.rules import Recording

WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
CALLERS = 'grpc_service=~"luthier[.]v1[.].*"'
FAULTS = 'grpc_code=~"Unknown|Internal|Unavailable|DataLoss|DeadlineExceeded"'
"""Codes that no caller can do anything about."""
SLOW_SECONDS = "1.0"
"""A unary call that takes longer is slow."""


def error_ratio(window: str) -> str:
    """Return the name of the share of calls that failed for a fault of the service."""
    return f"grpc_service:grpc_server_handled:error_ratio_rate{window}"


def slow_ratio(window: str) -> str:
    """Return the name of the share of unary calls that were slow."""
    return f"grpc_service:grpc_server_handling_seconds:slow_ratio_rate{window}"


def fault_ratio(window: str) -> str:
    """Return the name of the share of ended work that failed for a fault of the service."""
    return f"kind:luthier_tasks_ended:fault_ratio_rate{window}"


def _errors(window: str) -> Recording:
    every = f"sum by (grpc_service) (rate(grpc_server_handled_total{{{CALLERS}}}[{window}]))"
    failed = f"sum by (grpc_service) (rate(grpc_server_handled_total{{{CALLERS}, {FAULTS}}}[{window}]))"
    # Where nothing has failed yet, the codes have no series: that is a share of 0 and not an unknown one.
    return Recording(record=error_ratio(window), expr=f"({failed} or 0 * {every}) / {every}")


def _slow(window: str) -> Recording:
    unary = f'grpc_type="unary", {CALLERS}'
    every = f"sum by (grpc_service) (rate(grpc_server_handling_seconds_count{{{unary}}}[{window}]))"
    quick = (
        "sum by (grpc_service) "
        f'(rate(grpc_server_handling_seconds_bucket{{{unary}, le="{SLOW_SECONDS}"}}[{window}]))'
    )
    return Recording(record=slow_ratio(window), expr=f"1 - {quick} / {every}")


def _faults(window: str) -> Recording:
    every = f"sum by (kind) (rate(luthier_tasks_ended_total[{window}]))"
    faults = f'sum by (kind) (rate(luthier_tasks_ended_total{{fault="service"}}[{window}]))'
    return Recording(record=fault_ratio(window), expr=f"{faults} / {every}")


GROUPS: Mapping[str, Sequence[Recording]] = {
    "luthier.calls": [rule(window) for rule in (_errors, _slow) for window in WINDOWS],
    "luthier.work": [_faults(window) for window in WINDOWS],
}
