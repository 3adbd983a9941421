"""Read parquet and Arrow files as rows of plain values, 1,000 rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uft_ds.data.rows.arrow_values import column_values
from uft_ds.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1000

_FILE_MAGIC = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

Rows = list[dict[str, Any]]


def parquet_rows(path: Path, name: str) -> Iterator[tuple[float, Rows]]:
    """Batches of rows of a parquet file, each with the share of the file that has been read.

    Raises:
        UserError: the file cannot be read, or two columns have one name.
    """
    import pyarrow.parquet as pq

    with _as_user_error(name, "parquet"), pq.ParquetFile(path, page_checksum_verification=True) as file:
        _check_columns(name, file.schema_arrow.names)
        total, done = file.metadata.num_rows, 0
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            done += batch.num_rows
            yield done / max(total, 1), _plain(batch)


def arrow_rows(path: Path, name: str) -> Iterator[tuple[float, Rows]]:
    """The same for an Arrow file. Both layouts are read: `datasets` writes the stream layout into `.arrow` files."""
    import pyarrow as pa

    with _as_user_error(name, "Arrow"), pa.memory_map(str(path)) as source:
        is_file = source.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        batches = _file_batches(source, name) if is_file else _stream_batches(source, name)
        for done, batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield done, _plain(batch.slice(start, BATCH_ROWS))


def _file_batches(source: pa.NativeFile, name: str) -> Iterator[tuple[float, pa.RecordBatch]]:
    import pyarrow as pa

    source.seek(0)
    reader = pa.ipc.open_file(source)
    _check_columns(name, reader.schema.names)
    for index in range(reader.num_record_batches):
        yield (index + 1) / reader.num_record_batches, reader.get_batch(index)


def _stream_batches(source: pa.NativeFile, name: str) -> Iterator[tuple[float, pa.RecordBatch]]:
    import pyarrow as pa

    # Arrow accepts a stream that stops between two batches, so a copy that was cut off there would lose rows silently.
    size = source.size()
    source.seek(max(0, size - len(_END_OF_STREAM)))
    if source.read() != _END_OF_STREAM:
        raise UserError(f"{name}: not a readable Arrow file (it has no end-of-stream mark); is the copy complete?")
    source.seek(0)
    reader = pa.ipc.open_stream(source)
    _check_columns(name, reader.schema.names)
    for batch in reader:
        yield source.tell() / size, batch


def _plain(batch: pa.RecordBatch) -> Rows:
    # A damaged file may hold offsets beyond its buffers, and text that is not UTF-8.
    batch.validate(full=True)
    return plain_rows(batch)


def plain_rows(table: pa.RecordBatch | pa.Table) -> Rows:
    """The rows of a table as plain values.

    Raises:
        ValueError: a column of JSON holds something else.
    """
    columns = [column_values(column, field) for column, field in zip(table.columns, table.schema, strict=True)]
    return [dict(zip(table.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _check_columns(name: str, columns: list[str]) -> None:
    for column in columns:
        if columns.count(column) > 1:
            raise UserError(f"{name}: column {column!r} is there twice")


@contextmanager
def _as_user_error(name: str, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(f"{name}: not a readable {kind} file ({error})") from None
