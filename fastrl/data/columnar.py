"""Readers of Arrow tables: .parquet and the .arrow files of a saved Hugging Face data set. Import pyarrow if called."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastrl.base.types import DataError

if TYPE_CHECKING:
    from pyarrow import RecordBatch


def read_parquet(path: Path) -> Iterator[tuple[int, object]]:
    """(row number from 1, row). Raises DataError if the file is damaged."""
    return read(path, parquet_batches)


def read_arrow(path: Path) -> Iterator[tuple[int, object]]:
    """(row number from 1, row) of an IPC stream or file. Raises as read_parquet."""
    return read(path, arrow_batches)


def read(path: Path, batches) -> Iterator[tuple[int, object]]:
    import pyarrow

    line = 0
    try:
        for batch in batches(path):
            for row in rows(batch):
                line += 1
                yield line, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: reading stopped after row {line}: {error}; is the file complete?") from error


def parquet_batches(path: Path) -> "Iterator[RecordBatch]":
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=1024)


def arrow_batches(path: Path) -> "Iterator[RecordBatch]":
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        # save_to_disk writes streams; feather and others write files, which begin with this magic
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)


def rows(batch: "RecordBatch") -> list:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [DataError(f"not UTF-8: {error.reason}")]
        return [row for i in range(batch.num_rows) for row in rows(batch.slice(i, 1))]
