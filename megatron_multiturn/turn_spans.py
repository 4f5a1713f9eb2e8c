"""A rendered text and the spans of its turns -> segments; positions are in characters."""

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_multiturn.control_tokens import ControlToken
from megatron_multiturn.modes import CONTEXT, TARGET_BEGIN, TARGET_CONTINUE
from megatron_multiturn.templates import Part, Segment, Special

Span = tuple[int, int]  # (start, stop)
TokenSpan = tuple[int, int, ControlToken]


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedText:
    """What a template wrote, and what is known of it."""

    text: str
    tokens: list[TokenSpan]  # the control tokens that the template wrote, in order
    turns: list[list[Span]]  # the spans of each turn, all in order, none empty
    turn_weights: list[float]  # of each turn
    gaps: list[Span]  # what is masked inside answers
    message_starts: list[int]  # where windows may open
    leading_stop: int  # up to here every window of a long session repeats it


def subtract(spans: Iterable[Span], gaps: Sequence[Span]) -> list[Span]:
    """The spans without the gaps.

    [(0, 9)] without [(2, 3), (5, 9)] is [(0, 2), (3, 5)].
    """
    left = list(spans)
    for start, stop in gaps:
        left = [
            piece
            for begin, end in left
            for piece in ((begin, min(end, start)), (max(begin, stop), end))
            if piece[0] < piece[1]
        ]
    return left


def is_closed(rendered: RenderedText, spans: list[Span]) -> bool:
    """Whether a turn ends with a control token, white space aside."""
    start, stop = spans[-1]
    last = bisect.bisect_left(rendered.tokens, stop, key=_start) - 1
    if last < 0:
        return False
    begin, end, _ = rendered.tokens[last]
    return start <= begin and end <= stop and not rendered.text[end:stop].strip()


def cut_segments(rendered: RenderedText) -> tuple[Segment, ...]:
    """The segments; joined they are the whole text, less what the tokens strip."""
    turns = [[_widen(span, rendered.tokens) for span in spans] for spans in rendered.turns]
    owners = sorted(
        (start, stop, number) for number, spans in enumerate(turns) for start, stop in spans
    )
    leading_stop = _snap(rendered.leading_stop, rendered.tokens)
    starts = {_snap(start, rendered.tokens) for start in rendered.message_starts}
    edges = {0, len(rendered.text), leading_stop, *starts}
    edges.update(edge for start, stop, _ in owners for edge in (start, stop))
    cuts = sorted(edge for edge in edges if not _is_inside(edge, owners))
    atoms = _atoms(rendered.text, rendered.tokens)
    segments: list[Segment] = []
    begun: set[int] = set()
    owner = atom = 0
    for start, stop in itertools.pairwise(cuts):
        parts: list[Part] = []
        while atom < len(atoms) and atoms[atom][1] <= start:
            atom += 1
        for begin, end, special in itertools.islice(atoms, atom, None):
            if begin >= stop:
                break
            parts.append(special or rendered.text[max(begin, start) : min(end, stop)])
        while owner < len(owners) and owners[owner][1] <= start:
            owner += 1
        is_target = owner < len(owners) and owners[owner][0] <= start
        if not parts:
            continue
        if is_target:
            number = owners[owner][2]
            kind = TARGET_CONTINUE if number in begun else TARGET_BEGIN
            begun.add(number)
            weight = rendered.turn_weights[number]
            segments.append(Segment(kind=kind, parts=tuple(parts), weight=weight))
        else:
            segments.append(
                Segment(
                    kind=CONTEXT,
                    parts=tuple(parts),
                    starts_message=start in starts,
                    leading_system=stop <= leading_stop,
                    starts_masked=any(begin <= start < end for begin, end in rendered.gaps),
                    ends_masked=any(begin < stop <= end for begin, end in rendered.gaps),
                )
            )
    return tuple(segments)


def _atoms(text: str, tokens: list[TokenSpan]) -> list[tuple[int, int, Special | None]]:
    """(start, stop, special) of all tokens and of the texts between them, none empty."""
    atoms: list[tuple[int, int, Special | None]] = []
    done = 0
    strips = False
    for start, stop, token in tokens:
        atoms += _text_atom(text, done, start, strips, token.strips_left)
        atoms.append((start, stop, Special(token=token.literal)))
        done, strips = stop, token.strips_right
    return atoms + _text_atom(text, done, len(text), strips, False)


def _text_atom(
    text: str, start: int, stop: int, strips_head: bool, strips_tail: bool
) -> list[tuple[int, int, Special | None]]:
    if strips_head:
        start = stop - len(text[start:stop].lstrip())
    if strips_tail:
        stop = start + len(text[start:stop].rstrip())
    return [(start, stop, None)] if start < stop else []


def _widen(span: Span, tokens: list[TokenSpan]) -> Span:
    """A token that a turn covers in part is wholly the turn's."""
    start, stop = span
    inside = _token_around(stop, tokens)
    return _snap(start, tokens), stop if inside is None else inside[1]


def _snap(edge: int, tokens: list[TokenSpan]) -> int:
    inside = _token_around(edge, tokens)
    return edge if inside is None else inside[0]


def _token_around(edge: int, tokens: list[TokenSpan]) -> TokenSpan | None:
    """The token that the edge lies within."""
    before = bisect.bisect_left(tokens, edge, key=_start) - 1
    return tokens[before] if before >= 0 and edge < tokens[before][1] else None


def _start(span: tuple[int, int, object]) -> int:
    return span[0]


def _is_inside(edge: int, owners: list[tuple[int, int, int]]) -> bool:
    before = bisect.bisect_left(owners, edge, key=_start) - 1
    return before >= 0 and edge < owners[before][1]
