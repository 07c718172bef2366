"""Files that hold documents: text, JSON lines, Parquet and ArrayRecord.

Knows nothing about sources, hashes or tokens. Every kind gives its documents one after another, in
bounded memory, and each with its place, by which it can be read again alone. A byte order mark is
dropped and CRLF becomes LF; everything else, NUL included, is kept. What is wrong with a file is
said in one line with its name and the place in it.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dsjax.data.conversations import as_text
from dsjax.errors import InputError, nearest

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_RECORDS_AT_ONCE = 64


@runtime_checkable
class File(Protocol):
    """What all kinds of files have in common; they hold no open file and can be pickled."""

    @property
    def path(self) -> str:
        """Names the file."""
        ...

    @property
    def random_access(self) -> bool:
        """Whether `read` can be used."""
        ...

    def documents(self) -> Iterator[tuple[int, str]]:
        """Yields (place, text) in rising order of place; a text may be empty."""
        ...

    def read(self, place: int) -> str:
        """The text at a place that `documents` gave."""
        ...

    def name(self, place: int) -> str:
        """Names the document at a place."""
        ...


def open_file(path: str, text_field: str, conversations: bool = False) -> File:
    """The kind of file that its name says; opens nothing yet.

    Raises:
        InputError: if it is to hold conversations, and no line of it could.
    """
    if path.endswith((".jsonl", ".jsonl.gz")):
        return JsonLines(path, text_field, conversations)
    if conversations:
        raise InputError(f"{path!r}: conversations are read from .jsonl and .jsonl.gz files alone")
    if path.endswith(".parquet"):
        return ParquetTable(path, text_field)
    if path.endswith(".arrayrecord"):
        return ArrayRecords(path)
    return TextFile(path)


def normalised(text: str) -> str:
    """Without byte order mark, and with LF line ends."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


@dataclass(frozen=True)
class TextFile:
    """A file of UTF-8 text: one document."""

    path: str
    random_access = True

    def documents(self) -> Iterator[tuple[int, str]]:
        """Yields the one document; place is 0."""
        text = self.read(0)
        if not text:
            raise InputError(f"{self.path!r} is empty")
        yield 0, text

    def read(self, place: int) -> str:
        """The whole file."""
        try:
            data = Path(self.path).read_bytes()
        except OSError as error:
            raise _unreadable(self.path, error) from error
        return normalised(_decoded(data, self.path, 0))

    def name(self, place: int) -> str:
        """The file's path."""
        return Path(self.path).as_posix()


@dataclass(frozen=True)
class JsonLines:
    """Objects of JSON, one a line; blank lines are passed over. A place is a byte offset.

    An object is a text under `text_field`, or as a whole a conversation, whose text is
    `dsjax.data.conversations.as_text`'s.
    """

    path: str
    text_field: str
    conversations: bool = False

    @property
    def random_access(self) -> bool:
        """Not in a packed file, where a place is an offset in what it unpacks to."""
        return not self.path.endswith(".gz")

    def documents(self) -> Iterator[tuple[int, str]]:
        """Yields (offset, text) of each line."""
        offset, number = 0, 0
        try:
            with self._open() as lines:
                for number, line in enumerate(lines, start=1):
                    body = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                    if body.strip():
                        start = offset + len(line) - len(body)
                        yield start, self._text(body, start, f"line {number}")
                    offset += len(line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(
                f"{self.path!r} is damaged or cut short after line {number} "
                f"(byte {offset} unpacked): {error}"
            ) from error
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if offset == 0:
            raise InputError(f"{self.path!r} is empty")

    def read(self, place: int) -> str:
        """The line at an offset."""
        try:
            with open(self.path, "rb") as file:
                file.seek(place)
                line = file.readline()
        except OSError as error:
            raise _unreadable(self.path, error) from error
        return self._text(line, place, f"offset {place}")

    def name(self, place: int) -> str:
        """Path and offset."""
        return f"{Path(self.path).as_posix()}:{place}"

    def where(self, place: int) -> str:
        """The line; reads the file up to it."""
        offset, number = 0, 0
        with self._open() as lines:
            while offset <= place and (line := lines.readline()):
                offset, number = offset + len(line), number + 1
        return f"line {number}"

    def _open(self) -> gzip.GzipFile | io.BufferedReader:
        return gzip.open(self.path) if self.path.endswith(".gz") else open(self.path, "rb")

    def _text(self, line: bytes, offset: int, where: str) -> str:
        text = _decoded(line, self.path, offset, f" ({where})")
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path!r}, {where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{self.path!r}, {where}: not a JSON object")
        if self.conversations:
            try:
                return as_text(row)
            except InputError as error:
                raise InputError(f"{self.path!r}, {where}: {error}") from error
        if self.text_field not in row:
            raise InputError(
                f"{self.path!r}, {where}: no field {self.text_field!r}"
                f"{nearest(self.text_field, row)}"
            )
        return _string(row[self.text_field], self.path, where, self.text_field)


@dataclass(frozen=True)
class ParquetTable:
    """Rows of a table, one row group in memory at a time. A place is a row's number.

    `read` reads a whole row group for one row, so drawing documents at random is slow.
    """

    path: str
    text_field: str
    random_access = True

    def documents(self) -> Iterator[tuple[int, str]]:
        """Yields (row, text)."""
        table = self._open()
        start = 0
        for group in range(table.num_row_groups):
            for row, value in enumerate(self._column(table, group), start):
                yield row, self._text(value, row)
            start += table.metadata.row_group(group).num_rows
        if start == 0:
            raise InputError(f"{self.path!r} is empty")

    def read(self, place: int) -> str:
        """The text of a row."""
        table = self._open()
        row = place
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if row < rows:
                return self._text(self._column(table, group)[row], place)
            row -= rows
        raise InputError(f"{self.path!r} has no row {place}")

    def name(self, place: int) -> str:
        """Path and row."""
        return f"{Path(self.path).as_posix()}:{place}"

    def _open(self) -> Any:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise InputError(
                f"{self.path!r} needs the package pyarrow: pip install dsjax[parquet]"
            ) from error
        try:
            table = pyarrow.parquet.ParquetFile(self.path)
        except (OSError, pyarrow.ArrowException) as error:
            raise self._damaged(error, "") from error
        columns = table.schema_arrow.names
        if self.text_field not in columns:
            raise InputError(
                f"{self.path!r} has no column {self.text_field!r}"
                f"{nearest(self.text_field, columns)}"
            )
        return table

    def _column(self, table: Any, group: int) -> Any:
        try:
            return table.read_row_group(group, columns=[self.text_field]).column(0)
        except Exception as error:  # pyarrow raises whatever the codec did
            raise self._damaged(error, f", row group {group}") from error

    def _text(self, value: Any, row: int) -> str:
        try:
            value = value.as_py()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.path!r}, row {row} is not UTF-8: byte 0x{error.object[error.start]:02x} "
                f"at offset {error.start} of its text"
            ) from error
        return _string(value, self.path, f"row {row}", self.text_field)

    def _damaged(self, error: Exception, where: str) -> InputError:
        reason = (str(error).splitlines() or [repr(error)])[0]
        return InputError(f"{self.path!r}{where} is damaged or no Parquet file: {reason}")


@dataclass(frozen=True)
class ArrayRecords:
    """Records of UTF-8 text. A place is a record's number."""

    path: str
    random_access = True

    def documents(self) -> Iterator[tuple[int, str]]:
        """Yields (record, text)."""
        reader = self._open()
        try:
            count = reader.num_records()
            for start in range(0, count, _RECORDS_AT_ONCE):
                records = self._records(reader, start, min(start + _RECORDS_AT_ONCE, count))
                for number, record in enumerate(records, start):
                    yield number, self._text(record, number)
        finally:
            reader.close()

    def read(self, place: int) -> str:
        """The text of a record."""
        reader = self._open()
        try:
            return self._text(self._records(reader, place, place + 1)[0], place)
        finally:
            reader.close()

    def name(self, place: int) -> str:
        """Path and record."""
        return f"{Path(self.path).as_posix()}:{place}"

    def _open(self) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        try:
            with open(self.path, "rb"):  # for an error that says why
                pass
            reader = ArrayRecordReader(self.path)
        except (OSError, RuntimeError, ValueError) as error:
            raise _unreadable(self.path, error) from error
        if not reader.ok() or reader.num_records() == 0:  # the index stands at the file's end
            raise InputError(
                f"{self.path!r} is empty, cut short or no ArrayRecord file "
                f"({os.path.getsize(self.path)} bytes)"
            )
        return reader

    def _records(self, reader: Any, start: int, stop: int) -> list[bytes]:
        try:
            return reader.read(start, stop)
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(
                f"{self.path!r} is damaged in records {start} to {stop - 1}: {error}"
            ) from error

    def _text(self, record: bytes, number: int) -> str:
        return normalised(_decoded(record, self.path, 0, f" of record {number}"))


def _decoded(data: bytes, path: str, start: int, where: str = "") -> str:
    """UTF-8 to text; `start` is where the data begin in the file."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path!r} is not UTF-8: byte 0x{data[error.start]:02x} at offset "
            f"{start + error.start}{where}"
        ) from error


def _string(value: Any, path: str, where: str, text_field: str) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"{path!r}, {where}: {text_field!r} is {type(value).__name__}, not a string"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write what UTF-8 cannot
        raise InputError(
            f"{path!r}, {where}: {text_field!r} holds half of a surrogate pair at character "
            f"{error.start}"
        ) from error
    return normalised(value)


def _unreadable(path: str, error: Exception) -> InputError:
    reason = error.strerror if isinstance(error, OSError) else None
    return InputError(f"cannot read {path!r}: {reason or error}")
