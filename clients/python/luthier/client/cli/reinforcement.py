"""What the command line has of reinforcement: options of jobs, and `luthier jobs rollouts`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

import click

from luthier.client.cli.completing import complete_names
from luthier.client.cli.drafts import field_option, message_of
from luthier.client.cli.session import Session, pass_session
from luthier.client.escaping import escaped_line

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from luthier.v1.grader_pb2 import Grader
    from luthier.v1.rollout_pb2 import Rollout

REINFORCEMENT_OPTIONS = (
    field_option(
        "--reinforcement",
        field="reinforcement",
        type=click.Path(exists=True, dir_okay=False, allow_dash=True),
        is_read=False,
        metavar="GRADER",
        help="Learn from rewards of answers to a PROMPT rendering: a grader in YAML or JSON.",
    ),
    field_option(
        "--num-samples",
        field="reinforcement.num_samples",
        type=int,
        help="Answers drawn to each prompt, with --reinforcement. [default: 8]",
    ),
    field_option(
        "--max-new-tokens",
        field="reinforcement.max_new_tokens",
        type=int,
        help="Longest answer, with --reinforcement. [default: 256]",
    ),
)
"""Of commands that make a job."""
_PROMPT_CHARACTERS = 60
_ANSWER_CHARACTERS = 80
_MOST_SHOWN = 100


@click.command()
@click.argument("name", shell_complete=complete_names)
@click.option("--step", type=click.IntRange(min=1), help="Only those of this step.  [default: of all]")
@click.option(
    "--limit", type=click.IntRange(min=1), help=f"Most to show.  [default: {_MOST_SHOWN}; with --json all]"
)
@pass_session
def rollouts(session: Session, name: str, step: int | None, limit: int | None) -> None:
    """Show what a reinforcement job drew from its model, and what that was worth, answer by answer."""
    found = session.client.jobs.rollouts(name, step=step or 0)
    most = limit or (None if session.for_programs else _MOST_SHOWN)
    session.show_list(islice(found, most), _table)
    if most is not None and next(found, None) is not None:
        session.note(f"the first {most} are shown; --limit or --step shows others")


def read_grader(path: str) -> Grader:
    """Read a grader from a file. Raises UsageError that names the place in it."""
    from luthier.v1.grader_pb2 import Grader

    return message_of(path, Grader)


def _table(rollouts: Iterable[Rollout]) -> Table:
    from luthier.client.cli.views import table

    made = table("#STEP", "#GROUP", "#SAMPLE", "#REWARD", "#ADVANTAGE", "#TOKENS", "END", "PROMPT", "ANSWER")
    for one in rollouts:
        made.add_row(
            str(one.step),
            str(one.group),
            str(one.sample),
            _reward(one),
            f"{one.advantage:+.3g}" if one.advantage else "0",
            str(len(one.token_ids)),
            _end(one),
            _shortened(one.prompt_text, _PROMPT_CHARACTERS),
            _shortened(one.output_text, _ANSWER_CHARACTERS),
        )
    return made


def _reward(one: Rollout) -> Text | str:
    from rich.text import Text

    if one.HasField("error"):
        return Text(escaped_line(one.error.message), "red")
    return f"{one.reward:.4g}" if one.HasField("reward") else ""


def _end(one: Rollout) -> str:
    from luthier.v1.evaluation_pb2 import FinishReason

    known = one.finish_reason in FinishReason.values()
    return (
        FinishReason.Name(one.finish_reason).removeprefix("FINISH_REASON_").lower()
        if known
        else str(one.finish_reason)
    )


def _shortened(text: str, most: int) -> Text:
    """Return a text on one line; of a long one its beginning and its end, where a question is asked and answered."""
    from rich.text import Text

    half = most // 2
    return Text(escaped_line(text if len(text) <= most else f"{text[:half]} … {text[-half:]}"))
