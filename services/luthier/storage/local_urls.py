"""URLs of stores that are places of this machine: each is an absolute path, and nothing else may stand in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit

from luthier.errors import InvalidArgument


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalUrls:
    """The URLs of one kind of store.

    Attributes:
        setting: what such a URL is called.
        scheme: its scheme.
        before_path: what stands between the scheme and the path, which begins with a slash itself.
        example: the last part of a path, for messages.
    """

    setting: str
    scheme: str
    before_path: str
    example: str

    def of(self, path: Path) -> str:
        """Return the URL of a path."""
        return f"{self.scheme}:{self.before_path}{quote(str(path.absolute()))}"

    def path_of(self, url: str) -> Path:
        """Return the path that a URL names.

        Raises InvalidArgument for any other URL: it says what is wrong, and of the URL its scheme alone, as there may
        be a password in it.
        """
        # What `urlsplit` takes away without a word.
        if url != url.strip() or any(ord(character) < 0x20 for character in url):
            raise self._wrong("one that begins or ends with a space, or has a control character in it")
        try:
            parts = urlsplit(url)
            problem = self._problem(parts)
        except ValueError as error:
            raise self._wrong("one that cannot be read") from error
        if problem:
            raise self._wrong(problem)
        return Path(self._path(parts))

    def _path(self, parts: SplitResult) -> str:
        """Return the path, decoded; one that is not absolute does not begin with a slash."""
        path = unquote(parts.path.removeprefix(self.before_path.removeprefix("//")))
        # Two slashes at the beginning would be another path than one, and are the same folder.
        return f"/{path.lstrip('/')}" if path.startswith("/") else path

    def _problem(self, parts: SplitResult) -> str:
        if parts.scheme != self.scheme:
            known = f"of the scheme {parts.scheme!r}" if parts.scheme else "without a scheme"
            return f"one {known}: other stores are not supported"
        if parts.netloc:
            return "one with a user, a host or a port"
        if parts.query or parts.fragment:
            return "one with a query or a fragment: a ? in a path is written %3F, a # %23"
        path = self._path(parts)
        if not path.startswith("/"):
            return "one whose path is not absolute"
        if "\0" in path or path == "/":
            return "one whose path names nothing"
        return ""

    def _wrong(self, problem: str) -> InvalidArgument:
        right = f"{self.scheme}:{self.before_path}/path/of/{self.example}"
        return InvalidArgument(f"{self.setting} must be {right}, got {problem}")


DATABASES = LocalUrls(setting="database URL", scheme="sqlite+aiosqlite", before_path="///", example="a/file")
BLOBS = LocalUrls(setting="blob store URL", scheme="file", before_path="//", example="a/folder")
