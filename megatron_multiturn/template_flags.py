"""The flags that choose a template, for our own commands, and the template that they describe."""

import argparse
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_multiturn.encoding import LITERAL_CONTROL_TOKENS
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.jinja_templates import (
    HISTORY_REWRITING,
    MARKERS,
    JinjaOptions,
    JinjaTemplate,
)
from megatron_multiturn.sessions import RESERVED_VARIABLES
from megatron_multiturn.template_families import TEMPLATES
from megatron_multiturn.templates import ChatTemplate
from megatron_multiturn.vocabulary import Vocabulary

_OF_TOKENIZER = "tokenizer"
_MAX_TEMPLATE_BYTES = 1 << 20


def add_template_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags; one of the first two is required."""
    group = parser.add_argument_group("template", "how a session is written")
    choice = group.add_mutually_exclusive_group(required=True)
    choice.add_argument("--template", choices=sorted(TEMPLATES), help="a built-in template")
    choice.add_argument(
        "--chat-template",
        dest="jinja_template",
        metavar="tokenizer|FILE",
        help="a Hugging Face chat template: the tokenizer's own, or a file",
    )
    group.add_argument(
        "--history-rewriting",
        choices=HISTORY_REWRITING,
        default="expand",
        help="if the chat template writes an answer otherwise once more messages follow: a "
        "document an answer (default), the last answer only, or an error",
    )
    group.add_argument(
        "--generation-markers",
        choices=MARKERS,
        default="answer",
        help="leave out of a {%% generation %%} block what the generation prompt writes "
        "(default), or take it verbatim",
    )
    group.add_argument(
        "--template-variables",
        metavar="JSON",
        help='variables for the chat template, such as {"enable_thinking": false}; those of a '
        "session go before them",
    )
    group.add_argument(
        "--template-date",
        metavar="YYYY-MM-DD",
        help="the date that a chat template writes, if it writes one (default: today)",
    )
    group.add_argument(
        "--literal-control-tokens",
        choices=LITERAL_CONTROL_TOKENS,
        default="escape",
        help="a message that spells a control token: keep it as text (default), or an error",
    )


def build_template(
    args: argparse.Namespace, vocabulary: Vocabulary, tokenizer: Any
) -> ChatTemplate:
    """The template for the flags in `args`; ConfigError if there is no such template.

    tokenizer: Megatron's, whose own chat template may be asked for.
    """
    if args.template is not None:
        _refuse_flags_of_chat_templates(args)
        return TEMPLATES[args.template]
    source = args.jinja_template
    text = _own_template(tokenizer) if source == _OF_TOKENIZER else _read(source)
    options = JinjaOptions(
        history_rewriting=args.history_rewriting,
        markers=args.generation_markers,
        variables=_variables(args.template_variables),
        now=_date(args.template_date),
    )
    return JinjaTemplate(
        text,
        name=source if source == _OF_TOKENIZER else Path(source).name,
        control_tokens=vocabulary.control_tokens(),
        named_tokens=vocabulary.named_tokens(),
        options=options,
    )


def _refuse_flags_of_chat_templates(args: argparse.Namespace) -> None:
    given = {
        "--history-rewriting": args.history_rewriting != HISTORY_REWRITING[0],
        "--generation-markers": args.generation_markers != MARKERS[0],
        "--template-variables": args.template_variables is not None,
    }
    for flag, is_given in given.items():
        if is_given:
            raise ConfigError(
                f"{flag}: has no effect on the built-in template {args.template!r}; pass "
                "--chat-template, or leave it out"
            )


def _own_template(tokenizer: Any) -> str:
    wrapper = getattr(tokenizer, "_tokenizer", tokenizer)
    below = getattr(wrapper, "tokenizer", None)
    found = getattr(below, "chat_template", None) or getattr(wrapper, "chat_template", None)
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str) or not found.strip():
        raise ConfigError(
            "--chat-template tokenizer: this tokenizer has no chat template; pass a file, or "
            "--template for a built-in one"
        )
    return found


def _read(path: str) -> str:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--chat-template {path}: cannot be read ({error.strerror}); pass a file, or "
            "'tokenizer' for the tokenizer's own template"
        ) from None
    if len(data) > _MAX_TEMPLATE_BYTES:
        raise ConfigError(
            f"--chat-template {path}: {len(data):,} bytes are no template; pass a Jinja file"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"--chat-template {path}: is not UTF-8 text; convert it") from None


def _variables(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--template-variables: not JSON ({error}); pass an object") from None
    if not isinstance(value, dict):
        raise ConfigError(f"--template-variables {text}: must be a JSON object")
    for name in RESERVED_VARIABLES:
        if name in value:
            raise ConfigError(
                f"--template-variables sets {name!r}, which every template is given; remove it"
            )
    return value


def _date(text: str | None) -> datetime:
    if text is None:
        return datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)
    try:
        return datetime.strptime(text, "%Y-%m-%d")
    except ValueError:
        raise ConfigError(f"--template-date {text}: is no date; pass one like 2026-01-31") from None
