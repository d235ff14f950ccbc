"""The `luthier` command. Entry point: `main`.

Data goes to stdout, messages to stderr. With --json stdout is proto JSON with the fields' original names: one
object for one resource, one array for a list, one object per line for what is streamed (watch, generate).
Nothing is animated when stderr is not a terminal, and NO_COLOR is obeyed.

Exit codes: 0 done, 1 error, 2 wrong usage, 3 not found, 4 no or wrong credentials, 5 unavailable or over a
limit, 6 the version, rendering, model, job or evaluation failed or was cancelled, 130 interrupted.
"""

from luthier.client.cli.root import main

__all__ = ["main"]
