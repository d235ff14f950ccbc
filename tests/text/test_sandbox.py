"""The environment that templates run in: nothing random reaches them, and stand-ins do what they stand for."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from contextlib import suppress
from types import MappingProxyType

import jinja2
import jinja2.ext
import jinja2.sandbox
import markupsafe
import pytest

from luthier.text.sandbox import Sandbox
from luthier.text.templates import ChatTemplate, TemplateError

TODAY = datetime.date(2026, 3, 9)


def render(source: str) -> str:
    return ChatTemplate(source, TODAY).render([{"role": "user", "content": "hi"}]).text


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
        ("{{ messages[0].get | e }}", "address of an object"),
        ("{{ ('%s' | safe) % messages[0].get }}", "address of an object"),
        ("{{ messages[0].get | urlencode }}", "address of an object"),
        ("{{ (messages[0].get | string)[-9:-1] }}", "address of an object"),
        ("{{ messages[0].get | string | list | join('-') }}", "address of an object"),
        ("{{ [messages[0]['get']] | pprint | reverse }}", "address of an object"),
        ("{{ '{0[0].get}'.format(messages) | length }}", "address of an object"),
        ("{% set n = namespace(f=raise_exception) %}{{ n ~ '' }}", "address of an object"),
    ],
)
def test_nothing_random_reaches_a_template(source: str, said: str) -> None:
    with pytest.raises(TemplateError, match=f"the chat template fails: .*{said}"):
        render(source)


SAMPLES: dict[str, type] = {
    "messages[0].content": str,
    "('x' | safe)": markupsafe.Markup,
    "1": int,
    "1.5": float,
    "(1).to_bytes(2, 'big')": bytes,
    "[1, 2]": list,
    "messages[0]": dict,
    "messages[0].keys()": type({}.keys()),
    "messages[0].items()": type({}.items()),
    "messages[0].keys().mapping": MappingProxyType,
    "(1, 2)": tuple,
    "range(3)": range,
    "none": type(None),
    "nothing": jinja2.Undefined,
    "namespace(a=1)": jinja2.utils.Namespace,
    "cycler('a', 'b')": jinja2.utils.Cycler,
    "joiner()": jinja2.utils.Joiner,
    "loop": jinja2.runtime.LoopContext,
    "self": jinja2.runtime.TemplateReference,
    "self.own": jinja2.runtime.BlockReference,
    "own": jinja2.runtime.Macro,
}
WRITERS = ("{{ v }}", "{{ [v] | string }}{{ '%r' % [v] }}{{ '{0!s:>9}'.format(v) }}{{ [v, v] | join }}")


def written(value: str) -> Iterator[str]:
    """What templates can write of a value, where they can."""
    before = "{% macro own() %}{% endmacro %}{% block own %}{% endblock %}"
    for writer in WRITERS:
        source = f"{before}{{% for i in [1] %}}{{% set v = {value} %}}{writer}{{% endfor %}}"
        with suppress(TemplateError):
            yield render(source)


@pytest.mark.parametrize("value", SAMPLES)
def test_nothing_that_a_template_can_get_shows_where_it_lies(value: str) -> None:
    """Each attribute of each kind of value, what each filter makes of it, and the value itself."""
    names = [name for name in dir(SAMPLES[value]) if not name.startswith("_")]
    gets = [value, f"({value})['get']", f"(({value}) | attr('format'))", f"(({value}) | map('upper'))"]
    gets += [f"({value}).{name}" for name in names]
    gets += [f"(({value}) | {name})" for name in jinja2.filters.FILTERS if name != "random"]
    shown = [text for get in gets for text in written(get)]
    assert not [text for text in shown if re.search(r"0x[0-9a-f]{6}", text)]


def test_no_function_of_all_templates_shows_where_it_lies() -> None:
    names = [*jinja2.defaults.DEFAULT_NAMESPACE, "raise_exception", "strftime_now"]
    assert not [text for name in names for text in written(name) if re.search(r"0x[0-9a-f]{6}", text)]


def test_what_must_not_be_called_is_not_called_by_a_stand_in() -> None:
    class Holder:
        @jinja2.sandbox.unsafe
        def own(self) -> None:
            raise AssertionError("called")

    template = Sandbox().from_string("{{ holder.own() }}")
    with pytest.raises(jinja2.TemplateError):
        template.render(holder=Holder())


@pytest.mark.parametrize(
    "source",
    [
        "{% set n = messages | map(attribute='role') %}{% if n %}{{ n | first }}{{ n | list }}{% endif %}",
        "{{ ', '.join(['a', 'b']) }}{{ messages[0].get('role') }}{{ '{}-{x}'.format(1, x=2) }}",
        "{% set c = cycler('a', 'b') %}{{ c.next() ~ c.next() ~ c.current }}{% set j = joiner('|') %}{{ j() ~ j() }}",
        "{% set f = messages[0].get %}{{ f is callable }}{{ f('nothing', 7) }}{{ f == f }}",
        "{% for role, group in messages | groupby('role') %}{{ role }}{{ group | length }}{% endfor %}",
        "{{ messages | selectattr('role', 'equalto', 'none of them') and 'an iterator is true' }}",
        "{% for m in messages | reverse %}{{ loop.index }}{{ loop.cycle('x', 'y') }}{{ loop.last }}{% endfor %}",
        "{% for row in range(5) | batch(2, 'x') %}{{ row }}{% endfor %}{{ range(3) | sum }}",
        "{% for a in [1, [2]] recursive %}{{ a if a is number else loop(a) }}{% endfor %}{{ 'b' in messages[0] }}",
        "{% set ns = namespace(found=false) %}{% set ns.found = true %}{{ ns.found }}{{ ns }}{{ loop }}{{ dict(a=1) }}",
        "{% macro m(x) %}{{ x }}{{ caller() }}{% endmacro %}{% call m('a') %}b{% endcall %}{{ m }}{{ m.name }}",
        "{{ messages[0].items() | list }}{{ messages[0].keys() }}{{ messages[0] | dictsort | map('join') | join }}",
    ],
)
def test_stand_ins_do_what_they_stand_for(source: str) -> None:
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=[jinja2.ext.loopcontrols])
    turns = [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]
    assert ChatTemplate(source, TODAY).render(turns).text == plain.from_string(source).render(messages=turns)


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
