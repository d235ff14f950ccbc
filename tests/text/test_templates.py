"""Templates: a sandbox that holds, and errors that name the line."""

from __future__ import annotations

import datetime
import subprocess
import sys
import time

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
        "{{ messages['__class__'].x }}",
        "{{ messages | attr('__cla' ~ 'ss__') | attr('x') }}",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ dict.__base__.__subclasses__() }}",
        "{{ dict.mro() }}",
        "{{ (strftime_now | attr('__globals__'))['__builtins__'] }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ raise_exception.__code__.co_consts }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(a=1)._Namespace__attrs.x }}",
        "{{ nothing.__init__.__globals__ }}",
        "{{ nothing._fail_with_undefined_error() }}",
        "{% for x in messages %}{{ loop._undefined.__globals__ }}{% endfor %}",
        "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
        "{{ (messages | map('upper')).gi_frame.f_globals }}",
        "{{ messages | map(attribute='content.__class__.__mro__') | list }}",
        "{{ messages | sum(attribute='__class__') }}",
        "{{ [1] | map('__class__') | list }}",
        "{{ 'x' is filter('attr') }}",
        "{{ ('{0[0][role].__class__.y}' | safe).format(messages) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ messages.pop() }}",
        "{{ messages.sort() }}",
        "{{ messages[0].setdefault('x', 1) }}",
        "{{ messages[0].popitem() }}",
        "{{ messages[0].update(role='x') }}",
        "{{ '{0.__class__.__init__}'.format(1).x.y }}",
        "{{ ''|attr('__class__')|attr('x')|attr('y') ~ ''.__class__() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% include ['a', 'b'] ignore missing %}",
        "{% extends '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% from 'os' import system %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(TemplateError, match=r"the chat template fails: .* \(line 2\)"):
        render("\n" + source)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("{{ messages | map(attribute='__class__') | list }}", "[Undefined]"),
        ("{{ messages | map('attr', 'append') | list }}", "[Undefined]"),
        ("{{ messages | selectattr('__class__') | list }}", "[]"),
        ("{{ messages | join(',', attribute='__class__') }}", ""),
        ("{{ messages | groupby('role.__class__') | map(attribute='grouper') | list }}", "[Undefined]"),
        ("{{ ''.__class__ }}{{ ''['__class__'] }}{{ '' | attr('__class__') }}", ""),
        ("{{ raise_exception.__code__ }}{{ (messages | map('upper')).gi_code }}", ""),
        ("{{ '{m[0].__class__}'.format_map({'m': messages}) }}{{ ('{0.__class__}' | e).format('') }}", ""),
        ("{% macro f() %}{% endmacro %}{{ f._environment }}{{ cycler('a').__class__ }}", ""),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n.__class__ }}", ""),
    ],
)
def test_what_is_hidden_is_as_if_it_were_not_there(source: str, shown: str) -> None:
    assert render(source) == shown


NESTED = (
    "{% set n = namespace(s=[], t=[]) %}"
    "{% for i in range(2000) %}{% set n.s = [n.s] %}{% set n.t = [n.t] %}{% endfor %}"
)


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
        "{{ " + "[" * 2000 + "]" * 2000 + " }}",
        "{{ " + "{1:" * 2000 + "1" + "}" * 2000 + " }}",
        "{{ f" + "(f" * 2000 + ")" * 2000 + " }}",
        "{{ " + "not " * 2000 + "1 }}",
        "{{ " + "-" * 2000 + "1 }}",
        "{{ 1" + " + 1" * 2000 + " }}",
        "{{ 1" + " if 1 else 1" * 2000 + " }}",
        "{{ 'a'" + "|upper" * 2000 + " }}",
        "{{ a" + ".b" * 2000 + " }}",
        "{{ a" + "[0]" * 2000 + " }}",
        "{{" * 2000,
        "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
        "{% with %}" * 2000 + "{% endwith %}" * 2000,
        "{% set a %}" * 2000 + "{% endset %}" * 2000,
        "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
        NESTED + "{{ n.s }}",
        NESTED + "{{ n.s | tojson }}",
        NESTED + "{{ n.s | pprint }}",
        NESTED + "{{ n.s == n.t }}",
    ],
)
def test_what_is_nested_too_deep_is_refused_by_name(source: str) -> None:
    with pytest.raises(TemplateError, match=r"the chat template fails: RecursionError"):
        render(source)


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


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{% do messages.append(1) %}",
        "{% debug %}",
        "{% generation %}x",
        "{#" * 1000,
        "{% raw %}" * 1000,
        "{{ '" + "\\'" * 5000,
        "{{ messages\x00 }}",
        "{{ '\\N{nope}' }}",
        "{{ '\\x' }}",
    ],
)
def test_a_template_that_does_not_compile_names_its_line(source: str) -> None:
    with pytest.raises(TemplateError, match=r"does not compile: .* \(line 2\)"):
        ChatTemplate("a\n" + source, TODAY)


def test_the_clock_stands_at_the_given_date() -> None:
    assert render("{{ strftime_now('%d %b %Y %H:%M') }}") == "09 Mar 2026 00:00"


def test_the_clock_is_the_same_in_every_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = set()
    for zone in ("UTC", "Asia/Tokyo", "America/Lima"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        shown.add(render("{{ strftime_now('%s %%s %Z %z %c') }}"))
    monkeypatch.undo()
    time.tzset()
    assert shown == {"1773014400 %s   Mon Mar  9 00:00:00 2026"}


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
        "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}",
        "{% macro f() %}{% generation %}a{% endgeneration %}{% endmacro %}{% generation %}{{ f() }}{% endgeneration %}",
        "{% filter upper %}{% generation %}abc{% endgeneration %}{% endfilter %}",
        "{% set x %}{% generation %}abc{% endgeneration %}{% endset %}{{ x[:-5] }}",
        "{% set x %}{% generation %}abc{% endgeneration %}{% endset %}{{ x[:68] }}",
    ],
)
def test_generation_blocks_whose_ranges_would_be_lost_are_refused(source: str) -> None:
    with pytest.raises(TemplateError, match="a generation block must lie in no other one"):
        render(source)


def test_a_generation_block_writes_the_same_in_every_process() -> None:
    source = "{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x[1:33] }}"
    command = (
        "import datetime; from luthier.text.templates import ChatTemplate;"
        f"print(ascii(ChatTemplate({source!r}, datetime.date(2026, 3, 9)).render([]).text))"
    )
    shown = {
        subprocess.run([sys.executable, "-c", command], capture_output=True, check=True).stdout for _ in "ab"
    }
    assert len(shown) == 1


@pytest.mark.parametrize("source", ["{{ '\\ud800' }}", "a{{ '\\udfff' ~ messages[0].content }}"])
def test_a_lone_surrogate_is_refused_by_name(source: str) -> None:
    with pytest.raises(TemplateError, match=r"lone surrogate '\\ud[8f][0f][0f]' at character [01]"):
        render(source)


def test_what_a_template_raises_can_be_sent() -> None:
    with pytest.raises(TemplateError, match=r"fails: bad \\ud800") as caught:
        render("{{ raise_exception('bad \\ud800') }}")
    assert str(caught.value).encode()
    with pytest.raises(TemplateError) as caught:
        render("{{ raise_exception('x' * 100000) }}")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for a in 'a' %}" * 30 + "{% endfor %}" * 30, "SyntaxError"),
        ("{{ loop.cycle() }}", "loop"),
        ("{% for x in messages %}{{ loop.cycle() }}{% endfor %}", "TypeError"),
        ("{% for x in range(3).__iter__() %}{% endfor %}", "__iter__"),
        ("{% if 1 %}" * 150 + "{% endif %}" * 150, "IndentationError"),
        ("{{ range(10 ** 400) }}", "OverflowError"),
        ("{{ 10 ** 100000 }}", "ValueError: Exceeds the limit"),
        ("{{ 0x" + "f" * 90_000 + " }}", "ValueError: Exceeds the limit"),
        ("{{ '%d' % (10 ** 5000) }}", "ValueError: Exceeds the limit"),
        ("{{ 1e999 | int }}", "NameError"),
        ("{{ 'x'[::0] }}", "ValueError: slice step"),
        ("{{ '%(a)s' % messages }}", "TypeError"),
        ("{{ '{:{}}'.format('a', messages) }}", "ValueError: Invalid format"),
        ("{{ '{!z}'.format(1) }}", "ValueError: Unknown conversion"),
        ("{{ 'a'.encode().decode('zlib_codec') }}", "LookupError"),
        ("{{ raise_exception | tojson }}", "TypeError"),
        ("{{ {(1, 2): 3} | tojson }}", "TypeError"),
        ("{% set n = namespace() %}{% set n.me = n %}{{ n | tojson }}", "TypeError"),
        ("{{ 'a' | slice(0) | list }}", "ZeroDivisionError"),
        ("{{ 'a' | wordwrap(0) }}", "ValueError: invalid width"),
        ("{{ 'a' | truncate(-1) }}", "AssertionError"),
        ("{{ 'a' | dictsort }}", "AttributeError"),
        ("{{ {'a b': 1} | xmlattr }}", "ValueError"),
        ("{{ strftime_now('\\ud800') }}", "UnicodeEncodeError"),
        ("{{ strftime_now(messages) }}", "TypeError"),
        ("{{ raise_exception() }}", "TypeError"),
        ("{% block a %}{{ super() }}{% endblock %}", "no parent block"),
        ("{% macro f() %}{{ caller() }}{% endmacro %}{{ f() }}", "No caller defined"),
    ],
)
def test_whatever_python_says_to_a_template_is_the_templates(source: str, said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        render(source)


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
