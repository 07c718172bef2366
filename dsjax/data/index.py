"""One pass over a source: where each document is, how long, and its hash; the text is not kept.

Knows nothing about tokens or rows. What one pass found is kept in the cache folder under the names,
sizes and times of the files, so that unchanged files are not read again only to be split.
"""

import array
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dsjax.config import DataConfig, SourceConfig
from dsjax.data import DataError, recall, sources
from dsjax.data.files import File, JsonLines
from dsjax.data.sources import check_sides, hash_keys, source_files, too_small
from dsjax.durable import write_durably
from dsjax.errors import InputError

_VERSION = 1  # of what a pass finds in a file
_ARRAYS = ("file_number", "place", "size", "order_key", "split_key")


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Documents of one source in the order of their names, known by their places and not held.

    Attributes:
        path: names the source.
        files: which `file_number` counts.
        file_number: [documents] int32, rising.
        place: [documents] int64, in the file, rising within it.
        size: [documents] int64, bytes of UTF-8.
        order_key, split_key: [documents] uint64, see `hash_keys`.
        skipped: documents without text, which are not among these.
        conversations: whether the texts are those of `dsjax.data.conversations`.
    """

    path: str
    files: tuple[File, ...]
    file_number: np.ndarray
    place: np.ndarray
    size: np.ndarray
    order_key: np.ndarray
    split_key: np.ndarray
    skipped: int = 0
    conversations: bool = False

    def __len__(self) -> int:
        return len(self.size)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return int(self.size.sum())

    def select(self, which: np.ndarray) -> "Documents":
        """Those that a mask, a slice or rising numbers name."""
        arrays = {name: getattr(self, name)[which] for name in _ARRAYS}
        return dataclasses.replace(self, **arrays)

    def texts(self) -> Iterator[str]:
        """Yields the texts in order, one in memory at a time; reads only files that hold some.

        Raises:
            DataError: if a text is not the one that was indexed.
        """
        borders = np.searchsorted(self.file_number, np.arange(len(self.files) + 1))
        for number, file in enumerate(self.files):
            document, end = int(borders[number]), int(borders[number + 1])
            if document == end:
                continue
            for place, text in file.documents():
                if place == self.place[document]:
                    yield self._checked(document, text)
                    document += 1
                    if document == end:
                        break
            if document < end:
                raise self._changed(document)

    def read(self, document: int) -> str:
        """One text.

        Raises:
            DataError: if it is gone, or not the one that was indexed.
        """
        file = self.files[self.file_number[document]]
        try:
            text = file.read(int(self.place[document]))
        except (InputError, OSError, ValueError, LookupError, StopIteration) as error:
            raise DataError(f"{self._changed(document)}: {error}") from error
        return self._checked(document, text)

    def located(self, document: int, error: InputError) -> InputError:
        """The same error with the file and line in which the document stands."""
        file, place = self.files[self.file_number[document]], int(self.place[document])
        where = file.where(place) if isinstance(file, JsonLines) else file.name(place)
        return InputError(f"{file.path!r}, {where}: {error}")

    def fingerprint(self) -> str:
        """A hash of the texts and their order; names and places do not count."""
        digest = hashlib.sha256(f"{len(self)}".encode())
        for column in (self.size, self.order_key, self.split_key):
            digest.update(np.ascontiguousarray(column, column.dtype.newbyteorder("<")))
        return digest.hexdigest()

    def _checked(self, document: int, text: str) -> str:
        if hash_keys(text) != (self.order_key[document], self.split_key[document]):
            raise self._changed(document)
        return text

    def _changed(self, document: int) -> DataError:
        file = self.files[self.file_number[document]]
        return DataError(
            f"{file.path!r} was changed while it was in use: document "
            f"{file.name(int(self.place[document]))!r} is not what it was"
        )


def index_documents(source: SourceConfig, cache_dir: str | os.PathLike | None) -> Documents:
    """Finds a source's documents, those without text left out.

    Args:
        source: what to read.
        cache_dir: where the findings are kept, if that folder can be written; None keeps nothing.

    Raises:
        InputError: if the source or one of its files cannot be used, or no document has text.
    """
    files = tuple(source_files(source))
    memo = None if cache_dir is None else Path(cache_dir, "index", f"{_state(source, files)}.npz")
    found = None if memo is None else _load(memo)
    if found is None:
        found = _scan(source, files)
        if memo is not None:
            with contextlib.suppress(OSError):  # it only saves time
                _save(memo, found)
    arrays = {name: found[name] for name in _ARRAYS}
    documents = Documents(
        source.path,
        files,
        skipped=int(found["skipped"]),
        conversations=source.format == "conversations",
        **arrays,
    )
    if documents.skipped:
        line = f"{source.path}: {documents.skipped} documents without text are left out"
        tqdm.write(line, file=sys.stderr)
    if not len(documents):
        raise InputError(f"source {source.path!r} holds no text")
    return documents


def first_bytes(documents: Documents, max_bytes: int) -> Documents:
    """Keeps documents in hash order while they fit in `max_bytes` of UTF-8."""
    order = np.argsort(documents.order_key, kind="stable")
    count = int(np.searchsorted(np.cumsum(documents.size[order]), max_bytes, side="right"))
    if count == 0:
        first = int(order[0])
        name = documents.files[documents.file_number[first]].name(int(documents.place[first]))
        raise too_small(max_bytes, documents.path, name, int(documents.size[first]))
    return documents.select(np.sort(order[:count]))


def split_sources(
    data: DataConfig, cache_dir: str | os.PathLike | None
) -> tuple[list[Documents], list[Documents]]:
    """Indexes all sources and splits them as `split_held_out` does.

    Returns:
        (train, held_out): the documents of each source; a source may have none on one side.

    Raises:
        InputError: as `index_documents`; if a side is empty over all sources, or a source that has
            a weight has nothing to train on.
    """
    train, held_out = [], []
    for source in data.sources:
        documents = index_documents(source, cache_dir)
        if data.max_bytes_per_source is not None:
            documents = first_bytes(documents, data.max_bytes_per_source)
        is_held_out = documents.split_key / 2.0**64 < data.held_out_fraction
        train.append(documents.select(~is_held_out))
        held_out.append(documents.select(is_held_out))
        if source.weight is not None and not len(train[-1]):
            raise InputError(
                f"source {source.path!r} has a weight, but no document to train on: all "
                f"{len(documents)} are held out"
            )
    check_sides(sum(map(len, train)), sum(map(len, held_out)), data.held_out_fraction)
    return train, held_out


def _scan(source: SourceConfig, files: Sequence[File]) -> dict[str, np.ndarray]:
    columns = [array.array(code) for code in "iqqQQ"]
    skipped = 0
    sizes = [os.path.getsize(file.path) if os.path.exists(file.path) else 0 for file in files]
    with tqdm(
        total=sum(sizes),
        desc=f"read {source.path}",
        unit="B",
        unit_scale=True,
        delay=1,
        file=sys.stderr,
        dynamic_ncols=True,
    ) as bar:
        for number, (file, file_size) in enumerate(zip(files, sizes, strict=True)):
            read = 0
            for place, text in file.documents():
                size = len(text.encode())
                if not size:
                    skipped += 1
                    continue
                row = (number, place, size, *hash_keys(text))
                for column, value in zip(columns, row, strict=True):
                    column.append(value)
                # A packed file holds more than its size.
                bar.update(min(size, file_size - read))
                read = min(read + size, file_size)
            bar.update(file_size - read)
    found = dict(zip(_ARRAYS, map(np.array, columns), strict=True))
    return found | {"skipped": np.array(skipped)}


def _state(source: SourceConfig, files: Sequence[File]) -> str:
    """A hash of all that decides what a pass would find, short of reading."""
    paths = [file.path for file in files if os.path.exists(file.path)]
    if source.path.startswith("builtin:"):  # what their files hold is decided by code, too
        paths += [sources.__file__, recall.__file__]
    seen = []
    for path in paths:
        stat = os.stat(path)
        seen.append([os.path.abspath(path), stat.st_size, stat.st_mtime_ns])
    what = json.dumps([_VERSION, source.path, source.text_field, source.format, seen])
    return hashlib.sha256(what.encode()).hexdigest()[:32]


def _load(memo: Path) -> dict[str, np.ndarray] | None:
    try:
        with open(memo, "rb") as file, np.load(file) as saved:
            return {name: saved[name] for name in (*_ARRAYS, "skipped")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # never written, or only in part


def _save(memo: Path, found: dict[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **found)
    write_durably(memo, content.getbuffer())
