"""Digests over sets of files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def files_digest(sha256_by_path: Mapping[str, str]) -> str:
    """Return one sha256 in hex over the names and digests of files, whatever their order."""
    hasher = hashlib.sha256()
    for path in sorted(sha256_by_path):
        hasher.update(f"{path}\0{sha256_by_path[path]}\n".encode())
    return hasher.hexdigest()
