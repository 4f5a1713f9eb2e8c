"""--dry-run N: the first N sessions as the model will see them, and nothing written."""

from collections.abc import Iterator, Sequence

from megatron_multiturn.batch_checks import count_targets, session_lengths
from megatron_multiturn.decoding import RunDecoder
from megatron_multiturn.encoding import EncodedSession, join_encoded
from megatron_multiturn.encoding_pool import EncodedBlock, Work
from megatron_multiturn.manifest import Counts
from megatron_multiturn.record_blocks import FilePart, FilePlace, RawRecord, RecordBlock
from megatron_multiturn.records import read_blocks
from megatron_multiturn.row_view import ShownPiece, Style, format_pieces
from megatron_multiturn.samples import RowFormat
from megatron_multiturn.tally import LengthHistogram, Tally, format_table

_RECORDS_AT_ONCE = 32


def show_sessions(
    parts: Sequence[FilePart],
    num_sessions: int,
    work: Work,
    decoder: RunDecoder,
    style: Style,
    *,
    skip_bad_sessions: bool,
    omits_bos: bool,
) -> Iterator[str]:
    """The sessions one by one, then the table of what was read for them.

    Raises SessionError for the first bad session unless they are skipped.
    """
    tally = Tally()
    shown: list[EncodedSession] = []
    for result in _encoded(parts, work):
        if result.rejected and not skip_bad_sessions:
            raise result.rejected[0][1]
        tally.add_rejected(result.rejected)
        wanted = min(num_sessions - len(shown), result.batch.num_sessions)
        kept = [result.batch.session(index) for index in range(wanted)]
        weights = result.batch.turn_weights
        batch = join_encoded(kept, totals=result.batch.totals, turn_weights=weights)
        locations = result.locations[:wanted]
        tally.add_batch(batch, session_lengths(batch), locations)
        for session, location in zip(kept, locations, strict=True):
            shown.append(session)
            title = f"session {len(shown)}: {location}"
            yield _show(session, title, weights, decoder, style)
        if len(shown) >= num_sessions:
            break
    batch = join_encoded(shown)
    num_turns, num_target_tokens = count_targets(batch)
    counts = Counts(
        sessions=len(shown),
        segments=len(batch.modes),
        turns=num_turns,
        tokens=len(batch.tokens),
        target_tokens=num_target_tokens,
        rejected=tally.rejected_counts(),
    )
    lengths = LengthHistogram([session_lengths(batch)] if shown else [])
    title = style.rule("dry run: nothing is written")
    yield format_table(title, counts, tally, lengths, omits_bos=omits_bos)


def _encoded(parts: Sequence[FilePart], work: Work) -> Iterator[EncodedBlock]:
    """The sessions of the parts, a few at a time."""
    for part in parts:
        for block in read_blocks(part):
            records = tuple(block.records())
            for start in range(0, len(records), _RECORDS_AT_ONCE):
                few = records[start : start + _RECORDS_AT_ONCE]
                yield work.encode_block(_block_of(part.path, few))


def _block_of(path: str, records: tuple[RawRecord, ...]) -> RecordBlock:
    return RecordBlock(
        path=path, held=records, num_bytes=0, end=FilePlace(offset=0), raw_position=0
    )


def _show(
    session: EncodedSession,
    heading: str,
    turn_weights: tuple[float, ...],
    decoder: RunDecoder,
    style: Style,
) -> str:
    length = len(session.tokens)
    piece = ShownPiece(session_index=0, session=session, span=(0, 0, 0, length))
    row_format = RowFormat(
        sequence_length=max(1, length - 1),
        max_pieces_per_row=1,
        pad_token=0,
        loss_average="turn",
        sessions_end_with_piece=False,
        turn_weights=turn_weights,
    )
    return style.heading(heading) + "\n" + format_pieces([piece], row_format, decoder, style)
