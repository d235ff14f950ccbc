import time

import pytest
from peft.utils.other import get_pattern_key

from luthier.errors import InvalidArgument, Reason
from luthier.lm.module_patterns import MAX_CHARACTERS, assigned, check_pattern

MODULES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 10, 11)
    for module in ("self_attn.q_proj", "self_attn.qkv_proj", "mlp.up_proj", "mlp.gate_up_proj")
]


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "self_attn.q_proj",
        "proj",
        ".*proj",
        "model.layers.1.mlp.up_proj",
        "^model.layers.1.mlp.up_proj",
        "^layers.1.mlp.up_proj",
        r"layers\.1\..*",
        r"layers\.[0-9]\.mlp\.up_proj",
        r"layers\.(0|1)\.self_attn\.(q|qkv)_proj",
        "q_proj|up_proj",
        r"1\.mlp\.\w+",
        "(?i:UP_PROJ)",
        "up_proj$",
        r"[^.]*up_proj",
        r".{5}up_proj",
        "a)|(.*q_proj",
    ],
)
def test_assigned_matches_what_peft_matches(pattern: str) -> None:
    theirs = [module for module in MODULES if get_pattern_key([pattern], module) == pattern]
    if theirs:
        assert sorted(assigned("rank_pattern", ((pattern, 1),), MODULES)) == sorted(theirs)
    else:
        with pytest.raises(InvalidArgument, match="it matches none"):
            assigned("rank_pattern", ((pattern, 1),), MODULES)


def test_assigned_takes_the_first_pattern_that_matches_as_peft_does() -> None:
    patterns = (("q_proj", 1), (r"layers\.1\..*", 2), (".*", 3))
    found = assigned("rank_pattern", patterns, MODULES)
    for module in MODULES:
        assert found[module] == dict(patterns)[get_pattern_key([text for text, _ in patterns], module)]
    assert set(found.values()) == {1, 2, 3}


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("", f"must have 1 to {MAX_CHARACTERS} characters, got 0"),
        ("a" * 201, "got 201"),
        ("q_proj(", "must be a regular expression of Python and of RE2"),
        ("(?=q)q_proj", "must be a regular expression of Python and of RE2"),
        (r"(q)\1", "must be a regular expression of Python and of RE2"),
        (r"\pL_proj", "must be a regular expression of Python and of RE2"),
        ("(?i)q_proj", "must be a regular expression of Python and of RE2"),
        ("[[:alpha:]]_proj", r"must not hold '\[:', which"),
        ("[a-z]{,3}_proj", r"must not hold '{,', which"),
    ],
)
def test_a_pattern_that_one_of_the_two_does_not_read_or_reads_otherwise_is_refused(
    pattern: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        check_pattern(pattern)
    with pytest.raises(InvalidArgument, match=reason) as caught:
        assigned("alpha_pattern", ((pattern, 1.0),), MODULES)
    assert caught.value.reason == Reason.MODULE_PATTERN_INVALID


def test_a_pattern_that_python_would_take_for_ever_takes_no_time() -> None:
    start = time.process_time()
    with pytest.raises(InvalidArgument, match="it matches none"):
        assigned("rank_pattern", (("((a|[a-z0-9_.])*)*!", 1),), ["a" * 5000])
    assert time.process_time() - start < 1
