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
    ("source", "said"),
    [
        ("{{ [1, 2, 3] | random }}", "filter random"),
        ("{{ [[1, 2, 3]] | map('random') | list }}", "filter random"),
        ("{{ lipsum() }}", "lipsum"),
        ("{{ lipsum(n=1) }}", "lipsum"),
        ("{{ messages | map(attribute='role') }}", "address of an object"),
        ("{{ cycler('a') ~ '' }}", "address of an object"),
        ("{{ messages[0].get | string }}", "address of an object"),
    ],
)
def test_nothing_random_reaches_a_template(source: str, said: str) -> None:
    with pytest.raises(TemplateError, match=f"the chat template fails: .*{said}"):
        render(source)


def test_a_conversation_may_speak_of_addresses() -> None:
    said = "<generator object f at 0x7F00AB12cd>"
    template = ChatTemplate("{{ messages[0].content | upper }} and <f at 0xdeadbeef>", TODAY)
    shown = template.render([{"role": "user", "content": said}]).text
    assert shown == said.upper().replace("0X", "0X") + " and <f at 0xdeadbeef>"


def test_differences_of_views_keep_the_order_of_the_dict() -> None:
    names = [f"key{number}" for number in range(50)]
    source = "{% set d = messages[0].d %}{{ (d.keys() - ['key7'] - d.keys().mapping.values()) | join(',') }}"
    shown = ChatTemplate(source, TODAY).render([{"d": dict.fromkeys(names, "x")}]).text
    assert shown == ",".join(name for name in names if name != "key7")
    assert render("{{ 7 - 3 }}") == "4"


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
