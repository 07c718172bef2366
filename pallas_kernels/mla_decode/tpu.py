"""`mla_decode` on TPUs. Compiled for v5p, v6e and tpu7x, interpreted, not run.

A step attends to 512 positions, whose pages were copied from wherever they lie while the steps
before it ran; it makes no difference to the copies where a sequence ends, so short ones cost no
more a position than long ones (`tpu_pages`). What no query of a tile sees is not copied: pages past
the length, and in the chunks of a long prompt those after the tile's last query.

A page lies in tiles of 128 lanes, so 576 numbers take 640, and FP8's 656 bytes take 800. That is if
it lies so: a jitted program's arguments come with the dimension last that leaves least room unused,
here that of the pages, and then every call begins with a copy of the whole cache. Whoever holds the
cache pins it, `jax.experimental.layout.Format(Layout((0, 1, 2, 3)), sharding)` as a program's
`in_shardings` and `out_shardings`. Knows nothing about projections.

B sequences, T new positions each, N heads, Z = C + R latent and rope widths, L layers, X pages of S
positions; Q = T * N rows of queries, in tiles of q, U of them in all sequences; K positions a step,
P parts of the keys.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_blocks
from pallas_kernels.choose import Uncovered
from pallas_kernels.latents import Fp8Latents, Latents
from pallas_kernels.mla_decode import NOTHING, combine
from pallas_kernels.mla_decode.tpu_pages import Stream, Work
from pallas_kernels.tiled import TILE

STEP = 512  # positions
MOST_ROWS = 512  # of queries a tile: then copying its keys takes less time than multiplying them
MOST_TABLE = 1 << 17  # entries: half of a core's scalar memory
LOG2_E = math.log2(math.e)


def mla_decode(
    q_BTNZ: jax.Array,
    cache_LXSZ: Latents,
    layer: jax.Array,
    table_BX: jax.Array,
    length_B: jax.Array,
    positions_BT: jax.Array,
    scale: float,
    value_dim: int,
) -> tuple[jax.Array, jax.Array]:
    """See the package for arguments.

    Where two cores are one device (v5p) they take tiles of queries in turn; if those do not divide,
    each takes half of every tile's keys, which costs a float32 output for each half.

    Raises:
        Uncovered: for pages that are no whole tiles of memory, a table that scalar memory has no
            room for, or an empty array.
    """
    b, t, n, z = q_BTNZ.shape
    pages = _pages(cache_LXSZ)
    if q_BTNZ.size == 0 or table_BX.size == 0:
        raise Uncovered(f"queries {q_BTNZ.shape} and a table {table_BX.shape}; none may be empty")
    if table_BX.size > MOST_TABLE:
        raise Uncovered(f"a table of {table_BX.size} pages; up to {MOST_TABLE} are taken")
    rows, page_size = t * n, pages[0].shape[2]
    tile = tpu_blocks.cut(rows, MOST_ROWS)
    tiles = pl.cdiv(rows, tile)
    cores = pltpu.get_tpu_info().num_cores
    parts = 1 if b * tiles % cores == 0 else cores
    work = Work(
        cores=cores,
        units=b * tiles * parts,
        tiles=tiles,
        parts=parts,
        table_width=table_BX.shape[1],
        page_size=page_size,
        pages=max(1, min(STEP // page_size, table_BX.shape[1])),
    )
    # A row sees the keys before its limit.
    limit_BT = jnp.clip(positions_BT + 1, 0, jnp.maximum(length_B, 0)[:, None]).astype(jnp.int32)
    limit_BQ = jnp.repeat(limit_BT, n, axis=1)
    keys_U = jnp.pad(limit_BQ, ((0, 0), (0, tiles * tile - rows))).reshape(-1, tile).max(axis=1)

    def block(shape, place):
        return pl.BlockSpec(shape, lambda core, nth, *_: place(*work.place(core, nth)))

    out_PBQC, lse_PB1Q = pl.pallas_call(
        functools.partial(_kernel, work=work, scale=scale * LOG2_E),
        out_shape=(
            jax.ShapeDtypeStruct(
                (parts, b, rows, value_dim), q_BTNZ.dtype if parts == 1 else jnp.float32
            ),
            jax.ShapeDtypeStruct((parts, b, 1, rows), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, work.units // cores),
            in_specs=[
                block((None, tile, z), lambda part, b, q: (b, q, 0)),
                block((None, 1, tile), lambda part, b, q: (b, 0, q)),
                [pl.BlockSpec(memory_space=pltpu.HBM) for _ in pages],
            ],
            out_specs=(
                block((None, None, tile, value_dim), lambda part, b, q: (part, b, q, 0)),
                block((None, None, 1, tile), lambda part, b, q: (part, b, 0, q)),
            ),
            scratch_shapes=[
                pltpu.VMEM((tile, value_dim), jnp.float32),
                pltpu.VMEM((tile, 1), jnp.float32),
                pltpu.VMEM((tile, 1), jnp.float32),
                Stream.scratch(work, pages),
            ],
        ),
        compiler_params=tpu_blocks.compiler(parallel=1, sequential=1),
        name="mla_decode",
    )(
        jnp.asarray(layer, jnp.int32)[None],
        keys_U,
        table_BX.astype(jnp.int32).reshape(-1),
        q_BTNZ.reshape(b, rows, z),
        limit_BQ[:, None],
        pages,
    )
    out_PBTNC = out_PBQC.reshape(parts, b, t, n, value_dim)
    lse_PBTN = lse_PB1Q.reshape(parts, b, t, n)
    if parts == 1:
        return out_PBTNC[0], lse_PBTN[0]
    out_BTNC, lse_BTN = combine(out_PBTNC, lse_PBTN)
    return out_BTNC.astype(q_BTNZ.dtype), lse_BTN


def _pages(cache: Latents) -> list[jax.Array]:
    """What a cache has of each page, [L, X, ...]."""
    arrays = list(cache) if isinstance(cache, Fp8Latents) else [cache]
    for array in (arrays[0], arrays[-1]):
        filled = 32 // array.dtype.itemsize  # rows of a tile of memory
        if array.shape[2] % filled:
            raise Uncovered(
                f"pages of {array.shape[2]} positions in {array.dtype.name}; "
                f"multiples of {filled} are taken"
            )
    return arrays


def _kernel(
    layer,
    keys_U,
    table,
    q_ref,
    limit_ref,
    pages,
    out_ref,
    lse_ref,
    sum_ref,
    top_ref,
    total_ref,
    scratch,
    *,
    work: Work,
    scale: float,
):
    stream = Stream(work, layer[0], keys_U, table, pages, *scratch)
    core, nth = pl.program_id(0), pl.program_id(1)
    pl.when(nth == 0)(lambda: stream.begin(core))

    sum_ref[...] = jnp.zeros_like(sum_ref)
    top_ref[...] = jnp.full_like(top_ref, NOTHING)
    total_ref[...] = jnp.zeros_like(total_ref)
    limit_q1 = limit_ref[...].T

    def attend(position, page_refs):
        parts = _entries(page_refs, q_ref.dtype)
        scores_qK = _scores(q_ref[...], parts) * scale
        position_qK = position + jax.lax.broadcasted_iota(jnp.int32, scores_qK.shape, 1)
        # Less than `NOTHING`, so that the weight of a key that is not seen is never exp2(0).
        scores_qK = jnp.where(position_qK < limit_q1, scores_qK, -jnp.inf)
        top_q1 = jnp.maximum(top_ref[...], scores_qK.max(axis=1, keepdims=True))
        weights_qK, shrink_q1 = jnp.exp2(scores_qK - top_q1), jnp.exp2(top_ref[...] - top_q1)
        values_KC = parts[0][:, : sum_ref.shape[1]]
        sum_qC = _dot(weights_qK.astype(values_KC.dtype), values_KC, contract=0)
        sum_ref[...] = sum_ref[...] * shrink_q1 + sum_qC
        total_ref[...] = total_ref[...] * shrink_q1 + weights_qK.sum(axis=1, keepdims=True)
        top_ref[...] = top_q1

    stream.each_step(work.unit(core, nth), attend)

    total_q1 = total_ref[...]
    safe_q1 = jnp.where(total_q1 > 0, total_q1, 1.0)
    out_ref[...] = (sum_ref[...] / safe_q1).astype(out_ref.dtype)
    lse_q1 = (top_ref[...] + jnp.log2(safe_q1)) / LOG2_E
    lse_ref[...] = jnp.where(total_q1 > 0, lse_q1, NOTHING).T


def _entries(page_refs, dtype) -> list[jax.Array]:
    """The entries of a step, latents first, in one or two parts of their width: [K, width]."""
    if len(page_refs) == 1:
        entries = page_refs[0][...]
        return [entries.reshape(-1, entries.shape[-1]).astype(dtype)]
    q_ref, scale_ref, rope_ref = page_refs
    width, rope = q_ref.shape[-1], rope_ref[...]
    scale = jnp.swapaxes(scale_ref[...], 1, 2)  # a column a tile of 128
    latents = [
        (q_ref[:, :, at : at + TILE].astype(jnp.float32) * scale[:, :, nth : nth + 1]).astype(dtype)
        for nth, at in enumerate(range(0, width, TILE))
    ]
    return [
        jnp.concatenate(latents, axis=-1).reshape(-1, width),
        rope.reshape(-1, rope.shape[-1]).astype(dtype),
    ]


def _scores(q_qZ: jax.Array, parts: list[jax.Array]) -> jax.Array:
    """Products with the entries, [q, K] float32."""
    latent_KZ, *rope = parts
    width = latent_KZ.shape[1]
    scores_qK = _dot(q_qZ[:, :width], latent_KZ, contract=1)
    for part in rope:
        scores_qK += _dot(q_qZ[:, width:], part, contract=1)
    return scores_qK


def _dot(a, b, contract):
    """The product over a's columns and that dimension of b, in float32.

    Float32 operands are not rounded to bfloat16 first.
    """
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (contract,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
