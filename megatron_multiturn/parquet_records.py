"""Rows of Parquet files -> raw records: one JSON object a row.

A Parquet struct has all its fields in every row, so that a field which is null is one that the row
does not have; it is left out of the object.
"""

import contextlib
import datetime
import decimal
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from megatron_multiturn.errors import ConfigError

_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20


def read_batches(
    path: str, first_group: int = 0, stop_group: int | None = None, first_row: int = 0
) -> Iterator[tuple[Any, int, int, int]]:
    """(rows, number of the first, row group, bytes of the file up to their end).

    The rows are a pyarrow.RecordBatch of one row group. Rows are counted from 0 over the whole
    file and those before first_row left out, row groups from 1; the bytes are about. Raises
    ConfigError without pyarrow, and for a file that is broken or holds no row.
    """
    with _opened(path) as file:
        metadata = file.metadata
        if not metadata.num_rows:
            raise ConfigError(f"{path}: the file holds no row; leave it out of --input")
        num_bytes = os.path.getsize(path)
        row = 0
        for group in range(file.num_row_groups if stop_group is None else stop_group):
            num_rows = metadata.row_group(group).num_rows
            if group < first_group or row + num_rows <= first_row:
                row += num_rows
                continue
            for whole in file.iter_batches(_BATCH_ROWS, row_groups=[group]):
                batch = whole.slice(max(0, first_row - row))
                begin, row = row + whole.num_rows - batch.num_rows, row + whole.num_rows
                if batch.num_rows:
                    yield batch, begin, group + 1, num_bytes * row // metadata.num_rows


def pack_batches(batches: Sequence[Any]) -> bytes:
    """Record batches of one file as bytes, for another process to unpack."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batches[0].schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return bytes(sink.getvalue())


def unpack_rows(data: bytes, path: str, first_row: int) -> Iterator[bytes]:
    """The JSON text of each row of packed batches; first_row: its number, counted from 0.

    Raises ConfigError for a value that Python has no type for.
    """
    import pyarrow

    row = first_row
    for batch in pyarrow.ipc.open_stream(data):
        yield from _rows_of(batch, f"{path}:{row + 1}")
        row += batch.num_rows


def num_row_groups(path: str) -> int:
    """How many row groups the file has; ConfigError if it is broken."""
    with _opened(path) as file:
        return int(file.num_row_groups)


def num_rows_before(path: str, group: int) -> int:
    """The rows of the row groups before one; ConfigError if the file is broken."""
    if not group:
        return 0
    with _opened(path) as file:
        return sum(file.metadata.row_group(number).num_rows for number in range(group))


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    pyarrow, parquet = _import_parquet(path)
    try:
        # A row group can be a whole file; with a buffer it is not held as a whole.
        with parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(
            f"{path}: the Parquet file is broken, or written in a way that pyarrow "
            f"{pyarrow.__version__} cannot read ({what}); fetch or write it again"
        ) from None


def check_can_read(path: str) -> None:
    """Raise ConfigError without pyarrow."""
    _import_parquet(path)


def _import_parquet(path: str) -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ConfigError(
            f"{path}: is a Parquet file, which needs the package pyarrow: `pip install pyarrow`, "
            "or write the file as JSONL"
        ) from None
    return pyarrow, parquet


def _rows_of(batch: Any, where: str) -> list[bytes]:
    """The rows of a batch as JSON text; of one whose text is not UTF-8, that text as it is.

    Text of that kind is refused with its row when it is parsed.
    """
    try:
        return [_to_json(row) for row in batch.to_pylist()]
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [bytes(error.object)]
    except (ValueError, OverflowError, TypeError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(
            f"{where}: in or behind this row is a value that cannot be read ({what}); write the "
            "file without that column"
        ) from None
    return [data for row in range(batch.num_rows) for data in _rows_of(batch.slice(row, 1), where)]


def _to_json(row: dict[str, Any]) -> bytes:
    return json.dumps(_without_nulls(row), ensure_ascii=False, default=_plain).encode(
        "utf-8", "surrogatepass"
    )


def _without_nulls(value: Any) -> Any:
    """Objects without the fields that are null; nulls in lists are kept."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        # A map comes as a list of (key, value) pairs.
        if value and all(isinstance(one, tuple) for one in value):
            return {str(key): _without_nulls(one) for key, one in value if one is not None}
        return [_without_nulls(one) for one in value]
    return value


def _plain(value: Any) -> Any:
    """What JSON has no type for; columns of text may be declared binary."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return {"binary bytes": len(value)}
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal | uuid.UUID):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__} in a Parquet file")
