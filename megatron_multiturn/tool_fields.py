"""Tools and their calls, read out of a record, however they are spelt.

    tools           [{"type": "function", "function": {"name": ...}}] or bare schemas, or the JSON
                    text of either; `functions` is the same key of before
    tool_calls      [{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}]
                    or [{"name": ..., "arguments": ...}]
    function_call   one {"name": ..., "arguments": ...}; in ShareGPT the text of a message

Arguments are an object or its JSON text.
"""

import json
from typing import Any

from megatron_multiturn.errors import SessionError
from megatron_multiturn.fields import is_blank, json_field, show, text_of
from megatron_multiturn.messages import ToolCall

_TOOLS_KEYS = ("tools", "functions")


def read_tools(record: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """The schemas of the tools of a session, as they are given."""
    given = [key for key in _TOOLS_KEYS if not is_blank(record.get(key))]
    if not given:
        return ()
    if len(given) > 1:
        raise _wrong_tools(f"{where}: both 'tools' and 'functions' are there; keep one")
    key = given[0]
    tools = json_field(record[key], f"{where}: {key!r}", reason="wrong-tools")
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise _wrong_tools(
            f"{where}: {key!r} is {show(tools)}; it must be a list of schemas, or its JSON text"
        )
    schemas = []
    for number, tool in enumerate(tools, start=1):
        schema = json_field(tool, f"{where}: tool {number}", reason="wrong-tools")
        if not isinstance(schema, dict) or not schema:
            raise _wrong_tools(
                f"{where}: tool {number} is {show(schema)}; it must be an object, for example "
                '{"name": "f", "description": "...", "parameters": {...}}'
            )
        text_of(json.dumps(schema, ensure_ascii=False), f"{where}: tool {number}")
        schemas.append(schema)
    return tuple(schemas)


def read_tool_calls(entry: dict[str, Any], where: str) -> tuple[ToolCall, ...]:
    """The calls at `tool_calls`, or the one at `function_call`."""
    many, one = entry.get("tool_calls"), entry.get("function_call")
    if not is_blank(many):
        if not is_blank(one):
            raise _wrong_call(f"{where}: both 'tool_calls' and 'function_call' are there; keep one")
        return parse_calls(many, f"{where}: 'tool_calls'")
    return () if is_blank(one) else parse_calls(one, f"{where}: 'function_call'")


def parse_calls(value: Any, what: str) -> tuple[ToolCall, ...]:
    """The calls that a list, an object or the JSON text of one of them holds; at least one."""
    calls = json_field(value, what, reason="wrong-tool-call")
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not calls:
        raise _wrong_call(
            f"{what} is {show(calls)}; it must be "
            '{"name": "f", "arguments": {...}}, or a list of such calls'
        )
    return tuple(_parse_call(call, f"{what}: call {n}") for n, call in enumerate(calls, start=1))


def _parse_call(value: Any, what: str) -> ToolCall:
    call = json_field(value, what, reason="wrong-tool-call")
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type") not in (None, "function"):
        raise _wrong_call(
            f'{what} is {show(call)}; only calls like {{"name": "f", "arguments": {{...}}}} are '
            "known: correct it"
        )
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise _wrong_call(f"{what} has the name {show(name)}; name the tool that is called")
    identity = call.get("id")
    return ToolCall(
        name=text_of(name, f"{what}: 'name'"),
        arguments=_arguments(function, what),
        id=None if identity is None else text_of(identity, f"{what}: 'id'"),
    )


def _arguments(function: dict[str, Any], what: str) -> str:
    key = "parameters" if "arguments" not in function and "parameters" in function else "arguments"
    value = function.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        return "{}"
    arguments = json_field(value, f"{what}: {key!r}", reason="wrong-tool-call")
    if not isinstance(arguments, dict):
        raise _wrong_call(
            f"{what}: {key!r} is {show(arguments)}; it must be an object, or its JSON text"
        )
    # Infinity and NaN are no JSON; json.loads takes them.
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise _wrong_call(
            f"{what}: {key!r} holds a number that JSON does not have: {show(arguments)}; correct it"
        ) from None
    return text_of(text, f"{what}: {key!r}")


def _wrong_tools(message: str) -> SessionError:
    return SessionError(message, reason="wrong-tools")


def _wrong_call(message: str) -> SessionError:
    return SessionError(message, reason="wrong-tool-call")
