"""API: how many calls, how many fail and why, how long they take, what goes over the wire; and who is called."""

from __future__ import annotations

from deploy.grafana.builder import Dashboard, Panel, Query, Row, Variable
from deploy.grafana.expressions import SERVICE_ERRORS, gained, quantile, rate, ratio

_SERVICE = 'grpc_service=~"$grpc_service"'
_UNARY = _SERVICE + ', grpc_method!="ClaimTask"'
_CALLS = Row(
    title="Calls",
    panels=(
        Panel(
            title="Calls a second",
            unit="reqps",
            queries=(
                Query(
                    expr=rate("grpc_server_started_total", "grpc_method", _SERVICE), legend="{{grpc_method}}"
                ),
            ),
        ),
        Panel(
            title="By status code",
            unit="reqps",
            stacked=True,
            queries=(
                Query(expr=rate("grpc_server_handled_total", "grpc_code", _SERVICE), legend="{{grpc_code}}"),
            ),
        ),
        Panel(
            title="Share that fails here",
            unit="percentunit",
            queries=(
                Query(
                    expr=ratio(
                        rate("grpc_server_handled_total", selector=f"{_SERVICE}, {SERVICE_ERRORS}"),
                        rate("grpc_server_handled_total", selector=_SERVICE),
                    ),
                    legend="fault of the service",
                ),
                Query(
                    expr=ratio(
                        rate(
                            "grpc_server_handled_total", selector=f'{_SERVICE}, grpc_code="ResourceExhausted"'
                        ),
                        rate("grpc_server_handled_total", selector=_SERVICE),
                    ),
                    legend="refused",
                ),
            ),
        ),
        Panel(
            title="Why calls fail",
            queries=(
                Query(
                    expr=gained("luthier_grpc_failed_total", "grpc_code, reason", _SERVICE),
                    legend="{{grpc_code}} {{reason}}",
                ),
            ),
        ),
        Panel(
            title="Refused at the door, and by what was used up",
            queries=(
                Query(
                    expr=gained("luthier_calls_refused_total", "pool, reason"), legend="{{pool}} {{reason}}"
                ),
            ),
        ),
        Panel(
            title="Slots taken and waited for",
            queries=(
                Query(expr="sum by (pool) (luthier_calls_running)", legend="{{pool}} running"),
                Query(expr="sum by (pool) (luthier_calls_waiting)", legend="{{pool}} waiting"),
            ),
        ),
    ),
)
_TIMES = Row(
    title="Latency",
    panels=(
        Panel(
            title="Unary calls",
            unit="s",
            queries=tuple(
                Query(
                    expr=quantile(share, "grpc_server_handling_seconds", selector=_UNARY),
                    legend=f"{share:.0%}",
                )
                for share in (0.5, 0.95, 0.99)
            ),
            about="ClaimTask left out: it waits for work, as it is meant to.",
        ),
        Panel(
            title="99 % by method",
            unit="s",
            queries=(
                Query(
                    expr=f"topk(10, {quantile(0.99, 'grpc_server_handling_seconds', 'grpc_method', _UNARY)})",
                    legend="{{grpc_method}}",
                ),
            ),
        ),
        Panel(
            title="How long streams last (median)",
            unit="s",
            queries=(
                Query(
                    expr=quantile(0.5, "luthier_grpc_stream_seconds", "grpc_method", _SERVICE),
                    legend="{{grpc_method}}",
                ),
            ),
        ),
    ),
)
_WIRE = Row(
    title="Connections and process",
    panels=(
        Panel(
            title="Calls in flight",
            width=6,
            queries=(
                Query(
                    expr=f"sum by (grpc_method) (luthier_grpc_in_flight{{{_SERVICE}}}) > 0",
                    legend="{{grpc_method}}",
                ),
            ),
            stacked=True,
        ),
        Panel(
            title="Messages a second",
            width=6,
            queries=(
                Query(expr=rate("grpc_server_msg_received_total", selector=_SERVICE), legend="received"),
                Query(expr=rate("grpc_server_msg_sent_total", selector=_SERVICE), legend="sent"),
            ),
        ),
        Panel(
            title="Size of messages (99 %)",
            unit="bytes",
            width=6,
            queries=(
                Query(
                    expr=quantile(0.99, "luthier_grpc_received_bytes", "grpc_type", _SERVICE),
                    legend="{{grpc_type}} received",
                ),
                Query(
                    expr=quantile(0.99, "luthier_grpc_sent_bytes", "grpc_type", _SERVICE),
                    legend="{{grpc_type}} sent",
                ),
            ),
        ),
        Panel(
            title="Loop's lag (99 %), calls' wait",
            unit="s",
            width=6,
            queries=(
                Query(
                    expr=quantile(0.99, "luthier_event_loop_lag_seconds", "instance"),
                    legend="{{instance}} lag",
                ),
                Query(expr="luthier_calls_intake_wait_seconds", legend="{{instance}} wait"),
            ),
        ),
        Panel(
            title="CPU",
            unit="percentunit",
            queries=(
                Query(
                    expr="rate(process_cpu_seconds_total[$__rate_interval]) and on (instance) luthier_build_info",
                    legend="{{instance}}",
                ),
            ),
            about="A service is one thread of Python and some of SQLite's and gRPC's: near 100 % it is full.",
        ),
        Panel(
            title="Memory",
            unit="bytes",
            queries=(
                Query(
                    expr="process_resident_memory_bytes and on (instance) luthier_build_info",
                    legend="{{instance}}",
                ),
            ),
        ),
        Panel(
            title="Descriptors",
            unit="percentunit",
            queries=(
                Query(
                    expr="process_open_fds / process_max_fds and on (instance) luthier_build_info",
                    legend="{{instance}}",
                ),
            ),
        ),
    ),
)
_WEBHOOKS = Row(
    title="Webhooks",
    panels=(
        Panel(
            title="Attempts, by how they end",
            width=6,
            queries=(Query(expr=gained("luthier_webhook_attempts_total", "result"), legend="{{result}}"),),
            about="Not sent for a fault of this side: not_allowed, not_signed, failed. All others are the receiver's.",
        ),
        Panel(
            title="Time of an attempt",
            unit="s",
            width=6,
            queries=(
                Query(expr=quantile(0.5, "luthier_webhook_attempt_seconds"), legend="median"),
                Query(expr=quantile(0.95, "luthier_webhook_attempt_seconds"), legend="95 %"),
            ),
        ),
        Panel(
            title="Somebody has not been told for",
            unit="s",
            width=6,
            queries=(
                Query(expr="max by (service) (luthier_webhook_oldest_waiting_seconds)", legend="{{service}}"),
            ),
        ),
        Panel(
            title="Deliveries that wait, and that are over",
            width=6,
            queries=(
                Query(expr="sum(luthier_webhook_deliveries_waiting)", legend="waiting"),
                Query(expr=gained("luthier_webhook_deliveries_total", "outcome"), legend="{{outcome}}"),
            ),
        ),
    ),
)
BOARD = Dashboard(
    uid="luthier-api",
    title="Luthier / API",
    rows=(_CALLS, _TIMES, _WIRE, _WEBHOOKS),
    variables=(Variable(name="grpc_service", metric="grpc_server_started_total", label="grpc_service"),),
)
