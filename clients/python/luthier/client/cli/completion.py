"""`luthier completion`: have the shell complete commands, options and names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from luthier.client.cli.groups import SuggestingGroup

SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_LUTHIER_COMPLETE"
_MARK = "# completion of luthier"


@click.group(cls=SuggestingGroup)
def completion() -> None:
    """Have the shell complete commands, options, and names of resources."""


@completion.command()
@click.argument("shell", type=click.Choice(SHELLS), required=False)
def install(shell: str | None) -> None:
    """Install it for SHELL, by default the one that runs. Repeating changes nothing."""
    from luthier.client.config import environment

    chosen = shell or _running_shell(environment())
    for line in installed(chosen, _script(chosen), Path.home(), environment()):
        click.echo(line)


@completion.command()
@click.argument("shell", type=click.Choice(SHELLS))
def show(shell: str) -> None:
    """Print the script for SHELL, for whoever keeps such files himself."""
    click.echo(_script(shell))


def installed(shell: str, script: str, home: Path, environ: Mapping[str, str]) -> list[str]:
    """Write a shell's script where the shell finds it; returns what was done, a line each.

    fish looks into a folder of its user's by itself. The others are told once, at the end of their start-up file.
    """
    data = Path(environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    configuration = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    if shell == "fish":
        return [
            _write(configuration / "fish" / "completions" / "luthier.fish", script),
            "it is there in new shells",
        ]
    path = data / "luthier" / f"completion.{shell}"
    said = [_write(path, script)]
    start = Path(environ.get("ZDOTDIR") or home) / ".zshrc" if shell == "zsh" else home / ".bashrc"
    there = start.read_text() if start.exists() else ""
    if _MARK not in there:
        begin = "" if not there or there.endswith("\n") else "\n"
        # zsh has no compdef before compinit has run, which is quick where it has.
        lines = ["autoload -Uz compinit && compinit"] if shell == "zsh" else []
        with start.open("a") as file:
            file.write(begin + "\n".join([_MARK, *lines, f". '{path}'"]) + "\n")
        said.append(f"{start} reads it")
    return [*said, f"it is there in new shells; in this one: . {path}"]


def _write(path: Path, script: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script + "\n")
    return f"{path} is written"


def _script(shell: str) -> str:
    from click.shell_completion import get_completion_class

    from luthier.client.cli.root import main

    kind = get_completion_class(shell)
    assert kind is not None, shell
    return kind(main, {}, "luthier", _VARIABLE).source()


def _running_shell(environ: Mapping[str, str]) -> str:
    name = Path(environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise click.UsageError(f"name the shell, one of {', '.join(SHELLS)}: SHELL is {name or 'not set'}")
    return name
