"""`luthier generate --chat`: a conversation, a line at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from luthier.client.cli.session import Session
from luthier.errors import LuthierError
from luthier.v1.chat_pb2 import ChatMessage

if TYPE_CHECKING:
    from luthier.v1.evaluation_service_pb2 import GenerateTextRequest, GenerateTextResponse

_HELP = (
    "/reset forgets all that was said, /system TEXT does and says what comes before, /undo takes the last turn back, "
    "/exit or Ctrl-D ends; Ctrl-C stops an answer, what was said of it stays"
)


class Chat:
    """What was said so far, and who answers. What the model says goes to stdout, everything else to stderr."""

    def __init__(self, session: Session, request: GenerateTextRequest, system: str | None) -> None:
        self._session = session
        self._request = request
        self._system = system or ""
        self.messages: list[ChatMessage] = []
        self._begin()

    def go_on(self, prompt: str | None) -> None:
        """Answer a first prompt, if there is one, and then line after line until there is no more.

        An answer that fails takes its turn back; at a terminal the conversation goes on. Raises LuthierError where
        nobody is there to go on.
        """
        is_watched = sys.stdin.isatty()
        if is_watched:
            self._session.note(f"chat with {self._request.model}; {_HELP}")
        for line in _lines(prompt, is_watched):
            try:
                if not self._take(line):
                    return
            except LuthierError as error:
                if not is_watched:
                    raise
                self._session.note(f"error: {error.message} [{error.reason}]")

    def _take(self, line: str) -> bool:
        """Answer a line, or do what it says; returns whether the conversation goes on. Raises LuthierError."""
        if line.startswith("/"):
            return self._obey(line)
        if line.strip():
            self.answer(line)
        return True

    def answer(self, text: str) -> None:
        """Have the model answer, and remember both. Raises LuthierError; then neither is remembered."""
        asked = ChatMessage(role="user", content=text)
        said: list[str] = []
        with self._session.client.generate(self._request, [*self.messages, asked]) as pieces:
            try:
                for piece in pieces:
                    said.append(piece.text)
                    self._show(piece)
            except KeyboardInterrupt:
                self._session.note(" (stopped)")
        if not self._session.for_programs:
            self._session.write("\n")
        self.messages += [asked, ChatMessage(role="assistant", content="".join(said))]

    def _show(self, piece: GenerateTextResponse) -> None:
        if self._session.for_programs:
            self._session.show_line(piece)
        else:
            self._session.write(piece.text)

    def _begin(self) -> None:
        self.messages = [ChatMessage(role="system", content=self._system)] if self._system else []

    def _obey(self, line: str) -> bool:
        """Do what a line with a slash says; returns whether the conversation goes on."""
        word, _, rest = line.partition(" ")
        match word.strip():
            case "/exit" | "/quit":
                return False
            case "/reset":
                self._begin()
            case "/system":
                self._system = rest.strip()
                self._begin()
            case "/undo":
                if self.messages and self.messages[-1].role == "assistant":
                    del self.messages[-2:]
            case "/help":
                self._session.note(_HELP)
            case _:
                self._session.note(f"{word} is not known; {_HELP}")
        return True


def _lines(first: str | None, is_watched: bool) -> Iterator[str]:
    """Yield what is said, line by line: a terminal is asked with a prompt, and remembers earlier lines."""
    if first:
        yield first
    if is_watched:
        with suppress(ImportError):
            import readline  # noqa: F401 - `input` edits and remembers lines once it is imported
        while True:
            try:
                yield input("> ")
            except EOFError:
                return
    for line in sys.stdin:
        yield line.rstrip("\n")
