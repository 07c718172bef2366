"""A model's tensors -> a Hugging Face folder, a piece at a time: BF16, float32 or DeepSeek's FP8.

Tensors come from arrays on a device or from the files of another folder; both are read and written
in pieces of a few megabytes. A folder appears whole or not at all: the work is done beside it, in
`<name>.partial`, where it can be ended at any moment and taken up again. Knows nothing about
`config.json` or tokenizers, which the caller hands over as bytes.
"""

import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from dsjax.config import ModelConfig
from dsjax.durable import write_durably
from dsjax.errors import InputError, RunError
from dsjax.interop import fp8, hf, tensor_files
from dsjax.interop.load import PIECE_BYTES
from dsjax.interop.tensor_files import (
    INDEX_FILE,
    Shard,
    TensorFolder,
    TensorSpec,
    dtype_name,
    plan_shards,
    shard_is_whole,
    write_index,
    write_shard,
)
from dsjax.precision import Quantized

Dtype = Literal["bfloat16", "float32", "fp8"]
DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32", "fp8")
SHARD_BYTES = 5_000_000_000
STATE_FILE = ".dsjax-export.json"
_WIDE = {"bfloat16": "BF16", "float32": "F32"}


@runtime_checkable
class Source(Protocol):
    """Where published tensors come from."""

    def kept_as(self, name: str) -> str:
        """The type that a tensor is kept in, as safetensors names it."""
        ...

    def scale(self, name: str) -> np.ndarray | None:
        """Scales of an FP8 weight, or of one that was FP8; in their stored dtype."""
        ...

    def rows(self, entry: hf.Entry, first: int, last: int) -> jax.Array | np.ndarray:
        """Published rows [first, last) in the kept dtype; whole heads if it asks for them."""
        ...


class FolderSource:
    """Tensors of a Hugging Face folder."""

    def __init__(self, folder: TensorFolder):
        self.folder = folder
        self._last = ""

    def kept_as(self, name: str) -> str:
        """See `Source`."""
        return self.folder.infos[name].dtype

    def scale(self, name: str) -> np.ndarray | None:
        """See `Source`."""
        name += hf.SCALE_SUFFIX
        return np.array(self.folder.read(name)) if name in self.folder.infos else None

    def rows(self, entry: hf.Entry, first: int, last: int) -> np.ndarray:
        """See `Source`."""
        if self._last and self._last != entry.name:
            self.folder.drop(self._last)
        self._last = entry.name
        return self.folder.read(entry.name)[first:last]


class ParamsSource:
    """Tensors of a model's arrays; `scales` are those of `load.Loaded`, or none."""

    def __init__(
        self,
        model: ModelConfig,
        params: Mapping[str, Any],
        bias: Mapping[str, Any],
        scales: Mapping[str, np.ndarray],
    ):
        """Takes a model's arrays.

        Raises:
            InputError: if they are not those of the model.
            RunError: if other processes hold a part of them.
        """
        self._tree = {**params, "router_bias": bias}
        self._scales = scales
        self._entries = {entry.name: entry for entry in hf.entries(model)}
        for path, group in hf.by_leaf(model).items():
            where = ".".join(map(str, path))
            try:
                leaf = hf.get(self._tree, path)
            except (KeyError, TypeError, IndexError) as error:
                raise InputError(f"the model has no {where}") from error
            array = leaf.q if isinstance(leaf, Quantized) else leaf
            if tuple(array.shape) != hf.leaf_shape(group):
                wanted = list(hf.leaf_shape(group))
                raise InputError(f"{where} has shape {list(array.shape)}, expected {wanted}")
        for leaf in jax.tree.leaves(self._tree):
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                raise RunError("a model spread over several processes cannot be exported yet")

    def leaf(self, entry: hf.Entry) -> Any:
        """The array, or `Quantized`, that holds a tensor."""
        return hf.get(self._tree, entry.path)

    def kept_as(self, name: str) -> str:
        """See `Source`."""
        leaf = self.leaf(self._entries[name])
        return "F8_E4M3" if isinstance(leaf, Quantized) else dtype_name(leaf.dtype)

    def scale(self, name: str) -> np.ndarray | None:
        """See `Source`."""
        entry = self._entries[name]
        leaf = self.leaf(entry)
        if not isinstance(leaf, Quantized):
            return self._scales.get(name)
        rows, cols = fp8.blocks(entry.shape)
        first = entry.start // entry.shape[0] * rows
        box = [slice(i, i + 1) for i in entry.index]
        part = _gathered(leaf.scale, [*box, slice(0, cols), slice(first, first + rows)])
        return part.reshape(cols, rows).T

    def rows(self, entry: hf.Entry, first: int, last: int) -> jax.Array:
        """See `Source`."""
        leaf = self.leaf(entry)
        leaf = jnp.asarray(leaf.q if isinstance(leaf, Quantized) else leaf)
        layout, inner = entry.layout, math.prod(entry.layout.rows[1:])
        start, sizes = [*entry.index], [1] * len(entry.index)
        for d, (group, size) in enumerate(zip(layout.groups, layout.leaf, strict=True)):
            begin = entry.start if d == len(layout.groups) - 1 else 0
            if group == (0,):
                begin, size = begin + first // inner, (last - first) // inner
            start.append(begin)
            sizes.append(size)
        part = layout.part(last - first, math.prod(layout.cols))
        if len(leaf.sharding.device_set) > 1:
            box = [slice(a, a + n) for a, n in zip(start, sizes, strict=True)]
            return _to_published(jnp.asarray(_gathered(leaf, box)), part)
        return _cut(leaf, np.array(start, np.int32), tuple(sizes), part)


def _gathered(leaf: jax.Array, box: list[slice]) -> np.ndarray:
    """A part of an array that lies on several devices."""
    out = np.empty([s.stop - s.start for s in box], leaf.dtype)
    for shard in leaf.addressable_shards:
        here = [
            slice(*s.indices(size)[:2]) for s, size in zip(shard.index, leaf.shape, strict=True)
        ]
        both = [
            slice(max(a.start, b.start), min(a.stop, b.stop))
            for a, b in zip(here, box, strict=True)
        ]
        if any(s.start >= s.stop for s in both):
            continue
        mine = tuple(
            slice(s.start - h.start, s.stop - h.start) for s, h in zip(both, here, strict=True)
        )
        there = tuple(
            slice(s.start - b.start, s.stop - b.start) for s, b in zip(both, box, strict=True)
        )
        out[there] = np.asarray(shard.data[mine])
    return out


@functools.partial(jax.jit, static_argnames="layout")
def _to_published(part: jax.Array, layout: hf.Layout) -> jax.Array:
    return layout.to_published(part)


@functools.partial(jax.jit, static_argnames=("sizes", "layout"))
def _cut(leaf: jax.Array, start, sizes: tuple[int, ...], layout: hf.Layout) -> jax.Array:
    part = jax.lax.dynamic_slice(fp8.bits(leaf), tuple(start), sizes)
    return fp8.from_bits(layout.to_published(part), leaf.dtype)


# ---- what is written ----------------------------------------------------------------------------


def specs(
    model: ModelConfig,
    dtype: Dtype,
    *,
    scale_format: fp8.ScaleFormat = "float32",
    stored: Mapping[str, str] | None = None,
    keep_scales: bool = False,
    wide: Literal["bfloat16", "float32"] = "bfloat16",
) -> dict[str, TensorSpec]:
    """Every tensor that an export writes, by name, in the order of the layers.

    Args:
        model: whose.
        dtype: "bfloat16" and "float32" for all but the balancing bias, which is float32; "fp8" as
            V3 is published: matrices of attention and feed-forward layers in FP8 with scales, the
            rest as `wide` says, BF16 as published.
        scale_format: of FP8's scales.
        stored: types that tensors came in, and keep.
        keep_scales: those of FP8's scales, too.
        wide: beside FP8, what is not in it.
    """
    found: dict[str, TensorSpec] = {}
    stored = stored or {}
    chosen = "F8_E8M0" if scale_format == "e8m0" else "F32"
    for entry in hf.entries(model):
        name = entry.name
        came = stored.get(name)
        if dtype == "fp8" and entry.kind == "fp8" and came in (None, "F8_E4M3"):
            found[name] = TensorSpec("F8_E4M3", entry.shape)
            name += hf.SCALE_SUFFIX
            scale = stored.get(name, chosen) if keep_scales else chosen
            found[name] = TensorSpec(scale, fp8.blocks(entry.shape))
        else:
            held = _WIDE[wide if dtype == "fp8" else dtype]
            found[name] = TensorSpec(came or ("F32" if entry.kind == "f32" else held), entry.shape)
    return found


class Export:
    """The pieces of every tensor of a plan, made from a source as they are asked for."""

    def __init__(
        self,
        model: ModelConfig,
        source: Source,
        plan: Mapping[str, TensorSpec],
        *,
        scale_format: fp8.ScaleFormat,
        asked: fp8.ScaleFormat | None,
        requantize: bool,
    ):
        """Takes what to write and how.

        Args:
            model: whose tensors.
            source: where they come from.
            plan: their types and shapes, of `specs`.
            scale_format: of scales that are made.
            asked: the same if it was asked for, so that stored scales must be of that kind, too.
            requantize: whether FP8 may be rounded again for that.
        """
        self.source, self.plan = source, plan
        self._format, self._asked, self._requantize = scale_format, asked, requantize
        self._entries = {entry.name: entry for entry in hf.entries(model)}
        # A file holds its scales before its weights: each is kept until its weight is written.
        self._scales: dict[str, np.ndarray] = {}

    def pieces(self, name: str) -> Iterator[Shaped[np.ndarray, "..."]]:
        """Of a tensor of the plan, in the order of its rows.

        Raises:
            InputError: if stored scales do not fit the format asked for.
        """
        base = name.removesuffix(hf.SCALE_SUFFIX)
        if name not in self._entries:
            yield self._scale(self._entries[base]).astype(
                tensor_files.DTYPES[self.plan[name].dtype]
            )
            return
        entry, target = self._entries[name], self.plan[name].dtype
        scale = self._scale(entry) if "F8_E4M3" in (target, self.source.kept_as(name)) else None
        same = self.source.kept_as(name) == target and not self._anew(entry)
        for first, x in self._chunks(entry):
            if not same:
                x = self._converted(entry, x, first, scale, target)
            yield np.asarray(x)
        self._scales.pop(name, None)

    def _converted(self, entry, x, first, scale, target):
        if scale is not None:
            scale = scale[first // fp8.BLOCK : -(-(first + len(x)) // fp8.BLOCK)]
        x = jnp.asarray(x)
        if x.dtype == jnp.float8_e4m3fn:
            stored = self.source.scale(entry.name)
            assert stored is not None  # every FP8 tensor was checked to have scales
            rows = slice(first // fp8.BLOCK, -(-(first + len(x)) // fp8.BLOCK))
            x = fp8.decoded(x, fp8.check_scale(stored, entry.name)[rows], "float32")
        if target == "F8_E4M3":
            return fp8.encode(x, scale)
        return x.astype({"BF16": jnp.bfloat16, "F32": jnp.float32, "F16": jnp.float16}[target])

    def _chunks(self, entry: hf.Entry) -> Iterator[tuple[int, Any]]:
        """(first row, rows) of a tensor: whole blocks and whole heads, a few megabytes."""
        unit = math.lcm(fp8.BLOCK, math.prod(entry.layout.rows[1:]))
        cols = math.prod(entry.layout.cols)
        step = max(1, PIECE_BYTES // (4 * cols * unit)) * unit
        for first in range(0, entry.shape[0], step):
            yield first, self.source.rows(entry, first, min(first + step, entry.shape[0]))

    def _anew(self, entry: hf.Entry) -> bool:
        """Whether an FP8 tensor's stored scales are of another kind than those asked for."""
        if self.source.kept_as(entry.name) != "F8_E4M3" or self._asked in (None, "float32"):
            return False
        stored = self.source.scale(entry.name)
        return stored is not None and not fp8.is_power_of_two(stored.astype(np.float32))

    def _scale(self, entry: hf.Entry) -> np.ndarray:
        """The scales that a tensor is, or will be, written under; float32."""
        if entry.name in self._scales:
            return self._scales[entry.name]
        stored = self.source.scale(entry.name)
        if stored is not None:
            stored = fp8.check_scale(stored, entry.name)
        if self.source.kept_as(entry.name) == "F8_E4M3" and not self._anew(entry):
            assert stored is not None  # every FP8 tensor was checked to have scales
            scale = stored
        elif self._anew(entry) and not self._requantize:
            raise InputError(
                f"{entry.name} has scales that are no powers of two; they can be made so only by "
                "rounding the weights again (requantize)"
            )
        else:
            target = tensor_files.DTYPES[self.plan[entry.name + hf.SCALE_SUFFIX].dtype]
            scale = fp8.at_least(self._fresh_scale(entry, stored), target)
        self._scales[entry.name] = scale
        return scale

    def _fresh_scale(self, entry: hf.Entry, stored: np.ndarray | None) -> np.ndarray:
        """Of each block: the stored scale if it still gives its numbers exactly, else its own.

        Raises:
            InputError: for a weight that is not finite.
        """
        found, anew = [], self._anew(entry)
        for first, x in self._chunks(entry):
            x, kept = jnp.asarray(x), None
            if stored is not None:
                kept = stored[first // fp8.BLOCK : -(-(first + len(x)) // fp8.BLOCK)]
                if x.dtype == jnp.float8_e4m3fn:
                    x = fp8.decoded(x, kept, "float32")
            largest = np.asarray(fp8.amax(x))
            if not np.isfinite(largest).all():
                raise InputError(f"{entry.name} holds numbers that are not finite; FP8 has none")
            scale = fp8.choose_scale(largest, self._format)
            if kept is not None and not anew:
                fits = np.asarray(fp8.kept_by(x, kept))
                if self._format != "float32":
                    fits = fits & (np.frexp(kept)[0] == 0.5)
                scale = np.where(fits, kept, scale)
            found.append(scale)
        return np.concatenate(found)


# ---- the folder ---------------------------------------------------------------------------------


def check_target(target: str | os.PathLike) -> Path:
    """Where a folder is to be made, without links; refuses what is there and no empty folder.

    Raises:
        InputError: naming it.
    """
    if not str(target).strip() or "\0" in str(target):
        raise InputError(f"target {str(target)!r} is no path")
    path = Path(os.path.realpath(target))
    try:
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"target {target} exists and is not an empty folder")
        parent = next(p for p in path.parents if os.path.lexists(p))
        if not parent.is_dir():
            raise InputError(f"target {target}: {parent} is not a folder")
    except OSError as error:
        raise InputError(f"target {target} cannot be written: {error.strerror}") from error
    return path


def write_folder(
    target: str | os.PathLike,
    plan: Mapping[str, TensorSpec],
    pieces: Callable[[str], Iterable[np.ndarray]],
    files: Mapping[str, bytes],
    *,
    identity: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes a folder of tensors and other files; it gets its name once all of it is on disk.

    Args:
        target: the folder, which must not exist or be empty.
        plan: of all tensors.
        pieces: a tensor's rows.
        files: small files, by name.
        identity: what is written; files that an earlier call of the same identity finished are
            kept. Without one, everything is written anew.
        shard_bytes: the most a file of tensors holds, save for one larger tensor alone.
        on_bytes: told of bytes written, or found written.

    Raises:
        InputError: if the target is in the way, or an unfinished export of something else is.
        RunError: if the disk refuses; what is whole stays for another try.
    """
    path = check_target(target)
    partial = path.with_name(path.name + ".partial")
    shards = plan_shards(plan, shard_bytes)
    state = {"identity": identity, "shards": [shard.name for shard in shards]}
    try:
        _begin(partial, state)
        for shard in shards:
            if shard_is_whole(partial, shard):
                on_bytes(shard.num_bytes)
            else:
                write_shard(partial, shard, pieces, on_bytes)
        for name, content in files.items():
            write_durably(partial / name, content)
        write_index(partial, shards)
        _finish(partial, path, shards, files)
    except OSError as error:
        raise RunError(f"{partial} cannot be written: {error.strerror or error}") from error


def _begin(partial: Path, state: dict[str, Any]) -> None:
    """Makes the folder in which the work is done, or finds what is left of it."""
    path = partial / STATE_FILE
    if os.path.lexists(partial):
        found = {file.name for file in partial.iterdir()} if partial.is_dir() else {""}
        # Ended before it had said whose it is: nothing is there but a file on its way.
        begun = all(name.startswith(f".{STATE_FILE}.") for name in found)
        there = None if begun else _state(path)
        if there is None and not begun:
            raise InputError(f"{partial} exists and is no unfinished export; remove it")
        if there is not None:
            if there == state and state["identity"] is not None:
                return
            if there.get("identity") is not None:
                raise InputError(
                    f"{partial} is an unfinished export of something else; remove it, or finish "
                    "it with the same source and options"
                )
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    write_durably(path, json.dumps(state).encode())


def _state(path: Path) -> dict[str, Any] | None:
    """What an unfinished export says of itself, or None."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _finish(partial: Path, target: Path, shards: list[Shard], files: Mapping[str, bytes]) -> None:
    """Leaves nothing but the export in the folder, and gives it its name."""
    wanted = {shard.name for shard in shards} | set(files)
    wanted |= {INDEX_FILE} if len(shards) > 1 else set()
    for path in partial.iterdir():
        if path.name not in wanted | {STATE_FILE}:
            path.unlink()
    os.replace(partial, target)
    (target / STATE_FILE).unlink()
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
