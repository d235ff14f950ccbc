"""The environment that templates run in: nothing random reaches them, and stand-ins do what they stand for."""

from __future__ import annotations

import datetime
import subprocess
import sys
from collections.abc import Iterator
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
    "own": jinja2.runtime.Macro,
    "cycler": jinja2.utils.Cycler,
    "joiner": jinja2.utils.Joiner,
    "namespace": jinja2.utils.Namespace,
    "dict": dict,
    "range": type(jinja2.sandbox.safe_range),
    "lipsum": type(jinja2.sandbox.safe_range),
    "raise_exception": type(jinja2.sandbox.safe_range),
    "strftime_now": type(jinja2.sandbox.safe_range),
}
MADE_BY_HAND = (
    "{{ {(1, 'a'): 1, (0, 'b'): 6, (none, 2): 4, ('z', none): 5, ('z', 3): 7, (2, none): 8} | pprint }}",
    "{% macro a() %}{% endmacro %}{% macro b() %}{% endmacro %}{{ {a: 1, b: 2} | pprint }}",
    "{% set d = {} %}{% set _ = dict.update(d, a=d) %}{{ d | pprint }}",
    "{% set n = namespace() %}{% set n.l = [n] %}{{ n | pprint }}{{ [n.l, n.l] | pprint }}",
    "{{ (messages[0].keys() - ['role']) | list }}{{ messages[0].items() | list }}",
    "{{ '%(own)s' % self }}{% block own %}{% endblock %}",
    "{{ '{own}'.format_map(self) }}{% block own %}{% endblock %}",
    "{{ ('%(a)s' | safe) % {'a': messages[0].get} }}",
    "{{ '%s' % messages[0].get }}{{ '{0.get!r:>90}'.format(messages[0]) }}",
    "{{ raise_exception(messages[0].get) }}",
    "{{ (messages | map(attribute='role')) ~ '' }}",
)


def sources() -> Iterator[str]:
    """Each attribute of each kind of value, what each filter makes of it, and the value itself, each in a list."""
    for value, kind in SAMPLES.items():
        gets = [value, f"({value})['get']", f"(({value}) | attr('format'))", f"(({value}) | map('upper'))"]
        gets += [f"({value}).{name}" for name in dir(kind) if not name.startswith("_")]
        gets += [f"(({value}) | {name})" for name in jinja2.filters.FILTERS if name != "random"]
        for get in gets:
            made = f"{{% for i in [1] %}}{{{{ [{get}] | string }}}}{{% endfor %}}"
            yield f"{{% macro own() %}}{{% endmacro %}}{made}"
    yield from MADE_BY_HAND


def write_all() -> None:
    """Print what each source writes, or why it writes nothing."""
    for source in sources():
        try:
            print(ascii(render(source)))
        except TemplateError as error:
            print(ascii(str(error)))


def test_all_that_a_template_can_get_is_the_same_in_another_process() -> None:
    """Two processes have another seed of hashes, and place objects elsewhere."""
    command = [sys.executable, "-c", "from tests.text.test_sandbox import write_all; write_all()"]
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    running = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, env={**environment, "PYTHONHASHSEED": seed}, text=True
        )
        for seed in "12"
    ]
    one, other = (process.communicate()[0].splitlines() for process in running)
    named = list(sources())
    assert len(one) == len(other) == len(named)
    assert [
        named[place] for place, pair in enumerate(zip(one, other, strict=True)) if len(set(pair)) > 1
    ] == []
    assert sum("the chat template" not in line for line in one) > 500, "most are written"


def test_a_template_changes_nothing_of_what_it_is_given() -> None:
    turns = [{"role": "user", "content": [{"n": 0}]}]
    for source in (
        "{% set _ = dict.update(messages[0].content[0], n=1) %}",
        "{% set _ = messages[0].content[0].update(n=1) %}",
        "{% set _ = dict.clear(messages[0].content[0]) %}",
    ):
        with pytest.raises(TemplateError):
            ChatTemplate(source, TODAY).render(turns)
    assert turns == [{"role": "user", "content": [{"n": 0}]}]


def test_a_stand_in_is_called_what_it_stands_for() -> None:
    with pytest.raises(TemplateError, match="'builtin_function_or_method object' has no attribute 'x'"):
        render("{{ messages[0].get.x.y }}")


@pytest.mark.parametrize(
    "source",
    ["{{ raise_exception(messages[0].get) }}", "{{ raise_exception([{}.get]) }}", "{{ [1, 2][{}.get] + 1 }}"],
)
def test_a_template_that_fails_over_what_has_no_text_fails_by_name(source: str) -> None:
    with pytest.raises(TemplateError, match="the chat template fails: "):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ self._TemplateReference__context.environment }}",
        "{{ self.__init__.__globals__ }}",
        "{% block a %}{{ self.a() }}{% endblock %}",
        "{% macro m() %}{{ '%(a)s' % self }}{% endmacro %}",
    ],
)
def test_blocks_of_a_templates_own_are_not_there(source: str) -> None:
    with pytest.raises(TemplateError, match=r"does not compile: self is not there.* \(line 2\)"):
        render(f"a\n{source}")


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
        "{% set n = namespace() %}{% for m in messages %}{% set n.l = loop %}{{ n.l.last }}{{ [loop][0] }}{% endfor %}",
        "{% for m in messages %}{{ {'l': loop}.l.index }}{{ ([loop] | first).last }}{{ loop.nextitem }}{% endfor %}",
        "{{ '{self}'.format(self='x') }}{{ dict(self=1) }}{{ messages[0].get('content').upper().title() }}",
        "{{ dict.fromkeys(['a'], 1) }}{{ {1: 2, 0: 3} | pprint }}{{ {'b': [1], 'a': {'d': none}} | pprint }}",
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
    assert shown == said.upper() + " and <f at 0xdeadbeef>"


def test_differences_of_views_keep_the_order_of_the_dict() -> None:
    names = [f"key{number}" for number in range(50)]
    source = "{% set d = messages[0].d %}{{ (d.keys() - ['key7'] - d.keys().mapping.values()) | join(',') }}"
    shown = ChatTemplate(source, TODAY).render([{"d": dict.fromkeys(names, "x")}]).text
    assert shown == ",".join(name for name in names if name != "key7")
    assert render("{{ 7 - 3 }}") == "4"
