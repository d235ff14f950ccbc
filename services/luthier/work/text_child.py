"""The process that runs templates and tokenizers of models for others: `luthier.work.text_pool` asks it.

A request names a tokenizer bundle by a key and says how its model is to be asked; the bundle's files come with it
when the process does not know the key. What a template, a tokenizer or a record is refused for comes back as
`{"refused": {"kind", "reason", "message"}}`.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from itertools import pairwise
from typing import Any

from luthier.text.panics import TokenizerError, tokenizer_errors
from luthier.text.records import SingleRecord, record_from_json
from luthier.text.rendering import Renderer, RenderingError
from luthier.text.templates import TemplateError
from luthier.text.tokenizer import TokenizerBundle
from luthier.text.units import reference_record
from luthier.work.limited_child import Note, serve
from luthier.work.text_pool import OLD_PREFIX

_KEPT_BUNDLES = 4
_KEPT_RENDERERS = 16
SHOWN_TEXT_BYTES = 2 << 20
"""Most text that the tokens of one row may have to be shown."""


class _Texts:
    """Bundles and renderers, those used last kept."""

    def __init__(self) -> None:
        self._bundles: OrderedDict[str, TokenizerBundle] = OrderedDict()
        self._old_prefixes: dict[str, tuple[int, ...]] = {}
        self._renderers: OrderedDict[str, Renderer] = OrderedDict()

    def handle(self, request: Mapping[str, Any], note: Note) -> dict[str, Any]:
        """Answer one request."""
        key: str = request["bundle"]
        try:
            if key not in self._bundles:
                if "files" not in request:
                    return {"unknown": key}
                self._load(key, request["files"])
                note({})  # a large tokenizer takes its time once; what follows has all of its own
            self._bundles.move_to_end(key)
            with tokenizer_errors():
                return _OPERATIONS[request["do"]](self, request)
        except RenderingError as error:
            return _refused("rendering", error.reason, str(error))
        except TemplateError as error:
            return _refused("template", "TEMPLATE_INVALID", str(error))
        except TokenizerError as error:
            return _refused("tokenizer", "MODEL_INVALID", str(error))

    def bundle(self, request: Mapping[str, Any]) -> TokenizerBundle:
        """Return the tokenizer bundle that a request names."""
        return self._bundles[request["bundle"]]

    def renderer(self, request: Mapping[str, Any]) -> Renderer:
        """Return the renderer that asks as a request says. Raises TemplateError."""
        bundle, asked = self.bundle(request), request["asked"]
        key = f"{request['bundle']} {hashlib.sha256(repr(sorted(asked.items())).encode()).hexdigest()}"
        if key not in self._renderers:
            prefix = asked["prefix_token_ids"]
            if prefix == OLD_PREFIX:
                prefix = self._old_prefixes[request["bundle"]]
            self._renderers[key] = Renderer(
                bundle,
                today=date.fromisoformat(asked["template_date"]),
                template=asked["chat_template"] or None,
                prefix_ids=None if prefix is None else tuple(prefix),
            )
            while len(self._renderers) > _KEPT_RENDERERS:
                self._renderers.popitem(last=False)
        self._renderers.move_to_end(key)
        return self._renderers[key]

    def _load(self, key: str, files: Mapping[str, str]) -> None:
        try:
            with tokenizer_errors():
                bundle = TokenizerBundle(
                    {name: text.encode("utf-8", "surrogatepass") for name, text in files.items()}
                )
        except ValueError as error:
            raise TokenizerError(f"the model's tokenizer cannot be used: {error}") from error
        self._bundles[key] = bundle
        config = json.loads(files.get("tokenizer_config.json", "{}"))
        bos = bundle.special_id("bos_token") if config.get("add_bos_token") else None
        self._old_prefixes[key] = () if bos is None else (bos,)
        while len(self._bundles) > _KEPT_BUNDLES:
            forgotten, _ = self._bundles.popitem(last=False)
            del self._old_prefixes[forgotten]
            for name in [name for name in self._renderers if name.startswith(f"{forgotten} ")]:
                del self._renderers[name]


def _refused(kind: str, reason: str, message: str) -> dict[str, Any]:
    return {"refused": {"kind": kind, "reason": reason, "message": message}}


def _described(texts: _Texts, request: Mapping[str, Any]) -> dict[str, Any]:
    stops = texts.renderer(request).stops(request["messages"], request["tools"])
    bundle = texts.bundle(request)
    template = bundle.chat_template or ""
    starts = [bundle.special_id(role) for role in ("bos_token", "eos_token")]
    digest = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest() if template else ""
    return {
        "stop_token_ids": sorted(stops.token_ids),
        "unknown_ending": stops.unknown,
        "end_turns": stops.end_turns,
        "own_template_digest": digest,
        "start_token_id": next((one for one in starts if one is not None), None),
    }


def _prompt(texts: _Texts, request: Mapping[str, Any]) -> dict[str, Any]:
    record, shots = _records(request)
    return {"ids": texts.renderer(request).prompt(record, shots)}


def _answer(texts: _Texts, request: Mapping[str, Any]) -> dict[str, Any]:
    record, shots = _records(request)
    rendered = texts.renderer(request).answer(record, shots)
    return {
        "ids": rendered.input_ids,
        "mask": rendered.loss_mask,
        "endings": rendered.ending_ids,
        "num_asking": rendered.num_asking,
    }


def _conversation(texts: _Texts, request: Mapping[str, Any]) -> dict[str, Any]:
    return {"ids": texts.renderer(request).conversation(request["messages"], request["tools"])}


def _raw(texts: _Texts, request: Mapping[str, Any]) -> dict[str, Any]:
    return {"ids": texts.renderer(request).raw(request["text"])}


def _decode(texts: _Texts, request: Mapping[str, Any]) -> dict[str, Any]:
    skip = not request.get("with_special", False)
    return {"text": texts.bundle(request).decode(request["ids"], skip_special_tokens=skip)}


def _token_texts(texts: _Texts, request: Mapping[str, Any]) -> dict[str, Any]:
    bundle, ids = texts.bundle(request), request["ids"]
    size_bytes = 0

    def text_of(shown: Sequence[int]) -> str:
        nonlocal size_bytes
        text = bundle.decode(shown, skip_special_tokens=False)
        size_bytes += len(text)
        # Those before are counted too: a decoder that makes much of little is not followed to its end.
        if size_bytes > 4 * SHOWN_TEXT_BYTES:
            raise TokenizerError(_TOO_LONG)
        return text

    alone = [text_of([token_id]) for token_id in ids]
    pairs = [text_of(pair) for pair in pairwise(ids)]
    # Some decoders drop the space in front of a first token: what a token adds to the one before it has it.
    added = [
        pair.removeprefix(before) if pair.startswith(before) else text
        for before, text, pair in zip(alone, alone[1:], pairs, strict=False)
    ]
    found = [*alone[:1], *added]
    if sum(len(text.encode("utf-8", "surrogatepass")) for text in found) > SHOWN_TEXT_BYTES:
        raise TokenizerError(_TOO_LONG)
    return {"texts": found}


_TOO_LONG = (
    f"the model's tokenizer makes more than {SHOWN_TEXT_BYTES >> 20} MiB of text of one row's tokens, which cannot "
    "be shown"
)


def _records(request: Mapping[str, Any]) -> tuple[SingleRecord, list[SingleRecord]]:
    record, *shots = (
        reference_record(record_from_json(one)) for one in (request["record"], *request["shots"])
    )
    return record, shots


_OPERATIONS: Mapping[str, Callable[[_Texts, Mapping[str, Any]], dict[str, Any]]] = {
    "describe": _described,
    "prompt": _prompt,
    "answer": _answer,
    "conversation": _conversation,
    "raw": _raw,
    "decode": _decode,
    "token_texts": _token_texts,
}


def main() -> None:
    """Answer what the parent asks."""
    serve(_Texts().handle, writes_files=False)


if __name__ == "__main__":
    main()
