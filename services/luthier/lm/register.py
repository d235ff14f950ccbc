"""Turn a source (GGUF file, model directory, hub repository) into a plain model directory of known files.

Weights become bfloat16 safetensors, the tokenizer becomes the tokenizer bundle. The same source gives the
same bytes.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub import errors as hub_errors
from transformers import AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerFast

from luthier.errors import InvalidArgument, NotFound, Reason, Unavailable
from luthier.lm.load import ARCHITECTURES, check_config, load_weights, read_config

WEIGHT_FILES = ("model.safetensors", "config.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""The tokenizer bundle; the last is there when the model has a chat template."""

_HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model")
_UNSAFE_SUFFIXES = (
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".msgpack",
    ".h5",
    ".joblib",
    ".npy",
    ".npz",
)
_END_OF_TURN_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|endofturn|>",
)
# One file whatever the size: a model is named by the digests of its files, which must not depend on a shard
# size.
_ONE_SHARD = "1000GB"


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
    template; generation stops at either. `hub_commit` is the commit that was taken, empty for local sources.
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
    hub_commit: str = ""


def register_source(source: Source, directory: Path, *, scratch: Path) -> RegisteredFiles:
    """Write the model that `source` names into `directory` (made if missing, must be empty).

    Takes the model's size in memory once in bfloat16, for a GGUF file once more in float32. `scratch`
    receives what is downloaded.

    Raises:
        NotFound: the file, the directory, the repository or its revision is not there.
        InvalidArgument: the source holds pickles, code or symbolic links (reason UNSAFE_MODEL_FILE); or it
        is not a
            model that we compute, whole and readable (reason MODEL_INVALID).
        Unavailable: the hub does not answer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise InvalidArgument(f"the directory to write must be empty, {directory.name} is not")
    commit = ""
    if isinstance(source, GgufSource):
        model, tokenizer = _open_gguf(source.path)
    elif isinstance(source, DirectorySource):
        model, tokenizer = _open_directory(source.path)
    else:
        commit = _commit(source)
        model, tokenizer = _open_directory(_download(source, commit, scratch))
    plain = _plain(model)
    del model
    plain.save_pretrained(directory, max_shard_size=_ONE_SHARD)
    tokenizer.save_pretrained(directory)
    return replace(_describe(plain, tokenizer, directory), hub_commit=commit)


def _require_no_symlink(path: Path) -> None:
    """Refuse a path that leads elsewhere by now: it was checked when the registration was asked for."""
    if path.absolute() != path.resolve():
        raise InvalidArgument(
            f"a model must be named by its real path, {path.name} is a symbolic link or lies below one",
            reason=Reason.UNSAFE_MODEL_FILE,
        )


def _open_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    _require_no_symlink(path)
    if not path.is_file():
        raise NotFound(f"there is no GGUF file {path.name}")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InvalidArgument(
            f"a GGUF file must begin with the bytes GGUF, {path.name} begins with {magic!r}",
            reason=Reason.MODEL_INVALID,
        )
    model = load_weights(
        path.parent,
        gguf_file=path.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    return model, _open_tokenizer(path.parent, gguf_file=path.name)


def _open_directory(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    _require_no_symlink(path)
    if not path.is_dir():
        raise NotFound(f"there is no model directory {path.name}")
    files = sorted(file for file in path.iterdir() if file.name != ".cache")
    for file in files:
        if file.is_symlink():
            raise InvalidArgument(
                f"a model directory must hold plain files, {file.name} is a symbolic link",
                reason=Reason.UNSAFE_MODEL_FILE,
            )
        if file.suffix.lower() in _UNSAFE_SUFFIXES:
            raise InvalidArgument(
                f"weights must be safetensors; {file.name} is of a kind that can run code when loaded",
                reason=Reason.UNSAFE_MODEL_FILE,
            )
        if file.name.endswith(".index.json"):
            _check_index(file)
    check_config(read_config(path))
    return load_weights(path, dtype=torch.bfloat16), _open_tokenizer(path)


def _check_index(path: Path) -> None:
    """Refuse an index of weights that names a file elsewhere: transformers would open it."""
    try:
        places = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(
            f"{path.name} must hold a weight_map of file names, got {type(error).__name__}: {error}",
            reason=Reason.MODEL_INVALID,
        ) from error
    here = {file.name for file in path.parent.iterdir()}
    if foreign := sorted(str(place) for place in places if place not in here):
        raise InvalidArgument(
            f"{path.name} must name files of its own directory, got {foreign[0]!r}",
            reason=Reason.UNSAFE_MODEL_FILE,
        )


def _commit(source: HubSource) -> str:
    """Return the commit that the revision stands for now: a branch moves on, a model must not."""
    with _hub_errors(source):
        api = HfApi(endpoint=source.endpoint, token=source.token or False)
        commit = api.model_info(source.repo_id, revision=source.revision).sha
    if not commit:
        raise Unavailable(f"the hub names no commit for {source.repo_id}@{source.revision}")
    return commit


def _download(source: HubSource, commit: str, scratch: Path) -> Path:
    with _hub_errors(source):
        folder = snapshot_download(
            source.repo_id,
            revision=commit,
            local_dir=scratch / "snapshot",
            allow_patterns=list(_HUB_PATTERNS),
            endpoint=source.endpoint,
            token=source.token or False,
        )
    return Path(folder).resolve()


@contextmanager
def _hub_errors(source: HubSource) -> Iterator[None]:
    try:
        yield
    except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError) as error:
        raise NotFound(
            f"the hub has no {source.repo_id} at {source.revision}, or it is not public"
        ) from error
    except hub_errors.HFValidationError as error:
        raise InvalidArgument(f"a hub id must be owner/name, got {source.repo_id!r}: {error}") from error
    # The client lets the errors of its HTTP library through, and has changed that library more than once.
    except Exception as error:
        raise Unavailable(f"the hub did not deliver {source.repo_id}@{source.revision}: {error}") from error


def _open_tokenizer(path: Path, **options: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, **options
        )
    # A tokenizer's parser fails with whatever it stumbles over; the tokenizers library raises bare Exception.
    except Exception as error:
        raise InvalidArgument(
            f"the tokenizer must be readable by transformers, got {type(error).__name__}: {error}",
            reason=Reason.MODEL_INVALID,
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InvalidArgument(
            f"the tokenizer must have a tokenizer.json form, {type(tokenizer).__name__} has none",
            reason=Reason.MODEL_INVALID,
        )
    return tokenizer


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a fresh model: a GGUF's remembers its quantisation and would not save."""
    architecture = type(model).__name__
    if architecture not in ARCHITECTURES:
        raise InvalidArgument(
            f"the architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture}",
            reason=Reason.MODEL_INVALID,
        )
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(model.config)(**settings)
    config.architectures = [architecture]
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        plain = type(model)(config)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _describe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> RegisteredFiles:
    template = directory / "chat_template.jinja"
    names = [name for name in (*WEIGHT_FILES, *TOKENIZER_FILES) if (directory / name).is_file()]
    for path in directory.iterdir():
        if path.is_dir():
            # transformers writes named templates besides the default one; a tokenizer bundle holds one template.
            shutil.rmtree(path)
        elif path.name not in names:
            path.unlink()
    text = template.read_text(encoding="utf-8") if template.is_file() else ""
    config = model.config
    return RegisteredFiles(
        files=tuple((name, directory / name) for name in sorted(names)),
        architecture=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        context_length=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        dtype="bfloat16",
        has_chat_template=bool(text),
        eos_token_ids=_eos_token_ids(model, tokenizer),
        end_of_turn_token_ids=_known_ids(
            tokenizer, [token for token in _END_OF_TURN_TOKENS if token in text]
        ),
    )


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    declared = model.generation_config.eos_token_id if model.generation_config else None
    ids = set(declared) if isinstance(declared, list) else {declared, tokenizer.eos_token_id}
    return tuple(sorted(token for token in ids if token is not None))


def _known_ids(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> tuple[int, ...]:
    vocabulary = tokenizer.get_vocab()
    return tuple(sorted(vocabulary[token] for token in tokens if token in vocabulary))
