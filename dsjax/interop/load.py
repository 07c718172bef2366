"""Published tensors, from memory-mapped files into sharded arrays, a piece at a time.

Each process reads what its devices hold: of every tensor the rows and columns that a shard needs,
a few megabytes at a time, which a donated update writes into the shard. Besides the arrays
themselves, a few pieces are all that lies in memory. Knows nothing about `config.json`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dsjax.config import Config, ModelConfig
from dsjax.errors import InputError
from dsjax.interop import fp8, hf
from dsjax.interop.tensor_files import TensorFolder, TensorInfo
from dsjax.model.transformer import RouterBias, build
from dsjax.precision import Quantized
from sharding.init import specs
from sharding.rules import AxisRules, LayoutError

PIECE_BYTES = 16 * 2**20  # of one update, in float32
_FLOATS = ("BF16", "F16", "F32")
_SCALES = ("F32", "BF16", "F8_E8M0")
# Buffers that older checkpoints of Llama carry; every reader makes them anew.
_BUFFER = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint's arrays.

    Attributes:
        params: nested dicts; FP8 weights are `Quantized` where they were kept so.
        bias: {stack: [L, E]}.
        scales: the stored scales of FP8 weights that were made float32, by the weight's name, in
            their stored dtype: with them the way back gives the same bits.
    """

    params: dict[str, Any]
    bias: dict[str, Any]
    scales: dict[str, np.ndarray]


def present(model: ModelConfig, infos: Mapping[str, TensorInfo]) -> ModelConfig:
    """The model without MTP, if its `config.json` announces it and no tensor of it is there.

    transformers leaves MTP's tensors out of what it saves, and the announcement in.
    """
    if model.mtp is None:
        return model
    prefix = hf.LAYER.format(model.num_layers)
    if any(name.startswith(prefix) for name in infos):
        return model
    return dataclasses.replace(model, mtp=None)


def check_tensors(model: ModelConfig, folder: TensorFolder) -> None:
    """Checks that a folder holds exactly a model's tensors, reading no weight.

    Raises:
        InputError: for a tensor that is missing, of another shape or type, or not the model's, for
            FP8 without scales, and for scales of another shape or not positive and finite.
    """
    infos, known = folder.infos, set()
    for entry in hf.entries(model):
        known.add(entry.name)
        if (info := infos.get(entry.name)) is None:
            raise InputError(f"{folder.folder}: missing tensor {entry.name}")
        where = f"{info.file}: tensor {entry.name}"
        if info.shape != entry.shape:
            raise InputError(f"{where} has shape {list(info.shape)}, expected {list(entry.shape)}")
        if info.dtype == "F8_E4M3" and entry.kind == "fp8":
            known.add(entry.name + hf.SCALE_SUFFIX)
            _check_scale(folder, entry)
        elif info.dtype not in _FLOATS:
            raise InputError(f"{where} is of type {info.dtype}, expected {', '.join(_FLOATS)}")
    for name in infos:
        if name in known or _BUFFER.fullmatch(name):
            continue
        if name == "lm_head.weight" and model.tie_embeddings:
            embedding = "model.embed_tokens.weight"
            if not same_bytes(folder, name, embedding):
                raise InputError(
                    f"{infos[name].file}: {name} is not {embedding}, to which it is tied"
                )
            continue
        raise InputError(f"{infos[name].file}: tensor {name!r:.200} is not part of the model")


def _check_scale(folder: TensorFolder, entry: hf.Entry) -> None:
    name = entry.name + hf.SCALE_SUFFIX
    if (info := folder.infos.get(name)) is None:
        raise InputError(
            f"{folder.infos[entry.name].file}: tensor {entry.name} is FP8 without {name}"
        )
    where, wanted = f"{info.file}: tensor {name}", fp8.blocks(entry.shape)
    if info.shape != wanted:
        raise InputError(f"{where} has shape {list(info.shape)}, expected {list(wanted)}")
    if info.dtype not in _SCALES:
        raise InputError(f"{where} is of type {info.dtype}, expected {', '.join(_SCALES)}")
    fp8.check_scale(folder.read(name), where)


def same_bytes(folder: TensorFolder, a: str, b: str) -> bool:
    """Whether two tensors are of the same type and hold the same bits."""
    if folder.infos[a].spec != folder.infos[b].spec:
        return False
    x, y = folder.read(a), folder.read(b)
    rows = max(1, PIECE_BYTES // max(1, x[:1].nbytes))
    for start in range(0, len(x), rows):
        here = slice(start, start + rows)
        if x[here].tobytes() != y[here].tobytes():
            return False
    return True


def load(
    folder: TensorFolder,
    config: Config,
    *,
    resident: bool = False,
    as_stored: bool = False,
    rules: AxisRules,
    mesh: Mesh | None = None,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Loaded:
    """Reads a model's arrays, each born sharded.

    Args:
        folder: of files that `check_tensors` has passed.
        config: its model, and the dtype to keep parameters in.
        resident: FP8 weights stay FP8; otherwise they become `param_dtype`.
        as_stored: arrays that BF16 would round are float32, whatever `param_dtype` says.
        rules: where each logical axis goes.
        mesh: of the devices; None keeps everything on the first one.
        on_bytes: told of bytes read, as they are.

    Raises:
        InputError: if MTP's own copies of embedding or head differ from the main model's, or a
            weight that shares a leaf with FP8 ones is of another type.
    """
    for entry in hf.entries(config.model):
        if entry.copy and jax.process_index() == 0:
            main = next(e.name for e in hf.by_leaf(config.model)[entry.path])
            if not same_bytes(folder, entry.name, main):
                raise InputError(
                    f"{folder.infos[entry.name].file}: {entry.name} is not {main}; MTP with an "
                    "embedding or head of its own is not supported (model.mtp=null leaves it out)"
                )
            on_bytes(_num_bytes(folder, entry.name))
    blueprint = jax.eval_shape(build(config, rules), jax.random.key(0))
    variables = dict(nnx.to_flat_state(nnx.state(blueprint, (nnx.Param, RouterBias))))
    laid = specs_by_path(variables, rules, mesh)
    tree, scales = {}, {}
    for path, group in hf.by_leaf(config.model).items():
        shape, dtype = hf.leaf_shape(group), variables[path].dtype
        assert shape == variables[path].shape, (path, shape, variables[path].shape)
        sharding = _sharding(mesh, laid[path])
        types = {folder.infos[entry.name].dtype for entry in group}
        if as_stored and types & {"F32", "F16"}:
            dtype = jnp.dtype(jnp.float32)
        kept = resident and "F8_E4M3" in types
        if kept and len(types) > 1:
            raise InputError(
                f"{group[0].name} and its neighbours in one array are of types "
                f"{', '.join(sorted(types))}; load them as one dtype, bfloat16 or float32"
            )
        leaf = _filled(
            folder, group, shape, jnp.float8_e4m3fn if kept else dtype, sharding, kept, on_bytes
        )
        if kept:
            leaf = _with_scales(folder, group, leaf, mesh, laid[path])
        elif "F8_E4M3" in types and dtype == jnp.float32:
            for entry in group:
                name = entry.name + hf.SCALE_SUFFIX
                if name in folder.infos:
                    scales[entry.name] = np.array(folder.read(name))
        hf.put(tree, path, leaf)
    return Loaded(tree, tree.pop("router_bias", {}), scales)


def _num_bytes(folder: TensorFolder, name: str) -> int:
    return folder.infos[name].stop - folder.infos[name].start


def _sharding(mesh: Mesh | None, spec: PartitionSpec | None) -> jax.sharding.Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, spec or PartitionSpec())


def specs_by_path(variables, rules: AxisRules, mesh: Mesh | None) -> dict:
    """How each variable lies on the mesh; None without one.

    Raises:
        InputError: for a dimension that does not divide, naming the variable.
    """
    if mesh is None:
        return dict.fromkeys(variables)
    found = {}
    for path, variable in variables.items():
        try:
            found[path] = specs(variable, rules, dict(mesh.shape))
        except LayoutError as error:
            raise InputError(f"{'.'.join(map(str, path))}: {error}") from error
    return found


def _with_scales(folder, group, q, mesh, spec) -> Quantized:
    """Puts the scales of a leaf's tensors together; they are small, so each device has them all."""
    first = group[0]
    if any(128 % size for size in _permuted(first.layout)):
        raise InputError(f"{first.name}: FP8 blocks cross heads; load it as float32 or bfloat16")
    in_dims, parts = first.in_dims, first.parts
    lead = tuple(max(numbers) + 1 for numbers in zip(*(e.index for e in group), strict=True))
    rows, cols = fp8.blocks(first.shape)
    scale = np.empty((*lead, cols, rows * parts), np.float32)
    for entry in group:
        name = entry.name + hf.SCALE_SUFFIX
        part = fp8.check_scale(folder.read(name), name).T
        first_row = entry.start // (first.shape[0]) * rows
        scale[(*entry.index, slice(None), slice(first_row, first_row + rows))] = part
    spread = PartitionSpec(*(spec or ())[: len(lead)])
    return Quantized(q, jax.device_put(scale, _sharding(mesh, spread)), in_dims, parts)


def _permuted(layout: hf.Layout) -> list[int]:
    """Sizes of the groups of rows whose order the layout changes."""
    return [
        math.prod(layout.rows[i] for i in group)
        for group in layout.groups
        if len(group) > 1 and group[0] < len(layout.rows)
    ]


# ---- one leaf -----------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """A rectangle of a published tensor, and where it goes in a shard."""

    rows: slice
    cols: slice
    layout: hf.Layout
    start: tuple[int, ...]


def _filled(folder, group, shape, dtype, sharding, kept, on_bytes) -> jax.Array:
    """One leaf, from all its tensors."""
    boxes = {
        device: [slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True)]
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    shards = {
        device: jnp.zeros([s.stop - s.start for s in box], dtype, device=device)
        for device, box in boxes.items()
    }
    for entry in group:
        tensor = folder.read(entry.name)
        scale = None
        if tensor.dtype == jnp.float8_e4m3fn and not kept:
            name = entry.name + hf.SCALE_SUFFIX
            scale = fp8.check_scale(folder.read(name), name)
            fp8.check_range(scale, tensor, f"{folder.infos[name].file}: tensor {name}")
        for device, box in boxes.items():
            for piece in _pieces(entry, box):
                part = tensor[piece.rows] if tensor.ndim == 1 else tensor[piece.rows, piece.cols]
                here, corner = None, (0, 0)
                if scale is not None:
                    here = _scale_of(scale, piece)
                    corner = (piece.rows.start % fp8.BLOCK, piece.cols.start % fp8.BLOCK)
                shards[device] = _fill(
                    shards[device],
                    jax.device_put(part, device),
                    None if here is None else jax.device_put(here, device),
                    np.array(piece.start, np.int32),
                    layout=piece.layout,
                    corner=corner,
                )
                on_bytes(part.nbytes)
        jax.block_until_ready(list(shards.values()))
        folder.drop(entry.name)
    return jax.make_array_from_single_device_arrays(shape, sharding, list(shards.values()))


def _scale_of(scale: np.ndarray, piece: _Piece) -> np.ndarray:
    """The scales of the blocks that a piece touches."""
    block = fp8.BLOCK
    rows = slice(piece.rows.start // block, -(-piece.rows.stop // block))
    cols = slice(piece.cols.start // block, -(-piece.cols.stop // block))
    return scale[rows, cols]


def _pieces(entry: hf.Entry, box: list[slice]) -> Iterator[_Piece]:
    """Cuts what a shard needs of a tensor into rectangles of a few megabytes.

    Args:
        entry: the tensor.
        box: the shard's range in every dimension of the leaf.
    """
    lead, layout = len(entry.index), entry.layout
    for number, side in zip(entry.index, box[:lead], strict=True):
        if not side.start <= number < side.stop:
            return
    begins = [number - side.start for number, side in zip(entry.index, box[:lead], strict=True)]
    ranges = []  # of the leaf's part, in each of its own dimensions
    for d, (side, size) in enumerate(zip(box[lead:], layout.leaf, strict=True)):
        offset = entry.start if d == len(layout.leaf) - 1 else 0
        low, high = max(side.start - offset, 0), min(side.stop - offset, size)
        if low >= high:
            return
        ranges.append(slice(low, high))
        begins.append(low + offset - side.start)
    outer = {0: "rows", len(layout.rows): "cols"}
    spans = {"rows": slice(0, math.prod(layout.rows)), "cols": slice(0, math.prod(layout.cols))}
    row_dim, inner = None, 1
    for d, (side, group) in enumerate(zip(ranges, layout.groups, strict=True)):
        if (name := outer.get(group[0])) is not None and len(group) == 1:
            sizes = layout.rows if name == "rows" else layout.cols
            width = math.prod(sizes[1:])
            spans[name] = slice(side.start * width, side.stop * width)
            if name == "rows":
                row_dim, inner = d, width
        elif side != slice(0, layout.leaf[d]):
            raise ValueError(f"{entry.name}: dimension {d} of its leaf cannot be sharded")
    cols = spans["cols"]
    num_cols = max(1, cols.stop - cols.start)
    unit = math.lcm(inner, fp8.BLOCK)  # whole blocks and whole heads
    step = max(1, PIECE_BYTES // (4 * num_cols * unit)) * unit
    if row_dim is None:  # a group of several: taken whole
        step = spans["rows"].stop
    for first in range(spans["rows"].start, spans["rows"].stop, step):
        rows = slice(first, min(first + step, spans["rows"].stop))
        start = list(begins)
        if row_dim is not None:
            start[lead + row_dim] += (first - spans["rows"].start) // inner
        part = layout.part(rows.stop - rows.start, cols.stop - cols.start)
        yield _Piece(rows, cols, part, tuple(start))


@functools.partial(jax.jit, static_argnames=("layout", "corner"), donate_argnums=0)
def _fill(shard, part, scale, start, *, layout: hf.Layout, corner: tuple[int, int]):
    """Writes a piece into a shard, in place."""
    if scale is not None:
        part = fp8.decode(part, scale, *corner)
    part = layout.to_leaf(fp8.bits(part.astype(shard.dtype)))
    part = part.reshape((1,) * (shard.ndim - part.ndim) + part.shape)
    filled = jax.lax.dynamic_update_slice(fp8.bits(shard), part, tuple(start))
    return fp8.from_bits(filled, shard.dtype)
