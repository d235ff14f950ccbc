from typing import Any

import pytest

from luthier.errors import InvalidArgument
from luthier.lm.generate import GenerationRequest, TextAssembler

TEXT = "naïve 日本語 🙂!"


def decode(ids: Any) -> Any:
    """Tokens are bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def test_text_assembler_gives_the_whole_text_and_never_half_a_character() -> None:
    assembler = TextAssembler(decode)
    pieces = [assembler.push(byte) for byte in TEXT.encode()]
    assert "".join(pieces) + assembler.finish() == TEXT
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[2:4] == ["", "ï"]


def test_text_assembler_says_at_the_end_that_a_character_is_unfinished() -> None:
    assembler = TextAssembler(decode)
    pieces = [assembler.push(byte) for byte in "a🙂".encode()[:-1]]
    assert "".join(pieces) == "a"
    assert assembler.finish() == "\ufffd"
    assert assembler.finish() == ""


def test_text_assembler_keeps_spaces_that_a_decoder_drops_at_the_start() -> None:
    words = {1: " one", 2: " two", 3: " three"}
    assembler = TextAssembler(lambda ids: "".join(words[i] for i in ids).removeprefix(" "))
    assert "".join(assembler.push(token) for token in (1, 2, 3)) == "one two three"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "at least one prompt"),
        ({"prompts": ((1,), ())}, r"got lengths \[1, 0\]"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be finite and at least 0, got -0.1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "got 1.5"),
    ],
)
def test_generation_request_refuses_what_has_no_meaning(changes: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        GenerationRequest(**({"request_id": "r", "prompts": ((1,),), "max_new_tokens": 4} | changes))
