"""PromQL that several panels use."""

from __future__ import annotations

WINDOW = "$__rate_interval"
SERVICE_ERRORS = 'grpc_code=~"Unknown|Internal|Unavailable|DataLoss|DeadlineExceeded"'
"""Codes that are the service's fault. ResourceExhausted is a refusal: shown, and no error."""


def rate(metric: str, by: str = "", selector: str = "") -> str:
    """Return the rate of a counter, summed by labels."""
    grouped = f"sum by ({by}) " if by else "sum"
    return (
        f"{grouped}(rate({metric}{{{selector}}}[{WINDOW}]))"
        if selector
        else f"{grouped}(rate({metric}[{WINDOW}]))"
    )


def gained(metric: str, by: str, selector: str = "") -> str:
    """Return by how much a counter of rare things rose of late, summed by labels.

    `increase` passes over the first of them: a series that begins with it has not risen since.
    """
    chosen = f"{metric}{{{selector}}}" if selector else metric
    return f"sum by ({by}) (clamp_min({chosen} - {chosen} offset {WINDOW}, 0) or {chosen})"


def quantile(share: float, histogram: str, by: str = "", selector: str = "") -> str:
    """Return a quantile of a histogram, by labels."""
    buckets = rate(f"{histogram}_bucket", f"le, {by}" if by else "le", selector)
    return f"histogram_quantile({share:g}, {buckets})"


def mean(histogram: str, by: str = "") -> str:
    """Return the mean of what a histogram observed, by labels."""
    return f"{rate(f'{histogram}_sum', by)} / {rate(f'{histogram}_count', by)}"


def ratio(part: str, whole: str) -> str:
    """Return a share that is 0 where nothing of the part is there."""
    return f"({part} or vector(0)) / {whole}"
