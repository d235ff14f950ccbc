"""Digests of sets of files, which stored models and renderings are compared by."""

from __future__ import annotations

import hashlib

from luthier.runtime.digests import contents_digest, files_digest

CONTENTS = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ x }}"}
STORED = "4c46d2ba447cc73434c5e9cf6c515315a570bb1c78adeeb9ec0db371fbba5104"


def test_the_digest_of_files_is_what_homes_have_stored() -> None:
    assert contents_digest(CONTENTS) == STORED


def test_files_and_their_contents_have_one_digest_in_any_order() -> None:
    sums = {path: hashlib.sha256(data).hexdigest() for path, data in reversed(CONTENTS.items())}
    assert files_digest(sums) == contents_digest(CONTENTS)


def test_a_name_or_a_byte_more_is_another_digest() -> None:
    others = [{**CONTENTS, "tokenizer.json": b"{} "}, {**CONTENTS, "x": b""}, {"tokenizer.json": b"{}"}]
    assert len({contents_digest(one) for one in (CONTENTS, *others)}) == 4
