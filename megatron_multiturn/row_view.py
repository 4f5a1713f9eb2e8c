"""Pieces of sessions as text: context dim, the targets of each turn in a colour, a line a turn.

        │ <s>What is red and bad for your teeth?</s>       context
      3 ┃ A brick.</s>                                     targets of turn 3 of the row
        │ ...

A run of tokens that are alike starts a new line; ⏎ is a line feed of the text itself.
"""

import os
import shutil
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.decoding import RunDecoder
from megatron_multiturn.row_pieces import SessionArrays, join_sessions
from megatron_multiturn.samples import RowFormat, RowTurns, row_turns

_TURN_COLORS = (32, 33, 36, 35, 34, 31)  # the terminal's own green, yellow, cyan, ...
_BAR_WIDTH = 16
_SNIPPET_WIDTH = 40
_MIN_WIDTH, _MAX_WIDTH = 60, 100
# Sessions are foreign text: their control characters must not reach the terminal.
_VISIBLE = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPiece:
    """A piece, and where it is from."""

    session_index: int
    session: SessionArrays
    span: tuple[int, ...]  # system_stop, start, target_start, stop

    @property
    def num_positions(self) -> int:
        """Positions that its tokens fill."""
        system_stop, start, _, stop = self.span
        return system_stop + stop - start - 1


@dataclass(frozen=True, slots=True)
class Style:
    """How kinds of text look."""

    color: bool
    width: int  # columns

    def heading(self, text: str) -> str:
        return self._paint("1", text)

    def context(self, text: str) -> str:
        return self._paint("2", text)

    def target(self, number: int, text: str) -> str:
        """Targets of turn `number` of the row, from 1."""
        return self._paint(str(_color_of(number)), text)

    def turn_number(self, number: int) -> str:
        return self._paint(f"7;{_color_of(number)}", f"{number:>4} ")

    def rule(self, text: str) -> str:
        """A heading with a line to its right."""
        return self.heading(f"── {text} ".ljust(self.width, "─"))

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.color and text else text


def use_color(choice: str, *, is_terminal: bool) -> bool:
    """Whether to colour the output, by --color and the usual conventions."""
    if choice != "auto":
        return choice == "always"
    return is_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def terminal_style(color: bool) -> Style:
    """As wide as the terminal, within reason."""
    columns = shutil.get_terminal_size(fallback=(_MAX_WIDTH, 0)).columns
    return Style(color=color, width=min(max(columns, _MIN_WIDTH), _MAX_WIDTH))


def _color_of(number: int) -> int:
    return _TURN_COLORS[(number - 1) % len(_TURN_COLORS)]


@dataclass(frozen=True, slots=True)
class _Run:
    """Tokens of one piece that are shown alike."""

    begin: int  # in tokens of the piece
    end: int
    turn: int  # number in the row from 1; 0: context


def format_pieces(
    pieces: Sequence[ShownPiece], row_format: RowFormat, decoder: RunDecoder, style: Style
) -> str:
    """The pieces one below the other, then a line for each turn with its weight in the loss."""
    assert row_format.piece_multiple == 1
    spans = np.array([piece.span for piece in pieces], dtype=np.int32)
    joined = join_sessions([piece.session for piece in pieces], spans)
    turns = row_turns(joined, spans, row_format)
    shown_turns = np.flatnonzero(turns.num_targets)
    number_of_turn = np.zeros(len(turns.num_targets), dtype=np.int64)
    number_of_turn[shown_turns] = np.arange(1, len(shown_turns) + 1)
    blocks: list[str] = []
    snippets: dict[int, str] = {}
    row_begin = 0
    for index, piece in enumerate(pieces):
        blocks.append(style.rule(_piece_heading(piece, index, len(pieces))))
        runs = _runs_of_piece(piece, turns, number_of_turn, index, row_begin)
        blocks.append(_format_runs(piece, runs, decoder, style, snippets))
        row_begin += piece.num_positions
    blocks.append(style.rule("turns"))
    blocks.append(_turn_table(pieces, turns, shown_turns, snippets, style))
    return "\n".join(blocks)


def _piece_heading(piece: ShownPiece, index: int, num_pieces: int) -> str:
    system_stop, start, target_start, stop = piece.span
    length = len(piece.session.tokens)
    text = f"piece {index + 1} of {num_pieces} ── session {piece.session_index}, "
    if (start, stop) == (0, length):
        return text + f"all of its {length:,} tokens"
    text += f"tokens {start:,} to {stop - 1:,} of {length:,}"
    if system_stop:
        text += f" behind its first {system_stop:,}"
    if target_start > start:
        text += f", new from {target_start:,}"
    return text


def _runs_of_piece(
    piece: ShownPiece,
    turns: RowTurns,
    number_of_turn: NDArray[np.int64],
    index: int,
    row_begin: int,
) -> list[_Run]:
    """The runs of the piece in order; its system message, if repeated, is one of its own."""
    marks = {0, piece.span[0], piece.num_positions + 1}
    turn_at: dict[int, int] = {}
    for run in np.flatnonzero(turns.piece[turns.run_turn] == index).tolist():
        begin = int(turns.run_begin[run]) - row_begin + 1  # a position's label is the next token
        marks |= {begin, begin + int(turns.run_length[run])}
        turn_at[begin] = int(number_of_turn[turns.run_turn[run]])
    return [_Run(begin, end, turn_at.get(begin, 0)) for begin, end in pairwise(sorted(marks))]


def _format_runs(
    piece: ShownPiece,
    runs: list[_Run],
    decoder: RunDecoder,
    style: Style,
    snippets: dict[int, str],
) -> str:
    """The text of a piece; `snippets` gets what each turn begins with."""
    system_stop, start, _, stop = piece.span
    tokens = piece.session.tokens
    ids = [*tokens[:system_stop].tolist(), *tokens[start:stop].tolist()]
    boundaries = [runs[0].begin, *(run.end for run in runs)]
    joint = boundaries.index(system_stop)
    texts = decoder.decode_runs(ids, boundaries[: joint + 1])
    texts += decoder.decode_runs(ids, boundaries[joint:])
    lines: list[str] = []
    for run, raw in zip(runs, texts, strict=True):
        if run.begin == system_stop > 0 and start > system_stop:
            gap = f"tokens {system_stop:,} to {start - 1:,} are not in this piece"
            lines.append(f"     ┆ {style.heading(gap)}")
        text = raw.translate(_VISIBLE)
        if run.turn:
            snippets[run.turn] = snippets.get(run.turn, "") + text
        for number, line in enumerate(_wrap(text, style.width - 7)):
            if run.turn:
                label = "     " if number else style.turn_number(run.turn)
                lines.append(f"{label}{style.target(run.turn, '┃ ' + line)}")
            else:
                lines.append(f"     {style.context('│ ' + line)}")
    return "\n".join(lines)


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at spaces where there are some."""
    lines: list[str] = []
    for line in text.replace("\n", "⏎\n").splitlines():
        begin = columns = 0
        last_space = -1
        for index, character in enumerate(line):
            columns += _columns(character)
            if columns > width:
                stop = last_space + 1 if last_space > begin else index
                lines.append(line[begin:stop].rstrip(" "))
                columns = sum(map(_columns, line[stop : index + 1]))
                begin = stop
            if character == " ":
                last_space = index
        lines.append(line[begin:])
    return lines


def _columns(character: str) -> int:
    """Columns of the terminal that a character takes."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _turn_table(
    pieces: Sequence[ShownPiece],
    turns: RowTurns,
    shown_turns: NDArray[np.int64],
    snippets: dict[int, str],
    style: Style,
) -> str:
    if not len(shown_turns):
        return "no turn has a target here"
    weights = turns.num_targets[shown_turns] / turns.loss_token_num[shown_turns]
    shares = weights / weights.sum()
    lines = ["   #  session  turn  role       targets    weight   share"]
    for number, (turn, weight, share) in enumerate(
        zip(shown_turns.tolist(), weights.tolist(), shares.tolist(), strict=True), start=1
    ):
        session_index = pieces[int(turns.piece[turn])].session_index
        bar = "█" * max(1, round(_BAR_WIDTH * share / float(shares.max())))
        lines.append(
            f"{style.turn_number(number)} {session_index:>7}  "
            f"{int(turns.turn_in_session[turn]) + 1:>4}  assistant  "
            f"{int(turns.num_targets[turn]):>7,}  {weight:>8.4g}  {share:>6.1%}  "
            f"{style.target(number, bar.ljust(_BAR_WIDTH))}  {_snippet(snippets[number])}"
        )
    return "\n".join(lines)


def _snippet(text: str) -> str:
    """The beginning of the text on one line, as wide as a column of the table."""
    out, width = "", 0
    for character in " ".join(text.split()):
        width += _columns(character)
        if width > _SNIPPET_WIDTH:
            return out + "…"
        out += character
    return out
