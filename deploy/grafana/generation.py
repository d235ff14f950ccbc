"""Generation: how many are answered, how soon and how fast, and how answers end."""

from __future__ import annotations

from deploy.grafana.builder import Dashboard, Panel, Query, Row
from deploy.grafana.expressions import gained, quantile, rate

_CALLERS = Row(
    title="Callers",
    panels=(
        Panel(
            title="Answered and waiting",
            queries=(
                Query(expr="sum(luthier_generations_running)", legend="answered"),
                Query(expr="sum(luthier_generations_waiting)", legend="waiting"),
            ),
        ),
        Panel(
            title="Time to the first token",
            unit="s",
            queries=tuple(
                Query(expr=quantile(share, "luthier_generation_first_token_seconds"), legend=f"{share:.0%}")
                for share in (0.5, 0.95, 0.99)
            ),
            about="It has the wait for a slot, and the loading of a model that was not in memory.",
        ),
        Panel(
            title="Seconds a token after it",
            unit="s",
            queries=tuple(
                Query(expr=quantile(share, "luthier_generation_token_seconds"), legend=f"{share:.0%}")
                for share in (0.5, 0.95)
            ),
        ),
    ),
)
_TEXT = Row(
    title="Text",
    panels=(
        Panel(
            title="Tokens of answers a second",
            queries=(Query(expr=rate("luthier_generation_answer_tokens_total"), legend="answers"),),
        ),
        Panel(
            title="Tokens of prompts a second",
            queries=(Query(expr=rate("luthier_generation_prompt_tokens_total"), legend="prompts"),),
        ),
        Panel(
            title="How answers end",
            queries=(
                Query(
                    expr=gained("luthier_generations_total", "finish_reason"),
                    legend="{{finish_reason}}",
                ),
            ),
            about="LENGTH: cut at max_new_tokens. GONE: nobody waited for the end any more.",
        ),
    ),
)
BOARD = Dashboard(uid="luthier-generation", title="Luthier / Generation", rows=(_CALLERS, _TEXT))
