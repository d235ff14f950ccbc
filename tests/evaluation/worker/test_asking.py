"""Asked as taught: ids compared with those of the trained rows, and templates that hang or fail hold nobody up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.tiny_models import write_tokenizer

from luthier.errors import FailedPrecondition, InvalidArgument, Reason, Unavailable
from luthier.evaluation.worker.asking import Asker, Asking, Before, TextDecoder, asking_of
from luthier.runtime.digests import contents_digest
from luthier.text.endings import Stops
from luthier.text.records import ChatRecord, CompletionRecord, Message, SingleRecord
from luthier.text.rendering import Renderer, RenderingError
from luthier.text.templates import TemplateError
from luthier.text.tokenizer import BUNDLE_FILES, TokenizerBundle
from luthier.v1 import evaluation_pb2
from luthier.work.limited_child import Limits
from luthier.work.text_pool import Bundle, TextPool
from luthier.worker.v1 import task_pb2

OWN = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
DATED = "{% if true %}{{ strftime_now('%d %b %Y') }}\n{% endif %}" + OWN
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LIMITS = Limits(cpu_seconds=2, memory_bytes=512 << 20, wall_seconds=60.0)


def chat(question: str, answer: str) -> ChatRecord:
    return ChatRecord(
        messages=(Message(role="user", content=question), Message(role="assistant", content=answer))
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def pool() -> Iterator[TextPool]:
    with closing(TextPool(LIMITS)) as made:
        yield made


def bundle_of(folder: Path) -> Bundle:
    files = {name: (folder / name).read_bytes() for name in BUNDLE_FILES if (folder / name).exists()}
    return Bundle(key=contents_digest(files), read=lambda: files)


def asking(template: str = "", **changes: Any) -> Asking:
    plain = Asking(
        chat_template=template, template_date="2026-11-23", prefix_token_ids=None, stop_token_ids=()
    )
    return replace(plain, **changes)


SHOTS: tuple[SingleRecord, ...] = (chat("what number?", "five"), chat("what colour?", "red"))


@pytest.mark.parametrize("template", ["", OWN, DATED])
@pytest.mark.parametrize("record", [chat("what colour \U0001f600?", "blue"), chat("what\n\nnumber", "7")])
def test_asker_asks_with_the_ids_that_a_renderer_trains(
    pool: TextPool, folder: Path, template: str, record: ChatRecord
) -> None:
    bundle = TokenizerBundle.load(folder)
    renderer = Renderer(bundle, today=date(2026, 11, 23), template=template or None)
    asker = Asker(pool, bundle_of(folder), asking(template))
    trained = renderer.render(record)
    first_learnt = trained.loss_mask.index(True)
    assert asker.prompt(record) == trained.input_ids[:first_learnt]
    assert asker.prompt(record, SHOTS) == renderer.prompt(record, SHOTS)
    assert asker.answer(record, SHOTS) == renderer.answer(record, SHOTS)
    assert asker.stops() == renderer.stops()
    assert asker.conversation([{"role": "user", "content": "a"}]) == renderer.conversation(
        [{"role": "user", "content": "a"}]
    )


def test_asker_of_a_base_without_a_template_asks_with_the_taught_one(pool: TextPool, folder: Path) -> None:
    """The base has none, the rendering brought one: what was trained up to the answer is what is asked."""
    (folder / "chat_template.jinja").unlink()
    trained = Renderer(TokenizerBundle.load(folder), today=date(2026, 11, 23), template=OWN)
    row = trained.render(chat("what colour", "red"))
    taught = asking(trained.effective_template, stop_token_ids=(7,))
    asker = Asker(pool, bundle_of(folder), taught)
    assert asker.prompt(chat("what colour", "?")) == row.input_ids[: row.loss_mask.index(True)]
    assert 7 in asker.stops().token_ids
    with pytest.raises(RenderingError) as caught:
        Asker(pool, bundle_of(folder), asking()).prompt(chat("what colour", "?"))
    assert caught.value.reason == Reason.CHAT_TEMPLATE_MISSING


def test_asker_keeps_the_date_that_was_taught_on_any_day(pool: TextPool, folder: Path) -> None:
    trained = Renderer(TokenizerBundle.load(folder), today=date(2024, 7, 26), template=DATED)
    asked = Asker(pool, bundle_of(folder), asking(trained.effective_template, template_date="2030-01-01"))
    record = chat("what colour", "red")
    assert asked.prompt(record) == trained.prompt(record)
    assert Asker(pool, bundle_of(folder), asking(DATED)).prompt(record) != trained.prompt(record)


def test_asker_puts_before_plain_text_what_was_taught(pool: TextPool, folder: Path) -> None:
    plain = CompletionRecord(prompt="what colour", completion="red")
    ids = TokenizerBundle.load(folder).encode("what colour").ids
    for prefix in ((), (1,), (1, 0)):
        asker = Asker(pool, bundle_of(folder), asking(prefix_token_ids=prefix))
        assert asker.prompt(plain) == asker.raw("what colour") == (*prefix, *ids)


def test_asker_of_a_model_from_before_prefixes_were_kept_goes_by_the_configuration(
    pool: TextPool, folder: Path
) -> None:
    taught = task_pb2.Asking(template_source=evaluation_pb2.TEMPLATE_SOURCE_TAUGHT)
    # An arm's own template changes the template alone.
    own = task_pb2.Asking(
        template_source=evaluation_pb2.TEMPLATE_SOURCE_ARM, chat_template=OWN, old_prefix=True
    )
    ids = TokenizerBundle.load(folder).encode("what colour").ids
    for adds, prefix in ((True, (0,)), (False, ())):
        config = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "add_bos_token": adds}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        for message in (taught, own):
            asker = Asker(pool, bundle_of(folder), asking_of(message))
            assert asker.raw("what colour") == (*prefix, *ids)


def test_asker_stops_at_what_the_resource_says_else_at_what_the_files_say(
    pool: TextPool, folder: Path
) -> None:
    shown = task_pb2.Asking(eos_token_ids=[5, 6], stop_token_ids=[7])
    old = task_pb2.Asking(stop_token_ids=[7])
    for message, ids in ((shown, {2, 5, 6, 7}), (old, {2, 7, 8})):
        asker = Asker(pool, bundle_of(folder), asking_of(message, frozenset({8})))
        assert asker.stops().token_ids == ids


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOPS, "the chat template takes more than 2 s of CPU time"),
        ("{{ 'x' * 9999999999 }}", "the chat template takes more than 512 MiB of memory"),
        ("{{ raise_exception('not so') }}", "the chat template fails: not so"),
        ("{% for %}", "the chat template does not compile"),
    ],
)
def test_asker_names_what_a_template_does_wrong(
    pool: TextPool, folder: Path, template: str, said: str
) -> None:
    asker = Asker(pool, bundle_of(folder), asking(template))
    with pytest.raises(TemplateError, match=said):
        asker.prompt(chat("q", "a"))


def test_asker_finds_how_a_template_ends_a_turn_in_what_it_takes(pool: TextPool, folder: Path) -> None:
    picky = "{% if messages | length < 3 %}{{ raise_exception('too short') }}{% endif %}" + OWN
    picky = picky.replace("<|im_end|>", "<|im_start|>")
    asker = Asker(pool, bundle_of(folder), asking(picky))
    refused = asker.stops()
    assert refused.token_ids == {2}  # the tokenizer's own alone, and that is said
    assert "the chat template fails: too short" in refused.unknown
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    known = asker.stops(Before(messages=turns[:3]))
    assert known == Stops(token_ids=frozenset({1, 2}), end_turns=True)
    with pytest.raises(InvalidArgument, match="2 s of CPU time") as caught:
        Asker(pool, bundle_of(folder), asking(LOOPS)).stops()
    assert caught.value.reason == Reason.TEMPLATE_INVALID


def test_asker_does_not_run_a_template_again_that_never_ends(folder: Path) -> None:
    slow_on_b = "{% if messages[0].content == 'b' %}" + LOOPS + "{% endif %}" + OWN
    with closing(TextPool(replace(LIMITS, cpu_seconds=1))) as pool:
        asker = Asker(pool, bundle_of(folder), asking(slow_on_b))
        for question in ("b", "b", "a", "b", "b", "b"):
            with pytest.raises(TemplateError, match="1 s of CPU") if question == "b" else nullcontext():
                asker.prompt(chat(question, "x"))
        began = time.monotonic()
        with pytest.raises(TemplateError, match="took more than it may 3 times, and is not run again"):
            asker.prompt(chat("a", "x"))
        assert time.monotonic() - began < 0.5


def test_prompts_of_a_template_that_hangs_hold_up_no_other_and_stop_at_once(folder: Path) -> None:
    stopping = threading.Event()
    ends: list[Exception] = []

    def check() -> None:
        if stopping.is_set():
            raise Unavailable("the worker shuts down", reason=Reason.SHUTTING_DOWN)

    with closing(TextPool(replace(LIMITS, cpu_seconds=600, wall_seconds=600.0))) as pool:

        def hang() -> None:
            try:
                Asker(pool, bundle_of(folder), asking(LOOPS), check).prompt(chat("q", "a"))
            except Unavailable as error:
                ends.append(error)

        threads = [threading.Thread(target=hang) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        for template in ("", OWN):
            assert Asker(pool, bundle_of(folder), asking(template)).prompt(chat("q", "a"))
        stopping.set()
        began = time.monotonic()
        for thread in threads:
            thread.join(20)
        assert time.monotonic() - began < 3
    assert len(ends) == 4


def test_decoder_gives_the_tokenizers_text_or_says_what_fails(pool: TextPool, folder: Path) -> None:
    bundle = TokenizerBundle.load(folder)
    decode = TextDecoder(pool, bundle_of(folder))
    for text in ("what colour", " héllo \U0001f600", ""):
        ids = bundle.encode(text).ids
        assert decode(ids, lambda: None) == decode(ids, lambda: None) == bundle.decode(ids)
    word = {
        "id": bundle.vocab_size,
        "content": "x" * 60,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
    }
    panicking = {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["added_tokens"].append(word | {"normalized": False, "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(stored | {"decoder": panicking}))
    token = TokenizerBundle.load(folder).token_id("x" * 60)
    assert token is not None
    with pytest.raises(FailedPrecondition, match="the model's tokenizer fails: ") as caught:
        TextDecoder(pool, bundle_of(folder))([token], lambda: None)
    assert caught.value.reason == Reason.MODEL_INVALID
