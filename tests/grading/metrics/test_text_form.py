"""One Unicode form: the library's own result, in time that long runs of marks do not make quadratic."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.grading.metrics import text_form
from luthier.grading.metrics.text_form import in_text_form

MARKS = st.text(st.sampled_from("e\u0301\u0316\u0345\u0f73\u0f71\u0344\u1100\u1161\u11a8\uac00\u212b"))


@given(st.text() | MARKS, st.booleans())
def test_the_form_is_nfc(text: str, is_long: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_form, "_SHORT_CHARACTERS", 3 if is_long else 1024)
        assert in_text_form(text) == unicodedata.normalize("NFC", text)


def test_a_long_run_of_marks_takes_time_in_proportion() -> None:
    def seconds(length: int) -> float:
        text = "a" + "\u0301\u0316" * length
        began = time.process_time()
        in_text_form(text)
        return time.process_time() - began

    # Quadratic time would be 16 times as much.
    assert seconds(80_000) < 8 * min(seconds(20_000), seconds(20_000)) + 0.01
