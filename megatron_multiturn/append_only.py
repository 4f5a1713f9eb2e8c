"""Chat templates that provably only append: one message more, some text more at the end.

Of such a template the rendering of the first messages is the head of the rendering of all, so one
rendering holds all of them, if it is known where each message ends. Proved of the template's tree:

- one loop at its top level goes over `messages`, and nothing leaves that loop early;
- elsewhere `messages` stands only as `messages[0]`;
- in the loop `loop` tells only of what was, by `index`, `index0`, `first` or `previtem`;
- behind the loop stand only conditions on `add_generation_prompt`, whose bodies read nothing that
  the loop could have changed.

What a message's round of the loop writes then depends on no later message, and what is written
behind the loop not on how many there were.
"""

from collections.abc import Iterator

from jinja2 import nodes

_KNOWN = (
    *(nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign, nodes.AssignBlock),
    *(nodes.Scope, nodes.Const, nodes.Name, nodes.NSRef, nodes.Getattr, nodes.Getitem),
    *(nodes.Slice, nodes.Filter, nodes.Test, nodes.Call, nodes.Keyword, nodes.Compare),
    *(nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.CondExpr, nodes.Concat),
    *(nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Neg, nodes.Pos),
    *(nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair),
)
_PAST = ("index", "index0", "first", "previtem")
_PROMPT = "add_generation_prompt"


def message_loop(tree: nodes.Template) -> nodes.For | None:
    """The loop over the messages of a template that only appends; None of any other."""
    if any(not isinstance(node, _KNOWN) for node in tree.find_all(nodes.Node)):
        return None
    if any(one.name == "random" for one in tree.find_all(nodes.Filter)):
        return None
    names = {"messages"}
    body = list(_split_outputs(tree.body))
    for number, node in enumerate(body):
        if _is_alias(node, names):
            assert isinstance(node, nodes.Assign)
            assert isinstance(node.target, nodes.Name)
            names.add(node.target.name)
        elif isinstance(node, nodes.For) and _is_name(node.iter, names):
            plain = not (node.else_ or node.test or node.recursive)
            kept = all(_looks_back(one, names, is_inner=False) for one in node.body)
            behind = all(_asks_only(one, tree, names) for one in body[number + 1 :])
            return node if plain and kept and behind and not _reassigned(tree, names) else None
        elif not _looks_back(node, names, is_inner=True):
            return None
    return None


def _split_outputs(body: list[nodes.Node]) -> Iterator[nodes.Node]:
    """The nodes of a body, without texts that are empty."""
    for node in body:
        if isinstance(node, nodes.Output) and all(
            isinstance(one, nodes.TemplateData) and not one.data for one in node.nodes
        ):
            continue
        yield node


def _is_name(node: nodes.Node, names: set[str]) -> bool:
    return isinstance(node, nodes.Name) and node.name in names


def _is_alias(node: nodes.Node, names: set[str]) -> bool:
    return (
        isinstance(node, nodes.Assign)
        and isinstance(node.target, nodes.Name)
        and _is_name(node.node, names)
    )


def _reassigned(tree: nodes.Template, names: set[str]) -> bool:
    """Whether a name of the messages is given to something else, or twice."""
    stored = [one.name for one in tree.find_all(nodes.Name) if one.ctx != "load"]
    return any(stored.count(name) > (name != "messages") for name in names) or "loop" in stored


def _looks_back(node: nodes.Node, names: set[str], *, is_inner: bool) -> bool:
    """Whether it reads of the messages and their loop only what an earlier end leaves as it is.

    is_inner: `loop` is another one here.
    """
    if isinstance(node, nodes.Name):
        return node.name not in names | {"self"} and (is_inner or node.name != "loop")
    if isinstance(node, nodes.Getitem) and _is_name(node.node, names):
        return isinstance(node.arg, nodes.Const) and node.arg.value == 0
    if isinstance(node, nodes.Getattr) and _is_name(node.node, {"loop"}) and not is_inner:
        return node.attr in _PAST
    if isinstance(node, nodes.For):
        outer = [node.target, node.iter, *node.else_, *([node.test] if node.test else [])]
        return all(_looks_back(one, names, is_inner=is_inner) for one in outer) and all(
            _looks_back(one, names, is_inner=True) for one in node.body
        )
    return all(_looks_back(one, names, is_inner=is_inner) for one in node.iter_child_nodes())


def _asks_only(node: nodes.Node, tree: nodes.Template, names: set[str]) -> bool:
    """Whether it writes only what asks for an answer, the same behind any message."""
    if not isinstance(node, nodes.If) or node.elif_ or node.else_:
        return False
    changed = {one.name for one in tree.find_all(nodes.NSRef)} | names | {"loop", "self"}
    changed |= {one.name for one in tree.find_all(nodes.Name) if one.ctx != "load"}
    inside = [one for part in node.body for one in (part, *part.find_all(nodes.Node))]
    return _is_name(node.test, {_PROMPT}) and not any(
        isinstance(one, nodes.Call) or _is_name(one, changed) for one in inside
    )
