"""`luthier generate`."""

from __future__ import annotations

import sys
from typing import Any

import click

from luthier.client.cli.completing import names_in
from luthier.client.cli.session import Session, pass_session


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--model",
    required=True,
    shell_complete=names_in("models"),
    help="Base model, tuned model or @ALIAS that answers.",
)
@click.option("--system", help="System message before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the model's chat template.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=0), default=0, help="Longest answer. [default: 256]"
)
@click.option("--temperature", type=float, default=0.0, help="0 is greedy. [default: 0]")
@click.option("--top-p", type=float, default=0.0, help="Share of probability to sample from. [default: 1]")
@click.option("--seed", type=int, default=0, help="Seed of the sampling. [default: 0]")
@click.option(
    "--base-precision",
    type=click.Choice(["bfloat16", "int8", "nf4"]),
    help="What the base model is held in. [default: as the model was trained]",
)
@click.option(
    "--chat",
    is_flag=True,
    help="Go on: each line of stdin is said next, and all before is remembered. See /help.",
)
@pass_session
def generate(
    session: Session,
    prompt: str | None,
    model: str,
    system: str | None,
    raw: bool,
    chat: bool,
    **options: Any,
) -> None:
    """Answer PROMPT, or what comes on stdin. Ctrl-C stops the model too."""
    from luthier.v1.base_precision_pb2 import BasePrecision
    from luthier.v1.chat_pb2 import ChatMessage
    from luthier.v1.evaluation_service_pb2 import GenerateTextRequest

    if raw and (system or chat):
        raise click.UsageError("--system and --chat need a chat template, --raw goes without one")
    if prompt == "-" or (prompt is None and not chat):
        prompt = sys.stdin.read()
    if not prompt and not chat:
        raise click.UsageError("give a prompt, as an argument or on stdin")
    precision = options.pop("base_precision")
    request = GenerateTextRequest(model=model, **options)
    if precision is not None:
        request.base_precision = BasePrecision.Value(f"BASE_PRECISION_{precision.upper()}")
    if chat:
        from luthier.client.cli.chatting import Chat

        Chat(session, request, system).go_on(prompt)
        return
    assert prompt is not None
    messages = [ChatMessage(role="system", content=system)] if system else []
    messages.append(ChatMessage(role="user", content=prompt))
    with session.client.generate(request, prompt if raw else messages) as pieces:
        source = 0
        for piece in pieces:
            source = piece.template_source
            if session.for_programs:
                session.show_line(piece)
            else:
                session.write(piece.text)
    if not session.for_programs:
        click.echo()
        _say_what_is_not_known(session, model, source)


def _say_what_is_not_known(session: Session, model: str, source: int) -> None:
    """Name a tuned model that was asked as its base, because nothing says any more how it was taught."""
    from luthier.v1.evaluation_pb2 import TEMPLATE_SOURCE_BASE

    if source != TEMPLATE_SOURCE_BASE:
        return
    if model.startswith("@"):
        model = session.client.aliases.get(model).current.model
    if session.client.models.get(model).base_model:
        click.secho(
            f"warning: nothing says any more how {model} was taught; it was asked with the base model's template",
            err=True,
            fg="yellow",
        )
