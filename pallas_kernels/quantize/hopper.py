"""`quantize` and what is fused with it on Hopper, in Pallas Mosaic GPU.

Bound by memory, so that inputs are read once and nothing but FP8, scales and RMSNorm's result is
written. A warpgroup takes a tile: reads it straight into registers, 16 bytes a thread, and
quantises along its rows; where the transpose is wanted, the tile goes through swizzled shared
memory and comes back transposed (`ldmatrix`). Divisions are `exact`. Compiled for an H100 and
interpreted, not run.

M rows, K columns, X rows of a buffer, F hidden width, D model width; m, k tiles along M and K.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tiled
from pallas_kernels.choose import Uncovered
from pallas_kernels.quantize import exact, reference
from pallas_kernels.tiled import TILE, ScaleFormat, Tiled

FP8 = jnp.float8_e4m3fn
HALF = TILE // 2  # rows that are held as float32 at a time, half a register a number and thread
SWIZZLE = 128  # bytes

# (references of the inputs, rows, columns) -> [HALF, TILE]: the numbers to quantise there.
Values = Callable[[Sequence[Any], pl.Slice, pl.Slice], jax.Array]


class Ways(NamedTuple):
    """What is written: x in tiles along K, its transpose in tiles along M, x itself."""

    as_is: bool = False
    transposed: bool = False
    plain: bool = False


def quantize(x_MK: jax.Array, tile: tuple[int, int], scale: ScaleFormat, orientation: str) -> Tiled:
    """See the package for arguments.

    Raises:
        Uncovered: for other dtypes than float32 and bfloat16, for no numbers, and for tiles of
            1x128 of several matrices.
    """
    if tile == (TILE, TILE):
        blocks = _in_blocks(x_MK, scale)
        return tiled.transpose(blocks) if orientation == "transposed" else blocks
    (result,) = _in_tiles(_load_tile, (x_MK,), x_MK, scale, _ways(orientation))
    return result


def quantize_both(
    x_MK: jax.Array, tile: tuple[int, int], scale: ScaleFormat
) -> tuple[Tiled, Tiled]:
    """See the package for arguments. Raises as `quantize`."""
    if tile == (TILE, TILE):
        blocks = _in_blocks(x_MK, scale)
        return blocks, tiled.transpose(blocks)
    as_is, transposed = _in_tiles(_load_tile, (x_MK,), x_MK, scale, Ways(True, True))
    return as_is, transposed


def swiglu_quantize(
    gate_up_X2F: jax.Array, gates_X: jax.Array | None, scale: ScaleFormat, orientation: str
) -> Tiled:
    """See the package for arguments. Raises as `quantize`.

    The sigmoid is the hardware's, now and then a unit in the last place off the definition's.
    """
    _check(gate_up_X2F)
    dtype = gate_up_X2F.dtype
    hidden_XF = jax.ShapeDtypeStruct((len(gate_up_X2F), gate_up_X2F.shape[1] // 2), dtype)
    if hidden_XF.shape[1] % TILE:
        halves = jnp.split(gate_up_X2F, 2, axis=1)
        gate_up_X2F = jnp.concatenate([_pad(half) for half in halves], axis=1)
    width = gate_up_X2F.shape[1] // 2

    def values(refs, rows, cols):
        gate_up_ref, *gates_ref = refs
        gate = _load(gate_up_ref.at[rows, cols]).astype(jnp.float32)
        up = _load(gate_up_ref.at[rows, pl.ds(cols.start + width, TILE)]).astype(jnp.float32)
        hidden = (gate * jax.lax.logistic(gate) * up).astype(dtype)
        if not gates_ref:
            return hidden
        gates = _load_along(0, gates_ref[0].at[rows], dtype)
        # Exact in float32, so that the product is rounded once, as one of BF16 is.
        return (hidden.astype(jnp.float32) * gates.astype(jnp.float32)).astype(dtype)

    inputs = (gate_up_X2F,) if gates_X is None else (gate_up_X2F, gates_X.astype(dtype))
    (result,) = _in_tiles(values, inputs, hidden_XF, scale, _ways(orientation))
    return result


def rms_norm_quantize(
    x_MD: jax.Array, scale_D: jax.Array, eps: float, scale: ScaleFormat
) -> tuple[jax.Array, Tiled, Tiled]:
    """See the package for arguments. Raises as `quantize`.

    The mean squares are XLA's, in a pass of its own over x: the rows of a tile are longer than what
    a multiprocessor can keep.
    """
    _check(x_MD)
    dtype = x_MD.dtype
    mean_square_M = jnp.mean(jnp.square(x_MD.astype(jnp.float32)), axis=-1)

    def values(refs, rows, cols):
        x_ref, inverse_ref, scale_ref = refs
        x = _load(x_ref.at[rows, cols]).astype(jnp.float32)
        inverse = _load_along(0, inverse_ref.at[rows], dtype)
        return (x * inverse * _load_along(1, scale_ref.at[cols], dtype)).astype(dtype)

    inputs = (x_MD, lax.rsqrt(mean_square_M + eps), scale_D.astype(jnp.float32))
    as_is, transposed, normed_MD = _in_tiles(values, inputs, x_MD, scale, Ways(True, True, True))
    return normed_MD, as_is, transposed


def _ways(orientation: str) -> Ways:
    return Ways(as_is=orientation == "as_is", transposed=orientation == "transposed")


def _check(x: jax.Array | jax.ShapeDtypeStruct, one_matrix: bool = True) -> None:
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise Uncovered(f"{x.dtype}; float32 and bfloat16 are taken")
    if one_matrix and len(x.shape) != 2:
        raise Uncovered(f"shape {x.shape} in tiles of 1x128; one matrix is taken")
    if 0 in x.shape:
        raise Uncovered(f"shape {x.shape} holds nothing")


def _pad(x: jax.Array, dims: int = 2) -> jax.Array:
    """Zeros up to whole tiles in the last dimensions."""
    after = [0] * (x.ndim - dims) + [-size % TILE for size in x.shape[-dims:]]
    return jnp.pad(x, [(0, count) for count in after]) if any(after) else x


# ---- tiles of 1x128 -----------------------------------------------------------------------------


def _in_tiles(
    values: Values,
    inputs: tuple[jax.Array, ...],
    x_MK: jax.Array | jax.ShapeDtypeStruct,
    scale: ScaleFormat,
    ways: Ways,
) -> list[Any]:
    """Quantises numbers that are made, tile by tile, of some inputs.

    Args:
        values: makes them.
        inputs: matrices, and vectors along M or K.
        x_MK: shape and dtype of the numbers.
        scale: as in the package.
        ways: what to write.

    Returns:
        What is wanted, in the order of `Ways`.
    """
    _check(x_MK)
    (rows, cols), dtype = x_MK.shape, x_MK.dtype
    m, k = tiled.tiles(rows), tiled.tiles(cols)
    inputs = tuple(_pad(x, x.ndim) for x in inputs)
    # Scales are written along what is not contracted, as products read them: XLA drops a transpose
    # of a transpose.
    array, padded = jax.ShapeDtypeStruct, (m * TILE, k * TILE)
    out, scratch = {}, {}
    if ways.as_is:
        out |= {"q": array(padded, FP8), "scale": array((k, padded[0]), jnp.float32)}
    if ways.transposed:
        out |= {"qt": array(padded[::-1], FP8), "scale_t": array((m, padded[1]), jnp.float32)}
        scratch = {"x_smem": _swizzled(dtype), "qt_smem": _swizzled(FP8)}
    if ways.plain:
        out |= {"x": array(padded, dtype)}
    height = TILE if ways.transposed else HALF

    def kernel(*refs):
        input_refs, others = refs[: len(inputs)], refs[len(inputs) :]
        at = dict(zip((*out, *scratch), others, strict=True))
        i, j = lax.div(lax.axis_index("tile"), k), lax.rem(lax.axis_index("tile"), k)
        here = pl.ds(j * TILE, TILE)
        halves = [pl.ds(i * height + row, HALF) for row in range(0, height, HALF)]
        # All reads come before the first use.
        parts = [values(input_refs, half, here) for half in halves]
        if ways.plain:
            for half, part in zip(halves, parts, strict=True):
                at["x"][half, here] = part
        if ways.transposed:
            parts = _through(at["x_smem"], parts)
        if ways.as_is:
            for half, part in zip(halves, parts, strict=True):
                at["q"][half, here], at["scale"][j, half] = _quantize_rows(part, scale)
        if ways.transposed:
            for col in range(0, TILE, HALF):
                columns = at["x_smem"].at[:, pl.ds(col, HALF)].T
                part = plgpu.load(columns, layout=plgpu.Layout.WGMMA)
                at["qt_smem"][pl.ds(col, HALF)], scales = _quantize_rows(part, scale)
                at["scale_t"][i, pl.ds(j * TILE + col, HALF)] = scales
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(at["qt_smem"], at["qt"].at[here, pl.ds(i * TILE, TILE)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    results = plgpu.kernel(
        kernel,
        out_type=tuple(out.values()),
        scratch_types=tuple(scratch.values()),
        grid=(padded[0] // height * k,),
        grid_names=("tile",),
    )(*inputs)
    found = dict(zip(out, results, strict=True))
    wanted = []
    if ways.as_is:
        wanted.append(Tiled(found["q"][:rows, :cols], found["scale"][:, :rows].T))
    if ways.transposed:
        wanted.append(Tiled(found["qt"][:cols, :rows], found["scale_t"][:, :cols].T))
    if ways.plain:
        wanted.append(found["x"][:rows, :cols])
    return wanted


def _through(x_smem: Any, parts: Sequence[jax.Array]) -> Iterator[jax.Array]:
    """Writes the halves of a tile to shared memory, and yields them from there one by one.

    Registers would not hold both, and what becomes of one.
    """
    places = [pl.ds(i * HALF, HALF) for i in range(len(parts))]
    for place, part in zip(places, parts, strict=True):
        x_smem[place] = part
    return (_load(x_smem.at[place], optimized=True) for place in places)


def _swizzled(dtype) -> Any:
    """Shared memory for a tile, such that neither rows nor columns of it meet in one bank."""
    tiling = plgpu.TilingTransform((8, SWIZZLE // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM((TILE, TILE), dtype, transforms=(tiling, plgpu.SwizzleTransform(SWIZZLE)))


def _quantize_rows(x: jax.Array, scale: ScaleFormat) -> tuple[jax.Array, jax.Array]:
    """[rows, TILE] -> FP8 of the same shape, scales [rows]."""
    x = x.astype(jnp.float32)
    amax = exact.as_float(reference.magnitude_bits(x, 1))
    scales = reference.choose_scale(amax, scale)
    return _to_fp8(x, _beside(scales), scale), scales


def _beside(scales: jax.Array) -> exact.Divisor:
    """Divisors for [rows, TILE] numbers from the scales of rows."""
    shape = (len(scales), TILE)
    return jax.tree.map(lambda x: lax.broadcast_in_dim(x, shape, (0,)), exact.divisor(scales))


def _to_fp8(x, by, scale):
    # No clip: the largest quotient is 448 and an ulp or two, which is 448 in FP8.
    return (x * by.power if scale == "power_of_two" else exact.divide(x, by)).astype(FP8)


def _layout(dtype: jax.typing.DTypeLike) -> Any:
    """16 bytes a thread, and eight neighbours 128: a line of memory, all banks of shared memory."""
    vector = 16 // jnp.dtype(dtype).itemsize
    tiling = plgpu.Tiling(((16, 8 * vector), (4, 8 * vector), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def _load(ref: Any, optimized: bool = False) -> jax.Array:
    """[HALF, TILE] of global memory, or of shared memory, which must be `optimized`."""
    return plgpu.load(ref, layout=_layout(ref.dtype), optimized=optimized)


def _load_tile(refs, rows, cols):
    return _load(refs[0].at[rows, cols])


def _load_along(dim: int, ref: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[HALF, TILE] of a vector along one of the two, beside numbers of a dtype."""
    layout = _layout(dtype).reduce(1 - dim)
    vector = plgpu.load(ref, layout=layout, optimized=False)
    return lax.broadcast_in_dim(vector, (HALF, TILE), (dim,))


# ---- blocks of 128x128 --------------------------------------------------------------------------


def _in_blocks(x_MK: jax.Array, scale: ScaleFormat) -> Tiled:
    """`quantize` in blocks; a warpgroup a block, which it keeps in registers."""
    _check(x_MK, one_matrix=False)
    *lead, rows, cols = x_MK.shape
    m, k = tiled.tiles(rows), tiled.tiles(cols)
    x_MK = _pad(x_MK).reshape(-1, k * TILE)
    count = len(x_MK) // TILE
    halves = range(0, TILE, HALF)

    def kernel(x_ref, q_ref, amax_ref):
        i, j = lax.div(lax.axis_index("block"), k), lax.rem(lax.axis_index("block"), k)
        places = [(pl.ds(i * TILE + r, HALF), pl.ds(j * TILE, TILE)) for r in halves]
        parts = [_load(x_ref.at[place]) for place in places]
        of_rows = [reference.magnitude_bits(part.astype(jnp.float32), 1) for part in parts]
        amax = jnp.max(jnp.maximum(*of_rows))
        amax_ref[i, j] = amax
        scales = reference.choose_scale(exact.as_float(lax.broadcast(amax, (HALF,))), scale)
        by = _beside(scales)
        for place, part in zip(places, parts, strict=True):
            q_ref[place] = _to_fp8(part.astype(jnp.float32), by, scale)

    q, amax = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(x_MK.shape, FP8),
            jax.ShapeDtypeStruct((count, k), jnp.int32),
        ),
        grid=(count * k,),
        grid_names=("block",),
    )(x_MK)
    q = q.reshape(*lead, m * TILE, k * TILE)[..., :rows, :cols]
    return Tiled(q, reference.choose_scale(exact.as_float(amax), scale).reshape(*lead, m, k))
