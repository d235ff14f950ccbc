"""What helps against an error, as far as the command that met it can do it: it names no option that this has not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

from luthier.errors import LuthierError, Reason

_UNREADABLE = "mend the file first: what cannot be read cannot be left out"
_WAYS: Mapping[str, Sequence[tuple[str, str]]] = {
    Reason.INVALID_RECORDS: (
        ("--policy", "`luthier datasets errors VERSION` lists them; --policy skip leaves them out"),
    ),
    Reason.CHAT_TEMPLATE_MISSING: (
        ("--raw", "continue plain text with --raw"),
        ("--chat-template", "give a chat template with --chat-template FILE"),
        ("--template", "give the arm a chat template with --template ARM=FILE"),
    ),
}
"""By reason: options, and what to do with each. The first that a command has is named."""
_OTHERWISE: Mapping[str, str] = {
    Reason.SERVICE_UNAVAILABLE: "is `luthierd up` running? --data-address, --training-address and"
    " --evaluation-address say where, and `luthier doctor` looks at each",
    Reason.INVALID_RECORDS: "`luthier datasets errors VERSION` lists them; a version that `luthier datasets create"
    " --policy skip` makes leaves them out",
    Reason.CREDENTIALS_INVALID: "the key must be the one in the api-key file of the services' home, or one that"
    " `luthierd grant-key` printed: services know that one once they have started again; `luthier doctor` says which"
    " key is sent",
}
"""By reason: what any command says. Options outside of a command in quotes are those of `luthier` itself."""


def hint_of(error: LuthierError, command: click.Command | None) -> str | None:
    """Return what helps against an error that ended a command, if anything does; None: before any command began."""
    if error.metadata.get("skippable") == "false":
        return _UNREADABLE
    known = set() if command is None else {option for one in command.params for option in one.opts}
    ways = (text for option, text in _WAYS.get(error.reason, ()) if option in known)
    return next(ways, _OTHERWISE.get(error.reason))
