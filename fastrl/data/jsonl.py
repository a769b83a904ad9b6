"""Readers of JSON: .jsonl and .jsonl.gz line by line, .json as one list."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from fastrl.base.types import DataError
from fastrl.data.base import MAX_ROW_BYTES


def read_jsonl(path: Path) -> Iterator[tuple[int, object]]:
    """(line number from 1, its value or a DataError that says why it has none); blank lines are skipped.

    Holds one line at a time, and of a line that is too long only its beginning. Raises DataError if the file itself
    cannot be read to its end.
    """
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    line = 0
    try:
        with opened(path, "rb") as stream:
            while text := stream.readline(MAX_ROW_BYTES + 1):
                line += 1
                if len(text) > MAX_ROW_BYTES:
                    while text and not text.endswith(b"\n"):
                        text = stream.readline(MAX_ROW_BYTES)
                    yield line, DataError(f"the line is longer than {MAX_ROW_BYTES} bytes")
                elif text.strip():
                    yield line, parse(text.removeprefix(b"\xef\xbb\xbf") if line == 1 else text)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: reading stopped after line {line}: {error}; is the file complete?") from error


def read_json(path: Path) -> Iterator[tuple[int, object]]:
    """(row number from 1, row) of a file that is one JSON list. Raises DataError on any other content."""
    try:
        value = parse(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, list):
        got = value if isinstance(value, DataError) else f"got a value of type {type(value).__name__}"
        raise DataError(
            f"{path}: expected one JSON list of objects, {got}. If it holds one object per line, name it .jsonl"
        )
    yield from enumerate(value, start=1)


def parse(text: bytes) -> object:
    """The value, or a DataError (returned, because one bad line is not the end of the file)."""
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return DataError(f"invalid JSON at character {error.pos}: {error.msg}")
    except (ValueError, RecursionError) as error:
        # a number of more digits, or more nested brackets, than Python takes
        return DataError(f"invalid JSON: {error}")
