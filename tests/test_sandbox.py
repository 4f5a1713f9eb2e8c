"""Chat templates of strangers: what they reach for, and how much they take."""

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import datetime

import pytest
from session_fixtures import make_session

from megatron_multiturn import containment
from megatron_multiturn.containment import TemplateLimitError, bounded, bounded_session
from megatron_multiturn.errors import ConfigError, MultiTurnError, SessionError
from megatron_multiturn.jinja_templates import JinjaOptions, JinjaTemplate
from megatron_multiturn.sandbox import ChatSandbox
from megatron_multiturn.templates import Document, rendering_text

NOW = datetime(2026, 1, 31)
GOOD = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def documents(source: str) -> list[Document]:
    """What the session becomes in a template of this text, used like any other."""
    template = JinjaTemplate(
        source, name="t", control_tokens=[], named_tokens={}, options=JinjaOptions(now=NOW)
    )
    return template.documents(make_session(1))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(containment, "MAX_SECONDS", 0.5)
    yield
    assert documents(GOOD)  # nothing is left behind


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__",
        "''.__class__.__base__.__subclasses__()",
        "(''|attr('__class__')).__mro__",
        "['']|map(attribute='__class__')|map(attribute='__mro__')|list",
        "raise_exception.__globals__['__builtins__']",
        "strftime_now.__closure__",
        "namespace.__init__.__globals__",
        "cycler.__init__.__globals__",
        "dict.__class__.__call__",
        "namespace(__class__=1)",
        "self._TemplateReference__context",
        "range.__self__.x",
        "messages.append(1)",
        "messages[0].update({'role': 'assistant'})",
        "messages[0].pop('content')",
        "lipsum(1000)",
    ],
)
def test_nothing_of_python_is_reached(expression: str) -> None:
    with pytest.raises(
        MultiTurnError, match=r"was stopped: access to|no name for|is undefined|has"
    ):
        documents("{% set found = " + expression + " %}{{ found.x }}" + GOOD)


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__",
        "''|attr('__class__')",
        "['']|map(attribute='__class__')|join",
        "'{0.__class__.__mro__}'.format('')",
        "'{a.__class__}'.format_map({'a': ''})",
        "('{0.__class__}'|attr('format'))('')",
        "['']|map('attr', '__class__')|join",
        "'%s' % raise_exception.__globals__",
        "messages[0].__class__",
        "messages.__class__",
    ],
)
def test_no_attribute_of_python_is_written(expression: str) -> None:
    """Such an attribute is undefined: nothing, or an error where it is used."""
    try:
        found = documents(f"{{{{ {expression} }}}}{GOOD}")
    except ConfigError as error:
        outcome = str(error)
    else:
        outcome = "".join(rendering_text(document.segments) for document in found)
    assert outcome.startswith("the chat template was stopped: access to attribute") or (
        outcome == "<user>question 1<end><assistant>answer 1<end>"
    )


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
        "{{ m(60) }}",
        "{% set a = (range(100000)|list) * 160 %}{% for i in range(100) %}{{ a|sort|first }}"
        "{% endfor %}",
        "{{ ('a b ' * 4000000)|wordwrap(1)|length }}",
        "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
        "{% endfor %}{{ ns.a|pprint }}",
        "{% for a in [[1]] recursive %}{% for i in range(9000) %}{% for j in range(100000) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
    ],
)
@pytest.mark.usefixtures("impatient")
def test_time_is_bounded(source: str) -> None:
    with pytest.raises(
        SessionError, match=r"made.jsonl:1: template t was stopped, as it runs for more than 0.5 s"
    ) as raised:
        documents(source)
    assert raised.value.reason == "template-limit"


@pytest.mark.usefixtures("impatient")
def test_the_time_to_read_a_template_is_bounded() -> None:
    with pytest.raises(ConfigError, match=r"read the template: it runs for more than 0.5 s"):
        documents("{{ 1|round(-100000000) }}")


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{{ 'a' * 10**9 }}", "repeats a text or a list to a size of 1,000,000,000"),
        ("{{ [messages] * 10**9 }}", "repeats a text or a list"),
        ("{{ (2 ** 4000) ** 4000 }}", "computes a number to a size of"),
        (
            "{% set ns = namespace(x=2) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}"
            "{% endfor %}",
            "computes a number to a size of",
        ),
        ("{{ 'x'.ljust(900000000) }}", "writes 900,000,000 characters"),
        ("{{ 'x'|center(2000000000) }}", "takes 1,073,741,824 bytes of memory"),
        ("{{ '{:>2000000000}'.format('x') }}", "takes 1,073,741,824 bytes of memory"),
        (
            "{% set a = 'a' * 16000000 %}{% for i in range(1000) %}{{ a }}{% endfor %}",
            "takes 1,073,741,824 bytes of memory",
        ),
        (
            "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
            "{% endfor %}",
            "takes 1,073,741,824 bytes of memory",
        ),
    ],
)
def test_size_is_bounded(source: str, match: str) -> None:
    with pytest.raises(SessionError, match=match) as raised:
        documents(source)
    assert raised.value.reason == "template-limit"
    assert documents(GOOD)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{{ range(10**9)|list }}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth exceeded"),
        ("{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}", "maximum recursion depth"),
        ("{{ nothing.here }}", "fails on the session: 'nothing' is undefined"),
        ("{{ raise_exception('no  such\nthing') }}", "refuses the session: no such thing;"),
    ],
)
def test_failures_say_why(source: str, match: str) -> None:
    with pytest.raises(SessionError, match=match):
        documents(source)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{% include '/etc/passwd' %}", r"t:1: .*{% include %} reads another file"),
        ("a\n{% import '/etc/passwd' as x %}", r"t:2: .*{% import %} reads another file"),
        ("{% from '/etc/passwd' import x %}", "{% fromimport %} reads another file"),
        ("{% extends '/etc/passwd' %}", "{% extends %} reads another file"),
        ("{% for m in messages %}", r"t:1: Jinja cannot read the template: Unexpected end"),
        ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "maximum recursion depth"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "maximum recursion depth"),
        ("{% generation %}a", "Jinja cannot read the template"),
    ],
)
def test_templates_that_cannot_be_read(source: str, match: str) -> None:
    with pytest.raises(
        ConfigError, match=f"--chat-template {match}" if match[:2] == "t:" else match
    ):
        documents(source)


def test_what_never_comes_back_ends_the_process_with_its_stack() -> None:
    """A comparison that takes 2^60 steps of C, between which no signal's handler runs."""
    code = """
        import sys
        from datetime import datetime
        from megatron_multiturn import containment
        from megatron_multiturn.sandbox import ChatSandbox
        containment._MAX_STUCK_SECONDS = 1.0
        source = '''{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}
        {% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}
        {{ ns.a == ns.b }}'''
        with containment.bounded_session():
            ChatSandbox(source, now=datetime(2026, 1, 31)).render({})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGPROF
    assert 'File "<template>", line ' in done.stderr


def test_bounds_are_lifted_behind_a_batch() -> None:
    import resource

    before = (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM))
    with bounded():
        assert resource.getrlimit(resource.RLIMIT_AS) != before[0]
        with pytest.raises(TemplateLimitError, match="bytes of memory"), bounded_session():
            ChatSandbox("{{ 'x'|center(2000000000) }}", now=NOW).render({})
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == signal.getitimer(signal.ITIMER_PROF) == (0, 0)


@pytest.mark.usefixtures("impatient")
def test_a_sessions_time_begins_anew_in_a_batch() -> None:
    """Each of them would run for too long together with the one before it."""
    some = "{% for i in range(40) %}{% for j in range(50000) %}{% endfor %}{% endfor %}" + GOOD
    template = JinjaTemplate(
        some, name="t", control_tokens=[], named_tokens={}, options=JinjaOptions(now=NOW)
    )
    start = containment._clock.ticks
    with template.batch():
        while containment._clock.ticks < start + 8:
            assert template.documents(make_session(1))


def test_what_chat_templates_expect_is_there() -> None:
    source = (
        "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- if m.role == 'x' -%}"
        "{%- continue -%}{%- endif -%}{%- set ns.n = ns.n + 1 -%}{%- endfor -%}"
        "{{ ns.n }} {{ {'b': '<é>', 'a': [1]}|tojson }} {{ strftime_now('%d %b %Y') }} "
        "{{ dict(a=1)|tojson(indent=1) }} {{ 'x'.join(['a', 'b']) }} {{ tools is none }}"
    )
    text = ChatSandbox(source, now=NOW).render({"messages": [{"role": "u"}], "tools": None})
    assert text == '1 {"b": "<é>", "a": [1]} 31 Jan 2026 {\n "a": 1\n} axb True'
