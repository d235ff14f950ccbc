"""Where a base model comes from, and what registering it makes. Imports no torch: who orders it needs none."""

from dataclasses import dataclass
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""The tokenizer bundle; the last is there when the model has a chat template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufSource:
    """A GGUF file; quantised weights are expanded."""

    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectorySource:
    """A directory in transformers' layout, safetensors only."""

    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A repository of a Hugging Face hub at a revision: commit, tag or branch.

    `endpoint` None is the hub that `HF_ENDPOINT` names, or the public one; `token` None is anonymous.
    """

    repo_id: str
    revision: str
    endpoint: str | None = None
    token: str | None = None


Source = GgufSource | DirectorySource | HubSource


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredFiles:
    """What registering made: files as (name, path) in name order, and what the model is.

    `context_length` is in tokens; `eos_token_ids` end a text and `end_of_turn_token_ids` a turn of its chat
    template; generation stops at either. `warnings` are what whoever uses the model should know. `hub_commit` is the
    commit that was taken, empty for local sources.
    """

    files: tuple[tuple[str, Path], ...]
    architecture: str
    num_parameters: int
    context_length: int
    vocab_size: int
    dtype: str
    has_chat_template: bool
    eos_token_ids: tuple[int, ...]
    end_of_turn_token_ids: tuple[int, ...]
    warnings: tuple[str, ...] = ()
    hub_commit: str = ""
