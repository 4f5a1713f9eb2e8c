"""Jinja for chat templates of strangers: what they may reach, how long they may run.

A template sees what Hugging Face's chat templates expect (`raise_exception`, `strftime_now`,
`tojson` without HTML's escapes, loop controls, `{% generation %}`) and nothing of Python. It is
stopped where it takes more processor time, memory or output than any chat needs.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from megatron_multiturn.append_only import message_loop
from megatron_multiturn.containment import TemplateLimitError, bounded_session

# Noncharacters: no text holds them. They stand around what a `{% generation %}` block writes.
GENERATION_OPEN = "\ufdd0"
GENERATION_CLOSE = "\ufdd1"
# Stands behind each message, if the template only appends.
MESSAGE_END = "\ufdd3"

_MAX_OUTPUT_CHARACTERS = 1 << 26
_MAX_INTEGER_BITS = 4096
_MAX_REPEATED = 1 << 24  # elements of a sequence multiplied by a number


class TemplateRefusalError(jinja2.TemplateError):
    """The template itself refuses the session, by `raise_exception`."""


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the model writes."""

    tags = {"generation"}  # noqa: RUF012  # so declared by Jinja

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marked = [_text(GENERATION_OPEN), *body, _text(GENERATION_CLOSE)]
        # Variables set inside do not outlast the block, as where it is a macro's call.
        return nodes.Scope(marked, lineno=line)


def _text(data: str) -> nodes.Node:
    return nodes.Output([nodes.TemplateData(data)])


class _Dict:
    """`dict(...)` without the type's attributes."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Products and powers that Python would work on for ever are refused."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            size = left.bit_length() * max(right, 0)
        elif isinstance(left, int) and isinstance(right, int):
            size = left.bit_length() + right.bit_length()
        else:
            size = 0
            for one, other in ((left, right), (right, left)):
                if isinstance(one, int) and hasattr(other, "__len__"):
                    _limit(one * len(other), _MAX_REPEATED, "repeats a text or a list")
        _limit(size, _MAX_INTEGER_BITS, "computes a number")
        return super().call_binop(context, operator, left, right)


def _limit(size: int, limit: int, what: str) -> None:
    if size > limit:
        raise TemplateLimitError(f"it {what} to a size of {size:,}")


class ChatSandbox:
    """Compiles and renders one template."""

    def __init__(self, source: str, *, now: datetime) -> None:
        """Compile it; now: what `strftime_now` says.

        Raises jinja2.TemplateSyntaxError, RecursionError and TemplateLimitError.
        """
        environment = _Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            optimized=False,  # or constants are computed here, where nothing bounds them
        )
        environment.filters["tojson"] = _to_json
        environment.globals.pop("lipsum")
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime(now)
        environment.globals["dict"] = _Dict()
        environment.globals["namespace"] = _Namespace
        with bounded_session():
            tree = environment.parse(source)
            _refuse_other_files(tree)
            self.literal_text = "".join(_literals(tree))
            loop = message_loop(tree)
            if loop is not None:
                loop.body.append(_text(MESSAGE_END).set_environment(environment))
            self._template = environment.from_string(tree)
        self.marks_messages = loop is not None
        self.has_markers = any(
            data.data == GENERATION_OPEN for data in tree.find_all(nodes.TemplateData)
        )

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text, with the marks of blocks and of messages (if `marks_messages`).

        Raises what the template raises, and TemplateLimitError.
        """
        text = self._template.render(variables)
        if len(text) > _MAX_OUTPUT_CHARACTERS:
            raise TemplateLimitError(f"it writes {len(text):,} characters")
        return text


def _refuse_other_files(tree: nodes.Template) -> None:
    kinds = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    for node in tree.find_all(kinds):
        raise jinja2.TemplateSyntaxError(
            f"{{% {type(node).__name__.lower()} %}} reads another file, and a chat template is one",
            node.lineno,
        )


def _literals(tree: nodes.Template) -> Iterator[str]:
    """All text that the template itself may write."""
    for data in tree.find_all(nodes.TemplateData):
        yield data.data + "\n"
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str):
            yield constant.value + "\n"


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: Any) -> None:
    raise TemplateRefusalError(str(message))


def _strftime(now: datetime) -> Callable[[str], str]:
    return lambda form: now.strftime(form)


class _Namespace(Namespace):
    """`namespace(...)` without names that Python itself gives a meaning."""

    def __init__(*args: Any, **values: Any) -> None:  # a value may be called self
        made = dict(*args[1:], **values)
        for name in made:
            _check_name(name)
        Namespace.__init__(args[0], made)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} is no name for a namespace's value")
