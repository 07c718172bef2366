"""`quantize`, alone and fused, on TPUs. Compiled for v5p, v6e and tpu7x, interpreted, not run.

A step reads a block once, 128x128 numbers at a time, and writes either orientation or both. Scales
leave as rows, [k, M] and [m, K]: as columns each would take 128 lanes of memory. Matrix products on
TPUs read them so, and where quantize and product are one program XLA may drop both transposes.

Scales and FP8 numbers are the definition's bit by bit, on the chip too: no division is left to it.
Before, `exp` and `rsqrt` may differ by an ulp there, and the mean of a norm is summed in another
order.

M rows, K columns (D those of a norm, F hidden width), X rows of a buffer, m and k tiles of 128.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import tpu_blocks
from pallas_kernels.choose import Uncovered
from pallas_kernels.quantize import exact
from pallas_kernels.quantize.reference import choose_scale
from pallas_kernels.tiled import LARGEST, TILE, ScaleFormat, Tiled, tiles

MOST = 1024  # rows and columns of a block
LONGEST = TILE * TILE  # columns of a norm, whose rows are in VMEM whole


def quantize(x_MK: jax.Array, tile: tuple[int, int], scale: ScaleFormat, orientation: str) -> Tiled:
    """See the package for arguments. Sizes that are no multiples of 128 cost a copy.

    Raises:
        Uncovered: for an empty dimension.
    """
    (tiled,) = _quantize(x_MK, tile, scale, (orientation,))
    return tiled


def quantize_both(
    x_MK: jax.Array, tile: tuple[int, int], scale: ScaleFormat
) -> tuple[Tiled, Tiled]:
    """See the package for arguments, `quantize` for errors."""
    as_is, transposed = _quantize(x_MK, tile, scale, ("as_is", "transposed"))
    return as_is, transposed


def _quantize(x_MK, tile, scale, orientations):
    shape = x_MK.shape
    x_MK = _fill_tiles(x_MK)
    blocks = _blocks(x_MK.shape)
    written = _call(
        functools.partial(_quantize_kernel, tile=tile, scale=scale, orientations=orientations),
        [x_MK],
        [(blocks, lambda m, k: (m, k))],
        x_MK.shape,
        blocks,
        orientations,
    )
    return _tiled(written, shape, tile, orientations)


def _quantize_kernel(x_ref, *written, **how):
    def strip(rows):
        return lambda cols: x_ref[rows, cols].astype(jnp.float32)

    _write(strip, written, **how)


def swiglu_quantize(
    gate_up_X2F: jax.Array, gates_X: jax.Array | None, scale: ScaleFormat, orientation: str
) -> Tiled:
    """See the package for arguments. Sizes that are no multiples of 128 cost a copy.

    Raises:
        Uncovered: for an empty dimension.
    """
    rows, width = gate_up_X2F.shape[0], gate_up_X2F.shape[1] // 2
    if gates_X is None:
        gates_X = jnp.ones(rows, gate_up_X2F.dtype)
    gates_1X = _fill_tiles(gates_X.astype(gate_up_X2F.dtype)[None], rows=False)
    padded = tiles(rows) * TILE, tiles(width) * TILE
    blocks = _blocks(padded)
    if padded == (rows, width) and width % blocks[1] == 0:
        gate, up, skipped = gate_up_X2F, gate_up_X2F, width // blocks[1]
    else:
        gate, up = (_fill_tiles(half) for half in jnp.split(gate_up_X2F, 2, axis=1))
        skipped = 0
    how = {"tile": (1, TILE), "scale": scale, "orientations": (orientation,)}
    written = _call(
        functools.partial(_swiglu_kernel, **how),
        [gate, up, gates_1X],
        [
            (blocks, lambda x, f: (x, f)),
            (blocks, lambda x, f: (x, f + skipped)),
            ((1, blocks[0]), lambda x, f: (0, x)),
        ],
        padded,
        blocks,
        (orientation,),
    )
    (tiled,) = _tiled(written, (rows, width), (1, TILE), (orientation,))
    return tiled


def _swiglu_kernel(gate_ref, up_ref, gates_ref, *written, **how):
    def strip(rows):
        gates = jnp.broadcast_to(gates_ref[:, rows].astype(jnp.float32), (TILE, TILE)).T

        def numbers(cols):
            gate, up = (ref[rows, cols].astype(jnp.float32) for ref in (gate_ref, up_ref))
            hidden = (jax.nn.silu(gate) * up).astype(gate_ref.dtype)
            # A product in float32, rounded, is the product in a narrower dtype.
            return (hidden.astype(jnp.float32) * gates).astype(hidden.dtype).astype(jnp.float32)

        return numbers

    _write(strip, written, **how)


def rms_norm_quantize(
    x_MD: jax.Array, scale_D: jax.Array, eps: float, scale: ScaleFormat
) -> tuple[jax.Array, Tiled, Tiled]:
    """See the package for arguments. Sizes that are no multiples of 128 cost a copy.

    Raises:
        Uncovered: for an empty dimension, more than 16,384 columns, or an eps of 0 where rows of
            zeros are added.
    """
    rows, width = x_MD.shape
    if width > LONGEST:
        raise Uncovered(f"rows of {width}; up to {LONGEST} are taken")
    if eps <= 0 and rows % TILE:
        raise Uncovered(f"eps {eps} with {rows} rows; multiples of {TILE} are taken")
    x_MD = _fill_tiles(x_MD)
    scale_1D = _fill_tiles(scale_D[None], rows=False)
    padded = x_MD.shape
    most_rows = max(TILE, MOST * MOST // padded[1] // TILE * TILE)
    blocks = tpu_blocks.cut(padded[0], most_rows), padded[1]
    orientations = ("as_is", "transposed")
    how = {"tile": (1, TILE), "scale": scale, "orientations": orientations}
    normed_MD, *written = _call(
        functools.partial(_norm_kernel, eps=eps, width=width, **how),
        [x_MD, scale_1D],
        [
            (blocks, lambda m, d: (m, d)),
            ((1, blocks[1]), lambda m, d: (0, d)),
        ],
        padded,
        blocks,
        orientations,
        normed=x_MD.dtype,
    )
    as_is, transposed = _tiled(written, (rows, width), (1, TILE), orientations)
    return normed_MD[:rows, :width], as_is, transposed


def _norm_kernel(x_ref, scale_ref, normed_ref, *written, eps, width, **how):
    def strip(rows):
        x = x_ref[rows, :].astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=1, keepdims=True) / width + eps)

        def numbers(cols):
            x = x_ref[rows, cols].astype(jnp.float32)
            normed = x * inverse * scale_ref[:, cols].astype(jnp.float32)
            normed_ref[rows, cols] = normed.astype(normed_ref.dtype)
            return normed.astype(normed_ref.dtype).astype(jnp.float32)

        return numbers

    _write(strip, written, **how)


# ---- what is written ----------------------------------------------------------------------------


def _write(strip, written, *, tile, scale, orientations):
    """Quantises a block.

    Args:
        strip: takes 128 rows, gives what takes 128 columns and gives those numbers in float32.
        written: for each orientation the numbers, and the scales of its tiles as rows; a scale of
            a block is repeated for each of its rows.
        tile: as the package's.
        scale: as the package's.
        orientations: in the order of `written`.
    """
    refs = dict(zip(orientations, zip(written[::2], written[1::2], strict=True), strict=True))
    rows, cols = written[0].shape if "as_is" in refs else written[0].shape[::-1]

    def largest(x, axis):
        bits = jnp.max(exact.as_bits(x) & 0x7FFFFFFF, axis=axis, keepdims=True)
        if tile == (TILE, TILE):
            bits = jnp.broadcast_to(jnp.max(bits, axis=1 - axis, keepdims=True), bits.shape)
        return exact.as_float(bits)

    def fp8(x, divisor, part):
        quotient = exact.divide(x, exact.Divisor(*(field[:, part] for field in divisor)))
        return jnp.clip(quotient, -LARGEST, LARGEST)

    def write_strip(m, scale_mK):
        here = pl.ds(pl.multiple_of(m * TILE, TILE), TILE)
        numbers = strip(here)
        parts = [slice(k, k + TILE) for k in range(0, cols, TILE)]
        squares = [numbers(part) for part in parts]
        if "as_is" in refs:
            q_ref, scale_ref = refs["as_is"]
            # A column of scales for each square, which are brought to scales together.
            lane = jax.lax.broadcasted_iota(jnp.int32, (TILE, TILE), 1)
            columns = jnp.zeros((TILE, TILE), jnp.float32)
            for k, x in enumerate(squares):
                columns = jnp.where(lane == k, largest(x, 1), columns)
            columns = choose_scale(columns, scale)
            scale_ref[:, here] = columns.T[: len(parts)]
            divisor = exact.divisor(columns)
            for k, (part, x) in enumerate(zip(parts, squares, strict=True)):
                q_ref[here, part] = fp8(x, divisor, slice(k, k + 1)).astype(q_ref.dtype)
        if "transposed" in refs:
            q_ref, _ = refs["transposed"]
            row = choose_scale(jnp.concatenate([largest(x, 0) for x in squares], axis=1), scale)
            divisor = exact.divisor(row)
            for part, x in zip(parts, squares, strict=True):
                q_ref[part, here] = fp8(x, divisor, part).T.astype(q_ref.dtype)
            sublane = jax.lax.broadcasted_iota(jnp.int32, scale_mK.shape, 0)
            scale_mK = jnp.where(sublane == m, row, scale_mK)
        return scale_mK

    # A row cannot be stored where it is only known at run time; a sum of rows can, once.
    empty = jnp.zeros((rows // TILE, cols), jnp.float32)
    scale_mK = jax.lax.fori_loop(0, rows // TILE, write_strip, empty)
    if "transposed" in refs:
        refs["transposed"][1][...] = scale_mK


def _call(kernel, arguments, cuts, shape, blocks, orientations, normed=None):
    """Runs a kernel that writes what `_write` does over a grid of blocks [..., m, k].

    Scales have a dimension for the blocks, so that a block of them need not be 8 rows.

    Args:
        kernel: takes references to the arguments and to what is written.
        arguments: what is read.
        cuts: a block of each argument, and its place for m and k.
        shape: [..., M, K], multiples of 128.
        blocks: [bm, bk], multiples of 128.
        orientations: which are written.
        normed: dtype of numbers [M, K] that are written first, if any are.
    """
    (*lead, rows, cols), (bm, bk) = shape, blocks
    m, k = pl.cdiv(rows, bm), pl.cdiv(cols, bk)
    fp8, float32 = jnp.float8_e4m3fn, jnp.float32
    written = []  # shape, dtype, block, place
    if normed is not None:
        written += [((rows, cols), normed, blocks, lambda m, k: (m, k))]
    if "as_is" in orientations:
        written += [
            ((rows, cols), fp8, blocks, lambda m, k: (m, k)),
            ((k, bk // TILE, rows), float32, (None, bk // TILE, bm), lambda m, k: (k, 0, m)),
        ]
    if "transposed" in orientations:
        written += [
            ((cols, rows), fp8, (bk, bm), lambda m, k: (k, m)),
            ((m, bm // TILE, cols), float32, (None, bm // TILE, bk), lambda m, k: (m, 0, k)),
        ]

    def spec(block, place):
        return pl.BlockSpec((*[None] * len(lead), *block), lambda *at: (*at[:-2], *place(*at[-2:])))

    grid = (*lead, m, k)
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((*lead, *size), dtype) for size, dtype, _, _ in written],
        grid=grid,
        in_specs=[spec(*cut) for cut in cuts],
        out_specs=[spec(block, place) for _, _, block, place in written],
        compiler_params=tpu_blocks.compiler(parallel=len(grid)),
    )(*arguments)


def _tiled(written, shape, tile, orientations):
    """What is returned of what `_write` wrote, for the shape before tiles were filled."""
    result = []
    for q, scale, orientation in zip(written[::2], written[1::2], orientations, strict=True):
        *lead, rows, cols = shape if orientation == "as_is" else (*shape[:-2], *shape[:-3:-1])
        scale = scale.reshape(*lead, -1, q.shape[-2])[..., : tiles(cols), :]
        scale = scale[..., ::TILE] if tile == (TILE, TILE) else scale[..., :rows]
        result.append(Tiled(q[..., :rows, :cols], jnp.swapaxes(scale, -1, -2)))
    return result


def _fill_tiles(x_MK, rows=True):
    """Zeros up to the next multiples of 128; they change no tile's largest magnitude."""
    *lead, m, k = x_MK.shape
    spare = tiles(m) * TILE - m if rows else 0, tiles(k) * TILE - k
    if not any(spare):
        return x_MK
    return jnp.pad(x_MK, [*[(0, 0)] * len(lead), *((0, each) for each in spare)])


def _blocks(shape):
    return tuple(tpu_blocks.cut(size, MOST) for size in shape[-2:])
