"""Safetensors files in a Hugging Face folder: read strictly and in place, written in a stream.

Knows nothing about models, or about what a tensor's name means; never makes a path of one. Nothing
here unpickles: a folder of `.bin` or `.pt` files is refused unopened.

A file is 8 bytes (little-endian length of the header), the header (JSON, padded with spaces), and
the tensors end to end; the header gives each one's type, shape and place. What the reader takes,
the Rust library takes too. The other way, the reader also refuses duplicate keys, unknown fields,
text before the JSON, and shapes that NumPy cannot have. Elements are little-endian, as the
machine's have to be. Source: github.com/huggingface/safetensors.

Which files are a folder's is decided as transformers does: `model.safetensors` if it is there, even
beside an index; otherwise those that `model.safetensors.index.json` names. A file may be a symbolic
link if it leads into the folder, or to where the Hub's own cache keeps files: from
`models--NAME/snapshots/REVISION/` into `models--NAME/blobs/`. Other links are refused: a
folder that came from elsewhere could bring some that lead to any file of this machine.
"""

import contextlib
import errno
import json
import math
import mmap
import os
import reprlib
import stat
import tempfile
import threading
from collections import Counter
from collections.abc import Buffer, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from dsjax.durable import write_durably
from dsjax.errors import InputError, RunError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FAULT_BYTES = 2**16  # Linux's fault_around_bytes

# In the Rust library's order, by which it lays tensors out: the last one first, so that every
# tensor begins at a multiple of its element's size. Its types of 4 and 6 bits have no place here.
DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
        "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
        "I16": np.dtype(np.int16),
        "U16": np.dtype(np.uint16),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "I32": np.dtype(np.int32),
        "U32": np.dtype(np.uint32),
        "F32": np.dtype(np.float32),
        "C64": np.dtype(np.complex64),
        "F64": np.dtype(np.float64),
        "I64": np.dtype(np.int64),
        "U64": np.dtype(np.uint64),
    }
)
_LAYOUT = {dtype: -place for place, dtype in enumerate(DTYPES)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_JSON_BYTES = 100_000_000  # of a header, as in the Rust library, or of an index
_MAX_RANK = 64  # NumPy's
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

# What a file says of itself is shown shortened and escaped: it may be a million line ends.
_SHORT = reprlib.Repr(maxlevel=2, maxstring=100, maxlong=40, maxother=60)


def _show(value: Any) -> str:
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


class TensorSpec(NamedTuple):
    """What a tensor is: its type, by safetensors' name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class TensorInfo(NamedTuple):
    """Where a tensor lies: bytes `start` to `stop - 1` of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def spec(self) -> TensorSpec:
        """Its type and shape."""
        return TensorSpec(self.dtype, self.shape)


class Shard(NamedTuple):
    """A file to write: its name, and its tensors in the order in which they lie in it."""

    name: str
    specs: dict[str, TensorSpec]

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors, without the header."""
        return sum(spec.num_bytes for spec in self.specs.values())


def dtype_name(dtype: Any) -> str:
    """Safetensors' name of a NumPy type.

    Raises:
        InputError: if it has none.
    """
    dtype = np.dtype(dtype)
    if dtype not in _NAMES:
        raise InputError(f"safetensors files cannot hold {dtype}")
    return _NAMES[dtype]


# --------------------------------------------------------------------------------------------------
# Reading


class _Source(NamedTuple):
    """A file whose header was read: its real path, and what tells whether it is still the same."""

    target: str
    stamp: tuple[int, ...]


class TensorFolder:
    """The tensors of a folder, in place: nothing is read but headers until a tensor is asked for.

    Files are mapped when a tensor of theirs is first read, and once. As with every mapping, a file
    that is cut short *while* an array on it is used ends the process with SIGBUS.

    Attributes:
        folder: as it was given.
        infos: every tensor by name; file by file, in the order in which they lie.
    """

    def __init__(
        self, folder: Path, sources: Mapping[Path, _Source], infos: Mapping[str, TensorInfo]
    ):
        """Takes what `open` has found."""
        self.folder = folder
        self.infos: Mapping[str, TensorInfo] = MappingProxyType(dict(infos))
        self._sources = dict(sources)
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "TensorFolder":
        """Reads and checks the headers of all of a folder's files.

        Args:
            folder: with `model.safetensors`, or an index and the files that it names.

        Raises:
            InputError: if there is none, or it cannot be trusted in every particular.
        """
        folder = Path(folder)
        try:
            names = set(os.listdir(folder))
            root = Path(os.path.realpath(folder, strict=True))
        except OSError as error:
            raise _unreadable(folder, error) from error
        except ValueError as error:  # a NUL in the path
            raise InputError(f"cannot read {str(folder)!r}: {error}") from error
        if SINGLE_FILE in names:
            path = folder / SINGLE_FILE
            source, infos = _read_header(path, root)
            return cls(folder, {path: source}, {info.name: info for info in infos})
        if INDEX_FILE in names:
            return cls(folder, *_read_sharded(folder, root))
        raise InputError(_no_tensors(folder, names))

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors, or none but a header."""
        return list(self._sources)

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A tensor as a read-only view of its file, without a copy.

        It stays valid after `close`. It may begin at any byte, which NumPy copes with.

        Raises:
            InputError: if there is no such tensor, its file is gone or another one than at first,
                or a truth value is neither 0 nor 1.
        """
        info = self.infos.get(name)
        if info is None:
            raise InputError(f"there is no tensor {_show(name)} in {str(self.folder)!r}")
        mapping = self._map(info.file)
        dtype = DTYPES[info.dtype]
        if info.start == info.stop:
            empty = np.empty(info.shape, dtype)
            empty.flags.writeable = False
            return empty
        if info.dtype == "BOOL":
            raw = np.ndarray(info.shape, np.uint8, mapping, info.start)
            if raw.max() > 1:
                raise _bad(info.file, name, "has truth values other than 0 and 1")
        return np.ndarray(info.shape, dtype, mapping, info.start)

    def drop(self, name: str) -> None:
        """Gives the memory that a tensor's pages take back; they are read again if need be."""
        info = self.infos[name]
        with self._lock:
            mapping = self._maps.get(info.file)
        if mapping is not None and hasattr(mapping, "madvise"):
            # A fault maps the pages around it, too: those of the neighbours go with them.
            first = max(0, info.start - _FAULT_BYTES) // mmap.PAGESIZE * mmap.PAGESIZE
            last = min(info.stop + _FAULT_BYTES, len(mapping))
            if last > first:
                mapping.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _map(self, path: Path) -> mmap.mmap:
        with self._lock:
            if self._closed:
                raise ValueError(f"the tensors of {str(self.folder)!r} were closed")
            source = self._sources[path]
            mapping = self._maps.get(path)
            try:
                if mapping is None:
                    with _regular_file(path, source.target) as (file, status):
                        if _stamp(status) != source.stamp:
                            raise InputError(f"{str(path)!r} has changed since it was opened")
                        mapping = mmap.mmap(file, status.st_size, access=mmap.ACCESS_READ)
                    self._maps[path] = mapping
                # The mapping has a descriptor of its own, of the file as it is now.
                if mapping.size() < len(mapping):
                    raise InputError(f"{str(path)!r} has been cut short since it was opened")
            except OSError as error:
                raise _unreadable(path, error) from error
            return mapping

    def close(self) -> None:
        """Lets go of the files; each is unmapped when the last array on it is gone."""
        with self._lock:
            self._closed = True
            self._maps.clear()

    def __enter__(self) -> "TensorFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_sharded(folder: Path, root: Path) -> tuple[dict[Path, _Source], dict[str, TensorInfo]]:
    """Files and tensors that an index names; each tensor in exactly the file that it says."""
    index = folder / INDEX_FILE
    weight_map = _read_index(index, root)
    wanted: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        wanted.setdefault(file, set()).add(name)
    sources: dict[Path, _Source] = {}
    infos: dict[str, TensorInfo] = {}
    strays: list[tuple[Path, str]] = []
    for file, names in wanted.items():
        path = folder / file
        sources[path], found = _read_header(path, root)
        strays += [(path, info.name) for info in found if info.name not in names]
        infos |= {info.name: info for info in found if info.name in names}
    for path, name in strays:
        if name in infos:
            raise _bad(path, name, f"is in {str(infos[name].file)!r} too")
        if name not in weight_map:
            raise _bad(path, name, f"is not in {INDEX_FILE}")
    for name, file in weight_map.items():
        if name not in infos:
            raise _bad(folder / file, name, f"is not there, though {INDEX_FILE} says so")
    return sources, infos


def _read_index(path: Path, root: Path) -> dict[str, str]:
    """Tensor -> file, a plain file name."""
    target = _real_path(path, root)
    with _regular_file(path, target) as (file, status):
        if status.st_size > _MAX_JSON_BYTES:
            raise InputError(f"{str(path)!r} has {status.st_size} bytes, more than an index has")
        content = _parse(_read(path, file, status.st_size, 0), path)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{str(path)!r} has no weight_map that names tensors")
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or not _is_text(file)
            or not file.endswith(".safetensors")
            or any(letter in file for letter in "/\\\0")
        ):
            raise _bad(
                path, name, f"is said to lie in {_show(file)}, not a plain name of a .safetensors"
            )
    return weight_map


def _read_header(path: Path, root: Path) -> tuple[_Source, list[TensorInfo]]:
    """What tensors a file holds, in the order in which they lie."""
    target = _real_path(path, root)
    with _regular_file(path, target) as (file, status):
        size = status.st_size
        if size < 8:
            raise InputError(f"{str(path)!r} has {size} bytes: not a safetensors file")
        length = int.from_bytes(_read(path, file, 8, 0), "little")
        if length > _MAX_JSON_BYTES:
            raise InputError(
                f"{str(path)!r} claims a header of {length} bytes: not a safetensors file"
            )
        if 8 + length > size:
            raise InputError(
                f"{str(path)!r} has {size} bytes, but a header of {length}: it is cut short"
            )
        text = _read(path, file, length, 8)
        source = _Source(target, _stamp(status))
    if not text.startswith(b"{") or not text.rstrip(b" ").endswith(b"}"):
        raise InputError(f"the header of {str(path)!r} is not a JSON object")
    header = _parse(text, path)
    if not isinstance(header, dict):
        raise InputError(f"the header of {str(path)!r} is not a JSON object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) and _is_text(key) and _is_text(value)
        for key, value in metadata.items()
    ):
        raise InputError(f"{_METADATA} in the header of {str(path)!r} is not text to text")
    infos = [_info(path, name, entry, 8 + length) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.start, info.stop))
    end = 8 + length
    for info in infos:
        if info.start != end:
            what = "overlaps another" if info.start < end else "has a hole before it"
            raise _bad(path, info.name, f"begins at byte {info.start}, not {end}: {what}")
        end = info.stop
    if end != size:
        what = "it is cut short" if end > size else "more follows"
        last = f" with tensor {_show(infos[-1].name)}" if infos else ""
        raise InputError(f"{str(path)!r} has {size} bytes, but ends{last} at {end}: {what}")
    return source, infos


def _info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """A tensor by its entry of a header; `data_start` is where the data begins in the file."""
    if not _is_text(name):
        raise _bad(path, name, "has a name that is not text")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise _bad(path, name, f"is not described by dtype, shape and data_offsets: {_show(entry)}")
    spec = _checked_spec(path, name, entry["dtype"], entry["shape"])
    offsets = entry["data_offsets"]
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, name, f"has data_offsets {_show(offsets)}")
    start, stop = offsets
    if stop - start != spec.num_bytes:
        raise _bad(
            path,
            name,
            f"has {stop - start} bytes, but {spec.dtype} {_show(spec.shape)} takes "
            f"{spec.num_bytes}",
        )
    return TensorInfo(name, spec.dtype, spec.shape, path, data_start + start, data_start + stop)


def _checked_spec(path: Path, name: str, dtype: Any, shape: Any) -> TensorSpec:
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _bad(path, name, f"has dtype {_show(dtype)}; known: {', '.join(DTYPES)}")
    if not _are_sizes(shape):
        raise _bad(path, name, f"has shape {_show(shape)}")
    # An empty tensor's other dimensions count as well: NumPy asks for that.
    num_bytes = DTYPES[dtype].itemsize
    for size in shape if len(shape) <= _MAX_RANK else ():
        num_bytes *= max(size, 1)
    if len(shape) > _MAX_RANK or num_bytes >= 2**63:
        raise _bad(path, name, f"has shape {_show(shape)}, too large")
    return TensorSpec(dtype, tuple(shape))


def _are_sizes(values: Any) -> bool:
    """Whether it is a list of integers below 2**63; `true` is none."""
    return isinstance(values, list | tuple) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def _is_text(value: str) -> bool:
    """Whether it has a UTF-8 form: JSON's escapes can give half a character."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse(text: bytes, path: Path) -> Any:
    """Strict JSON: UTF-8, no key twice, no NaN."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"{_show(key)} is there twice")
        return members

    def integer(digits: str) -> int | float:
        return -0.0 if digits == "-0" else int(digits)  # as other parsers have it

    def constant(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            parse_int=integer,
            parse_constant=constant,
        )
    except ValueError as error:  # of decoding, of JSON, of the three above
        raise InputError(f"cannot read the JSON of {str(path)!r}: {error}") from error
    except RecursionError as error:
        raise InputError(f"the JSON of {str(path)!r} is nested too deep") from error


def read_small(folder: str | os.PathLike, name: str, most_bytes: int) -> bytes | None:
    """A small file of a folder, by the rules of its tensors' files; None if it is not there.

    Raises:
        InputError: if it is larger, leads out of the folder, is no regular file or unreadable.
    """
    path = Path(folder, name)
    if not os.path.lexists(path):
        return None
    try:
        root = Path(os.path.realpath(folder, strict=True))
    except OSError as error:
        raise _unreadable(Path(folder), error) from error
    with _regular_file(path, _real_path(path, root)) as (file, status):
        if status.st_size > most_bytes:
            raise InputError(f"{str(path)!r} is larger than {most_bytes:,} bytes")
        return _read(path, file, status.st_size, 0)


def _real_path(path: Path, root: Path) -> str:
    """Where a file of the folder really lies.

    Args:
        path: of the file.
        root: the folder, without symbolic links.
    """
    try:
        target = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        raise _unreadable(path, error) from error
    if target.is_relative_to(root):
        return str(target)
    snapshots, model = root.parent, root.parent.parent
    in_cache = snapshots.name == "snapshots" and model.name.startswith("models--")
    if in_cache and target.parent == model / "blobs":
        return str(target)
    raise InputError(
        f"{str(path)!r} leads out of its folder, to {str(target)!r}; put the file itself there"
    )


@contextlib.contextmanager
def _regular_file(path: Path, target: str) -> Iterator[tuple[int, os.stat_result]]:
    """A descriptor of a file that is one; nothing that could wait, like a pipe, is opened.

    Args:
        path: to name it by.
        target: its path without symbolic links.
    """
    try:
        status = os.lstat(target)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{str(path)!r} is not a regular file")
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
        file = os.open(target, flags)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{str(path)!r} is not a regular file")
        yield file, status
    finally:
        os.close(file)


def _read(path: Path, file: int, count: int, offset: int) -> bytes:
    try:
        data = os.pread(file, count, offset)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) != count:
        raise InputError(f"{str(path)!r} has been cut short while it was read")
    return data


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _no_tensors(folder: Path, names: set[str]) -> str:
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    others = [name for name in names if name.endswith(".safetensors")]
    what = f"{str(folder)!r} has neither {SINGLE_FILE} nor {INDEX_FILE}"
    if pickles and not others:
        return (
            f"{what}; {_show(pickles[0])} is a pickle, which could run any program and is never "
            "opened here: convert it where you trust it, with "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
            f"{SINGLE_FILE!r})"
        )
    return f"{what}, though {len(others)} other .safetensors" if others else what


def _bad(path: Path, name: str, what: str) -> InputError:
    return InputError(f"tensor {_show(name)} of {str(path)!r} {what}")


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot read {str(path)!r}: {error.strerror or error}")


# --------------------------------------------------------------------------------------------------
# Writing


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[Shard]:
    """Divides tensors into files, in their order.

    Within a file, tensors of one type stay in order, and types lie as the Rust library lays them.

    Args:
        specs: tensor -> type and shape.
        max_shard_bytes: of a file's tensors; a larger tensor gets a file of its own.

    Returns:
        At least one shard; without any tensors it is empty.

    Raises:
        InputError: if a file cannot have such a tensor, or the limit is none.
    """
    if max_shard_bytes <= 0:
        raise InputError(f"a shard of {max_shard_bytes} bytes cannot hold anything")
    groups: list[dict[str, TensorSpec]] = [{}]
    room = max_shard_bytes
    for name, spec in specs.items():
        if name == _METADATA or not _is_text(name):
            raise InputError(f"a tensor cannot be called {_show(name)}")
        spec = _checked_spec(Path(SINGLE_FILE), name, spec.dtype, spec.shape)
        if spec.num_bytes > room and groups[-1]:
            groups.append({})
            room = max_shard_bytes
        groups[-1][name] = spec
        room -= spec.num_bytes
    count = len(groups)
    return [
        Shard(
            SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors",
            dict(sorted(group.items(), key=lambda item: _LAYOUT[item[1].dtype])),
        )
        for number, group in enumerate(groups, 1)
    ]


def write_shard(
    folder: str | os.PathLike,
    shard: Shard,
    pieces: Callable[[str], Iterable[np.ndarray]],
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Writes a file piece by piece, beside its place, to the disk, and moves it there.

    Nothing but the piece at hand is kept. What an earlier writer of this file left when it was
    killed is removed, so that two at once do not both succeed.

    Args:
        folder: where; it is made.
        shard: what, from `plan_shards`.
        pieces: tensor -> its elements in C order, in arrays of the tensor's type and any shape.
        on_bytes: is told the bytes of each piece that was written.

    Raises:
        InputError: if the file cannot be written; nothing is left behind.
        ValueError: if pieces have another type or number of elements than was planned.
    """
    folder = Path(folder)
    path = folder / shard.name
    header = _header(shard)
    prefix, suffix = f".{shard.name}.", ".partial"
    with _writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        for name in os.listdir(folder):
            if name.startswith(prefix) and name.endswith(suffix):
                (folder / name).unlink(missing_ok=True)
        descriptor, partial = tempfile.mkstemp(suffix, prefix, folder)
    try:
        with _writing(path):
            _write_all(descriptor, header)
        for name, spec in shard.specs.items():
            left = spec.num_bytes
            for piece in pieces(name):
                if piece.dtype != DTYPES[spec.dtype] or piece.nbytes > left:
                    raise ValueError(
                        f"tensor {_show(name)} of {shard.name} is {spec.dtype} {spec.shape} with "
                        f"{left} bytes to come, not {piece.dtype} {piece.shape}"
                    )
                with _writing(path):
                    # Not every type of ml_dtypes can be written as it is.
                    _write_all(descriptor, np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
                left -= piece.nbytes
                if on_bytes is not None:
                    on_bytes(piece.nbytes)
                del piece  # before the next one is made
            if left:
                raise ValueError(f"tensor {_show(name)} of {shard.name} lacks {left} bytes")
        with _writing(path):
            os.fchmod(descriptor, 0o644)  # temporary files are private
            os.fsync(descriptor)
            os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: Buffer) -> None:
    """Writes it all; the kernel takes 2 GiB at a time."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def shard_is_whole(folder: str | os.PathLike, shard: Shard) -> bool:
    """Whether a file is there that has exactly this header, and the size that belongs to it.

    `write_shard` puts no other file there than a whole one; whether its numbers are those of
    today's model is not looked at.

    Raises:
        InputError: if the file cannot be read.
    """
    path = Path(folder, shard.name)
    header = _header(shard)
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        return False
    with _regular_file(path, str(path)) as (file, status):
        if status.st_size != len(header) + shard.num_bytes:
            return False
        return _read(path, file, len(header), 0) == header


def write_index(folder: str | os.PathLike, shards: Iterable[Shard]) -> None:
    """Writes which file has which tensor; nothing if there is one file. Comes after the files.

    Raises:
        InputError: if it cannot be written, or a `model.safetensors` is in the folder, which every
            reader would take instead.
    """
    shards = list(shards)
    if [shard.name for shard in shards] == [SINGLE_FILE]:
        return
    path = Path(folder, INDEX_FILE)
    if os.path.lexists(path.with_name(SINGLE_FILE)):
        raise InputError(
            f"{str(path.with_name(SINGLE_FILE))!r} is there already and would be read instead of "
            f"these {len(shards)} files"
        )
    index = {
        "metadata": {"total_size": sum(shard.num_bytes for shard in shards)},
        "weight_map": {name: shard.name for shard in shards for name in shard.specs},
    }
    with _writing(path):
        text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_durably(path, text.encode())


def _header(shard: Shard) -> bytes:
    """A file's beginning, as the Rust library writes it."""
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    start = 0
    for name, spec in shard.specs.items():
        stop = start + spec.num_bytes
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_JSON_BYTES:
        raise InputError(f"{shard.name} would have a header of {len(text)} bytes; use more shards")
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        if error.errno == errno.ENOENT:
            reason = f"{reason}; does another process write there?"
        raise RunError(f"cannot write {str(path)!r}: {reason}") from error
