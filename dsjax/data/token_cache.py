"""Tokens kept in files: made once for a text and a tokenizer, read at random afterwards.

Knows nothing about rows or batches. A folder of the cache belongs to one list of documents, one
tokenizer and one fill-in-the-middle rate. In it a shard holds consecutive documents,

    [documents] little-endian int64, tokens of each | the tokens, little-endian uint16 or uint32

and the manifest, written last, the size and checksum of each shard. A shard's file is named after
its checksum too, so that a shard that was finished before a kill is known to be whole.
"""

import bisect
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dsjax.config import DataConfig
from dsjax.data import DataError
from dsjax.data.conversations import ConversationEncoder
from dsjax.data.index import Documents
from dsjax.data.packing import encode, token_dtype
from dsjax.durable import write_durably
from dsjax.errors import InputError
from dsjax.interop.tokenizer import Tokenizer

_VERSION = 1  # of the files and of what decides the tokens
_SHARD_BYTES = 16 * 2**20  # of text: what a kill loses at most
_MANIFEST = "manifest.json"
_SHARD = re.compile(r"\d{6,}-[0-9a-f]{32}\.tokens", re.ASCII)  # see `_shard_name`


@dataclass(frozen=True, eq=False)
class TokenFiles:
    """Documents' tokens laid end to end over files; reads what is asked for, and holds none.

    Attributes:
        offsets: [documents + 1] int64; document i is tokens `offsets[i]` to `offsets[i + 1] - 1`.
        pad_id: the token that fills a row's end.
        paths: the shards.
        sizes: their bytes.
        starts: [shards + 1], the number of the first token of each.
        dtype: of a token.
    """

    offsets: np.ndarray
    pad_id: int
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    dtype: np.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop - 1`.

        Raises:
            DataError: if a file is gone or no longer as long as it was.
        """
        if start >= stop:
            return np.zeros(0, self.dtype)
        pieces = []
        while start < stop:
            shard = bisect.bisect_right(self.starts, start) - 1
            end = min(stop, self.starts[shard + 1])
            pieces.append(self._read(shard, start - self.starts[shard], end - start))
            start = end
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _read(self, shard: int, first: int, count: int) -> np.ndarray:
        width = self.dtype.itemsize
        num_tokens = self.starts[shard + 1] - self.starts[shard]
        offset = self.sizes[shard] - (num_tokens - first) * width  # the tokens end the file
        path = self.paths[shard]
        try:
            # Opened for each read: a file that is deleted is noticed, and none is kept open. Not
            # mapped: reading past the end of a map ends the process.
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(file).st_size
                data = os.pread(file, count * width, offset)
            finally:
                os.close(file)
        except OSError as error:
            raise DataError(
                f"cannot read tokens in {path!r} at offset {offset}: {error.strerror}"
            ) from error
        if size != self.sizes[shard] or len(data) != count * width:
            raise DataError(
                f"cannot read tokens in {path!r} at offset {offset}: the file has {size} bytes, "
                f"not {self.sizes[shard]}"
            )
        return np.frombuffer(data, self.dtype)


def cache_folder(data: DataConfig) -> Path:
    """`data.cache_dir`, or dsjax/tokens in the user's cache folder."""
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base, "dsjax", "tokens").expanduser()


def open_tokens(
    documents: Documents,
    tokenizer: Tokenizer,
    fim_rate: float,
    cache_dir: str | os.PathLike,
    converse: ConversationEncoder,
) -> TokenFiles:
    """Opens the tokens of documents, and makes first what is missing or damaged.

    Every shard's checksum is verified; a damaged one is made again, and this is said. Two processes
    that make the same tokens at once write the same bytes to the same names.

    Args:
        documents: in the order that the tokens shall have.
        tokenizer: what encodes them.
        fim_rate: the share of documents that `dsjax.data.fim` transforms; no conversations.
        cache_dir: the folder of all caches.
        converse: what encodes conversations, with the same tokenizer.

    Returns:
        The tokens; of conversations, with the bit of `dsjax.data.conversations`.

    Raises:
        InputError: if the folder cannot be written, or a conversation not be encoded.
        DataError: if a document changes while it is read.
    """
    # The documents' fingerprint says all that the split and the limit of bytes have decided.
    what = [_VERSION, _SHARD_BYTES, documents.fingerprint(), tokenizer.fingerprint, fim_rate]
    if documents.conversations:
        what = [*what[:-1], "conversations", tokenizer.chat_template]
    folder = Path(cache_dir, hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32])
    # A shard begins with the document in which the next 16 MiB begin.
    ends = np.cumsum(documents.size)
    _, first = np.unique((ends - documents.size) // _SHARD_BYTES, return_index=True)
    borders = [*first.tolist(), len(documents)]
    try:
        names = _whole_shards(folder, len(first))
    except OSError as error:
        raise _unusable(folder, error) from error
    if None in names or not (folder / _MANIFEST).exists():
        _make_missing(folder, names, documents, borders, tokenizer, fim_rate, converse)
    dtype = converse.dtype if documents.conversations else token_dtype(tokenizer)
    return _open(folder, names, borders, tokenizer.pad_id, dtype)


def _whole_shards(folder: Path, num_shards: int) -> list[str | None]:
    """The names of shards that are there and whole; says which of a finished cache are not."""
    try:
        promised = json.loads((folder / _MANIFEST).read_text())["shards"]
        promised = {
            int(shard["file"].split("-")[0]): (shard["file"], shard["bytes"]) for shard in promised
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        promised = {}
    names: list[str | None] = [None] * num_shards
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    candidates = [path for path in files if _SHARD.fullmatch(path.name)]
    with _bar(sum(path.stat().st_size for path in candidates), "check tokens") as bar:
        for path in candidates:
            size = path.stat().st_size
            number = int(path.name.split("-")[0])
            with open(path, "rb") as file:
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
            if number < num_shards and path.name == _shard_name(number, checksum):
                names[number] = path.name
            bar.update(size)
    for number, (name, num_bytes) in promised.items():
        if number < num_shards and names[number] is None:
            path = folder / name
            found = f"{path.stat().st_size} bytes" if path.exists() else "no file"
            tqdm.write(
                f"tokens in {str(path)!r} are damaged ({found}; {num_bytes} bytes with "
                "another checksum were written): made again",
                file=sys.stderr,
            )
    return names


def _make_missing(
    folder: Path,
    names: list[str | None],
    documents: Documents,
    borders: Sequence[int],
    tokenizer: Tokenizer,
    fim_rate: float,
    converse: ConversationEncoder,
) -> None:
    """Makes the shards that have no name yet, names them, and writes the manifest."""
    missing = [number for number, name in enumerate(names) if name is None]
    spans = [np.arange(borders[number], borders[number + 1]) for number in missing]
    wanted = documents.select(np.concatenate([np.zeros(0, int), *spans]))
    texts = wanted.texts()

    def encoded(span: np.ndarray) -> Iterator[np.ndarray]:
        if not documents.conversations:
            yield from encode((next(texts) for _ in span), tokenizer, fim_rate)
            return
        for document in span.tolist():
            text = next(texts)
            try:
                yield converse(text)
            except InputError as error:
                raise documents.located(document, error) from error

    with _bar(wanted.num_bytes, f"tokenise {documents.path}") as bar:
        for number, span in zip(missing, spans, strict=True):
            tokens = list(encoded(span))
            lengths = np.array([len(ids) for ids in tokens], "<i8").tobytes()
            content = np.concatenate(tokens).tobytes()
            checksum = hashlib.sha256(lengths + content).hexdigest()
            names[number] = name = _shard_name(number, checksum)
            _write(folder, name, lengths, content)
            bar.update(int(documents.size[span].sum()))
    shards = [
        {"file": name, "bytes": (folder / name).stat().st_size}
        for name in names
        if name is not None
    ]
    manifest = {"version": _VERSION, "source": documents.path, "shards": shards}
    _write(folder, _MANIFEST, json.dumps(manifest, indent=2).encode())


def _open(
    folder: Path,
    names: Sequence[str | None],
    borders: Sequence[int],
    pad_id: int,
    dtype: np.dtype,
) -> TokenFiles:
    paths = [str(folder / name) for name in names if name is not None]
    lengths = [
        np.fromfile(path, "<i8", count=borders[number + 1] - borders[number])
        for number, path in enumerate(paths)
    ]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)])
    return TokenFiles(
        offsets=offsets,
        pad_id=pad_id,
        paths=tuple(paths),
        sizes=tuple(os.path.getsize(path) for path in paths),
        starts=tuple(int(offsets[border]) for border in borders),
        dtype=dtype,
    )


def _write(folder: Path, name: str, *pieces: bytes) -> None:
    try:
        write_durably(folder / name, *pieces)
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> InputError:
    reason = error.strerror or error
    return InputError(f"cannot use data.cache_dir {str(folder.parent)!r}: {reason}")


def _shard_name(number: int, checksum: str) -> str:
    return f"{number:06d}-{checksum[:32]}.tokens"


def _bar(num_bytes: int, what: str) -> tqdm:
    return tqdm(
        total=num_bytes,
        desc=what,
        unit="B",
        unit_scale=True,
        delay=1,
        file=sys.stderr,
        dynamic_ncols=True,
    )
