"""Templates: a sandbox that holds, and errors that name the line."""

from __future__ import annotations

import datetime

import pytest

from luthier.text.templates import ChatTemplate, TemplateError

TODAY = datetime.date(2026, 3, 9)
MESSAGES = [{"role": "user", "content": "hi"}]


def render(source: str) -> str:
    return ChatTemplate(source, TODAY).render(MESSAGES).text


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ '{0.__class__.__init__}'.format(1).x.y }}",
        "{{ ''|attr('__class__')|attr('x')|attr('y') ~ ''.__class__() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(TemplateError, match=r"the chat template fails: .* \(line 2\)"):
        render("\n" + source)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("\n\n{{ raise_exception('no tools') }}", r"fails: no tools \(line 3\)"),
        ("a\n{{ messages[0].nope.deep }}", r"no attribute 'nope' \(line 2\)"),
        ("a\n{{ 1 / 0 }}", r"ZeroDivisionError: .* \(line 2\)"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_a_failing_template_names_its_line(source: str, said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        render(source)


def test_a_template_that_does_not_compile_names_its_line() -> None:
    with pytest.raises(TemplateError, match=r"does not compile: .* \(line 2\)"):
        ChatTemplate("a\n{% if %}", TODAY)


def test_the_clock_stands_at_the_given_date() -> None:
    assert render("{{ strftime_now('%d %b %Y %H:%M') }}") == "09 Mar 2026 00:00"


def test_tojson_keeps_what_html_would_escape() -> None:
    assert render("{{ {'b': '<&>ü', 'a': 1} | tojson }}") == '{"b": "<&>ü", "a": 1}'


def test_generation_blocks_give_the_ranges_they_rendered() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
        TODAY,
    )
    rendered = template.render([{"role": "a", "content": "xyz"}, {"role": "b", "content": ""}])
    assert rendered.text == "a:xyz;b:;"
    assert rendered.generated == ((2, 5), (8, 8))
    assert template.has_generation_blocks
    assert not ChatTemplate("{{ messages }}", TODAY).has_generation_blocks


@pytest.mark.parametrize(
    "source",
    [
        "\n{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}",
        '{%- if strftime_now is defined %}{% set day = strftime_now("%Y-%m-%d") %}{% endif %}{{ day }}',
        "{% macro at() %}{{ strftime_now('%d') }}{% endmacro %}{{ at() }}/{{ strftime_now('%m &amp; ö') }}",
        "no date\n{{ messages }}",
    ],
)
def test_dated_source_shows_its_date_on_any_day(source: str) -> None:
    dated = ChatTemplate(source, TODAY).dated_source
    assert ChatTemplate(dated, datetime.date(2031, 12, 24)).render(MESSAGES).text == render(source)
    assert (dated == source) == ("strftime_now" not in source)


def test_dated_source_of_a_computed_format_is_the_source() -> None:
    source = "{% set format = '%d' %}{{ strftime_now(format) }}{{ strftime_now('%m') }}"
    assert ChatTemplate(source, TODAY).dated_source == source
