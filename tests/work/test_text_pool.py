"""Templates that take too much: each is refused by name, within its limits, and who asks next is answered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.evaluation.tiny_models import write_tokenizer

from luthier.text.tokenizer import BUNDLE_FILES
from luthier.work.limited_child import Limits
from luthier.work.text_pool import Bundle, TextPool, TextRefused

LIMITS = Limits(cpu_seconds=1, memory_bytes=512 << 20, wall_seconds=60.0)
LONG = "{% for i in range(99999) %}{% for j in range(99999) %}"
DOUBLING = "".join(
    f"{{% macro f{number}() %}}{{{{ f{number + 1}() }}}}{{{{ f{number + 1}() }}}}{{% endmacro %}}"
    for number in range(40)
)


@pytest.fixture(scope="module")
def pool() -> Iterator[TextPool]:
    with closing(TextPool(LIMITS)) as made:
        yield made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    write_tokenizer(folder)
    files = {name: (folder / name).read_bytes() for name in BUNDLE_FILES if Path(folder / name).exists()}
    return Bundle(key="tiny", read=lambda: files)


def ids(pool: TextPool, bundle: Bundle, template: str) -> list[int]:
    """The tokens of a short conversation."""
    asked = {"chat_template": template, "template_date": "2026-11-23", "prefix_token_ids": None}
    turns = [{"role": "user", "content": "q"}]
    answer = pool.ask(bundle, {"do": "conversation", "asked": asked, "messages": turns, "tools": []})
    found: list[int] = answer["ids"]
    return found


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 9999999999 }}",
        "{{ [0] * 999999999 }}",
        "{{ '%2000000000d' % 1 }}",
        "{{ '%.*f' % (2000000000, 1.5) }}",
        "{{ '%2000000000s' | format('x') }}",
        "{{ '{:>{}}'.format('x', 2000000000) }}",
        "{{ 'x' | center(10 ** 9) }}",
        "{{ 'x'.ljust(2 * 10 ** 9) }}",
        "{{ '\t'.expandtabs(2 * 10 ** 9) }}",
        "{{ (1).to_bytes(2 * 10 ** 9, 'big') }}",
        "{{ 'a\nb' | indent(2 * 10 ** 9) }}",
        "{{ [[1]] | tojson(indent=2 * 10 ** 9) }}",
        "{{ [1] | batch(10 ** 9, 'x') | list }}",
        "{{ ('x' * 10 ** 6) | replace('', 'y' * 10 ** 6) }}",
        "{{ range(99999) | join('x' * 10 ** 6) }}",
        "{{ ('\ufb03' * 10 ** 8) | upper }}",
        "{{ strftime_now('%d' * 10 ** 8) }}",
        "{{ raise_exception('x' * 10 ** 9) }}",
        "{% set j = joiner('x' * 10 ** 7) %}{% for i in range(99999) %}{{ j() }}{% endfor %}",
        "{% set x = 'x' * 10 ** 6 %}{% for i in range(1000) %}{{ x }}{% endfor %}",
        "{% set n = namespace(s=[0]) %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
    ],
)
def test_a_template_that_takes_much_memory_is_refused_by_name(
    pool: TextPool, bundle: Bundle, template: str
) -> None:
    with pytest.raises(TextRefused, match=r"chat template takes more than 512 MiB of memory") as caught:
        ids(pool, bundle, template)
    assert (caught.value.kind, caught.value.reason) == ("template", "TEMPLATE_INVALID")
    assert caught.value.at_limit


@pytest.mark.parametrize(
    "template",
    [
        "{{ 9 ** (9 ** 9) }}",
        "{{ ('(' * 4 * 10 ** 6 ~ 'www.a.de' ~ ')' * 4 * 10 ** 6) | urlize }}",
        "{{ ('x' * 10 ** 8) | wordwrap(1) }}",
        "{{ [1] | slice(10 ** 9) | list }}",
        DOUBLING + "{% macro f40() %}x{% endmacro %}{{ f0() }}",
        "{% set c = cycler('') %}" + LONG + "{{ c.next() }}" + "{% endfor %}" * 2,
        "{% set n = namespace(s=[]) %}{% for i in range(40) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s | pprint }}",
        "".join(f"{{% macro m{number}(a) %}}{{{{ a }}}}{{% endmacro %}}" for number in range(20_000)),
    ],
)
def test_a_template_that_takes_long_is_refused_by_name(pool: TextPool, bundle: Bundle, template: str) -> None:
    with pytest.raises(TextRefused, match=r"chat template takes more than (1 s of CPU|512 MiB of)") as caught:
        ids(pool, bundle, template)
    assert (caught.value.kind, caught.value.reason) == ("template", "TEMPLATE_INVALID")
    assert caught.value.at_limit


def test_a_failing_template_leaves_nothing_of_what_it_took_to_the_next(
    pool: TextPool, bundle: Bundle
) -> None:
    """Its error leads to its frames, and they to all that it held."""
    taking = "{% set x = 'x' * (messages | length * 300 * 1024 * 1024) %}"
    plain = ids(pool, bundle, "{{ messages[0].content }}")
    for _ in range(3):
        with pytest.raises(TextRefused, match="ZeroDivisionError"):
            ids(pool, bundle, taking + "{{ 1 / 0 }}")
        with pytest.raises(TextRefused, match="not this one"):
            ids(pool, bundle, taking + "{{ raise_exception('not this one') }}")
        assert ids(pool, bundle, taking + "{{ messages[0].content }}") == plain
