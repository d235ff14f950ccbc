"""Digests over sets of files: what tells that two models, or two tokenizers, are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def files_digest(sha256_by_path: Mapping[str, str]) -> str:
    """Return one sha256 in hex over the names and digests of files, whatever their order."""
    hasher = hashlib.sha256()
    for path in sorted(sha256_by_path):
        hasher.update(f"{path}\0{sha256_by_path[path]}\n".encode())
    return hasher.hexdigest()


def contents_digest(contents_by_path: Mapping[str, bytes]) -> str:
    """Return the `files_digest` of files that are in memory."""
    return files_digest({path: hashlib.sha256(data).hexdigest() for path, data in contents_by_path.items()})
