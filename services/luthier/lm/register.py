"""Turn a source (GGUF file, model directory, hub repository) into a plain model directory of known files.

Weights become bfloat16 safetensors; a `tokenizer.json` is kept as it came, another tokenizer is converted to one. The
same source gives the same bytes.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub import errors as hub_errors
from transformers import GenerationConfig, PreTrainedModel

from luthier.errors import InvalidArgument, NotFound, Reason, Unavailable
from luthier.lm.apart import Apart, facts, here
from luthier.lm.gguf_header import GgufHeader, metadata_alone, read_header
from luthier.lm.load import eos_token_ids, load_weights, open_gguf
from luthier.lm.made import GENERATION_CONFIG
from luthier.lm.model_config import ARCHITECTURES, check_config, read_config, read_object
from luthier.lm.source_files import INDEX_SUFFIX, staged_file, staged_folder
from luthier.lm.sources import TOKENIZER_FILES, GgufSource, HubSource, RegisteredFiles, Source
from luthier.lm.tokenizer_files import open_gguf_tokenizer, write_converted, write_tokenizer
from luthier.lm.written_tokenizer import WrittenTokenizer

WEIGHT_FILES = ("model.safetensors", "config.json", GENERATION_CONFIG)
_HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model")
# One file whatever the size: a model is named by the digests of its files, which must not depend on a shard
# size.
_ONE_SHARD = "1000GB"


def register_source(
    source: Source, directory: Path, *, scratch: Path, apart: Apart = here
) -> RegisteredFiles:
    """Write the model that `source` names into `directory` (made if missing, must be empty).

    Takes the model's size in memory once in bfloat16, for a GGUF file once more in float32. `scratch`
    receives what is downloaded. `apart` runs what reads the tokenizer; what it raises ends it.

    Raises:
        NotFound: the file, the directory, the repository or its revision is not there.
        InvalidArgument: the source holds pickles, code, links or things that are no plain files (reason
            UNSAFE_MODEL_FILE); or it is not a model that we compute, whole and readable, with a tokenizer whose
            tokens can be kept (reason MODEL_INVALID).
        Unavailable: the hub does not answer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise InvalidArgument(f"the directory to write must be empty, {directory.name} is not")
    if isinstance(source, GgufSource):
        with staged_file(source.path, scratch) as file:
            model, header = _open_gguf(file)
            plain = _write_weights(model, directory)
            num_rows = _num_rows(plain)
            with metadata_alone(file, header.size_bytes, scratch) as alone:
                written = facts(
                    apart,
                    WrittenTokenizer,
                    lambda: write_converted(open_gguf_tokenizer(alone), directory, num_rows),
                )
        return _describe(plain, written, directory, header.end_ids)
    commit = _commit(source) if isinstance(source, HubSource) else ""
    path = _download(source, commit, scratch) if isinstance(source, HubSource) else source.path
    with staged_folder(path, scratch) as folder:
        plain = _write_weights(_open_directory(folder), directory)
        num_rows = _num_rows(plain)
        written = facts(apart, WrittenTokenizer, lambda: write_tokenizer(folder, directory, num_rows))
    return replace(_describe(plain, written, directory), hub_commit=commit)


def _write_weights(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    plain = _plain(model)
    plain.save_pretrained(directory, max_shard_size=_ONE_SHARD)
    return plain


def _num_rows(model: PreTrainedModel) -> int:
    """How many tokens the embedding has rows for."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    return embedding.num_embeddings


def _open_gguf(path: Path) -> tuple[PreTrainedModel, GgufHeader]:
    """Return the model, and what the file says that transformers does not read."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        # Not the bytes that are there: they may be of a file that whoever asks could not read otherwise.
        raise InvalidArgument(
            f"a GGUF file must begin with the bytes GGUF, {path.name} does not", reason=Reason.MODEL_INVALID
        )
    header = read_header(path)
    model = open_gguf(path, torch.bfloat16)
    rows = _num_rows(model)
    # What the model has no token for is told of, and is not handed on with its files.
    if any(token in range(rows) for token in header.end_ids):
        generation: Any = model.generation_config or GenerationConfig()  # type: ignore[no-untyped-call]
        generation.eos_token_id = sorted({*eos_token_ids(model), *header.end_ids}.intersection(range(rows)))
        model.generation_config = generation
    return model, header


def _open_directory(path: Path) -> PreTrainedModel:
    for index in sorted(path.glob(f"*{INDEX_SUFFIX}")):
        _check_index(index)
    if (path / GENERATION_CONFIG).is_file():
        read_object(path / GENERATION_CONFIG)
    check_config(read_config(path))
    return load_weights(path, dtype=torch.bfloat16)


def _check_index(path: Path) -> None:
    """Refuse an index of weights that names a file elsewhere: transformers would open it."""
    try:
        places = set(read_object(path)["weight_map"].values())
    except (KeyError, TypeError, AttributeError, InvalidArgument) as error:
        raise InvalidArgument(
            f"{path.name} must hold a weight_map of file names, it has none that can be read",
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


def _describe(
    model: PreTrainedModel, written: WrittenTokenizer, directory: Path, end_ids: Iterable[int] = ()
) -> RegisteredFiles:
    names = [name for name in (*WEIGHT_FILES, *TOKENIZER_FILES) if (directory / name).is_file()]
    for path in directory.iterdir():
        if path.is_dir():
            # transformers writes named templates besides the default one; a tokenizer bundle holds one template.
            shutil.rmtree(path)
        elif path.name not in names:
            path.unlink()
    config = model.config
    eos_ids, warnings = _eos_token_ids(model, written.eos_token_id, end_ids)
    return RegisteredFiles(
        files=tuple((name, directory / name) for name in sorted(names)),
        architecture=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        context_length=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        dtype="bfloat16",
        has_chat_template=written.has_chat_template,
        eos_token_ids=eos_ids,
        end_of_turn_token_ids=written.end_of_turn_token_ids,
        warnings=(*written.warnings, *warnings),
    )


def _eos_token_ids(
    model: PreTrainedModel, eos_token_id: int | None, end_ids: Iterable[int]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Every end-of-sequence id that the model's files name, and which of them it has not."""
    stated = {*eos_token_ids(model), *end_ids}
    if eos_token_id is not None:
        stated.add(eos_token_id)
    rows = _num_rows(model)
    beyond = sorted(token for token in stated if not 0 <= token < rows)
    warnings = (f"end-of-sequence ids must be in 0..{rows - 1}, the model names {beyond}",) if beyond else ()
    return tuple(sorted(stated.difference(beyond))), warnings
