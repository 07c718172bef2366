"""The gradients of attention's keys and values on Hopper's tensor cores, in Pallas Mosaic GPU.

A CTA owns 128 keys and values of a head, and walks the queries that see them, those of every query
head that shares it: nothing is summed across CTAs. Scores are made with keys as rows, so that the
weights of 64 queries multiply from the registers that they are made in. The two gradients hold 160
registers a thread at widths 192 and 128, so that the rest goes one after the other: scores become
weights, in BF16, before the gradients of weights are made. Knows nothing about the gradient of
queries. Compiled for an H100 and interpreted, not run.

B sequences of S rows, T queries, N heads, I heads of keys and values, A key and H value width; i
tiles along T, j along S.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mla_attention import hopper_ring as ring
from pallas_kernels.mla_attention import hopper_spans
from pallas_kernels.mla_attention import hopper_tiles as tiles

LSE, DELTA, ROW = range(3)  # the numbers of a query, by their index
FIRST, PAST = range(2)  # the rows that see a key, from and up to, by their index


def key_gradients(at: ring.Operands, scale: float) -> tuple[jax.Array, jax.Array]:
    """([B, S, I, A], [B, S, I, H])."""
    b, s, heads, _ = at.k.shape
    group = at.q.shape[2] // heads
    kernel = ring.build(
        functools.partial(_kernel, scale=scale, group=group),
        at,
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (at.k, at.v)),
        owners=(b, heads, s),
        name="attention_key_gradients",
        numbers=3,
    )
    first_end_Bj = hopper_spans.first_ends(at.spans, tiles.ROWS_EACH)
    needed = hopper_spans.queries_of_keys(at.spans, ring.STEP, tiles.ROWS)
    rows = at.spans.first_row, first_end_Bj, _bounds(at.spans)
    return kernel(*at[:4], _numbers(at), *rows, *needed)


def _numbers(at: ring.Operands) -> jax.Array:
    """[B, N, i, 3, 64] float32: those of a tile of queries together, for one copy to bring them.

    Rows are among them, exact up to 2^24, because the numbers of columns are cheaper to load where
    a mask is needed than to hold.
    """
    row_BT = at.spans.first_row + jnp.arange(at.spans.start_BT.shape[1], dtype=jnp.int32)
    row_BT = jnp.where(at.spans.start_BT == hopper_spans.NOWHERE, -1, row_BT)
    row_BNT = jnp.broadcast_to(row_BT.astype(jnp.float32)[:, None], at.lse.shape)
    tiled = [x.reshape(*x.shape[:2], -1, ring.STEP) for x in (at.lse, at.delta, row_BNT)]
    return jnp.stack(tiled, axis=-2)


def _bounds(spans: hopper_spans.Spans) -> jax.Array:
    """[B, 2, S] float32: the rows that see each key."""
    row_BS = jnp.broadcast_to(jnp.arange(spans.end_BS.shape[1]), spans.end_BS.shape)
    return jnp.stack([row_BS, spans.end_BS], axis=1).astype(jnp.float32)


def _kernel(
    q_BTNA,
    k_BSIA,
    v_BSIH,
    d_out_BTNH,
    numbers_BNi3t,
    first_row,
    first_end_Bj,
    bounds_B2S,
    begin_Bj,
    count_Bj,
    dk_BSIA,
    dv_BSIH,
    refs: ring.Refs,
    *,
    scale,
    group,
):
    """See `ring.Operands` and `hopper_spans` for the operands; `group` query heads share keys."""
    # The first keys first: the most queries see them, and all SMs should end together.
    sequence, key_head, tile = (lax.axis_index(name) for name in tiles.GRID)
    begin, count = begin_Bj[sequence, tile], count_Bj[sequence, tile]
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == tiles.LOADER)
    def _load():
        def own(half):
            keys = tiles.rows_of(tile, half)
            return [x.at[sequence, keys, key_head] for x in (k_BSIA, v_BSIH)]

        def walked(i):
            head, query_tile = key_head * group + lax.div(i, count), begin + lax.rem(i, count)
            rows = pl.ds(query_tile * ring.STEP, ring.STEP)
            of_rows = [x.at[sequence, rows, head] for x in (q_BTNA, d_out_BTNH)]
            return [*of_rows, numbers_BNi3t.at[sequence, head, query_tile]]

        ring.load(refs, own, count * group, walked)

    @pl.when(warpgroup != tiles.LOADER)
    def _multiply():
        plgpu.set_max_registers(tiles.MATH_REGISTERS, action="increase")
        keys = tiles.rows_of(tile, warpgroup)
        past_keys = keys.start + tiles.ROWS_EACH
        first_end = first_end_Bj[sequence, tile * tiles.MATH_WARPGROUPS + warpgroup]
        origin = first_row[0] + begin * ring.STEP
        plgpu.barrier_wait(refs.own_full.at[warpgroup])

        def step(dk, dv, i, position):
            stage, row = tiles.stage_of(position, ring.STAGES), origin + i * ring.STEP
            own_k, own_v = refs.own(warpgroup)
            queries, d_out = refs.ring_a.at[stage], refs.ring_h.at[stage]
            plgpu.barrier_wait(refs.full.at[stage])

            def number(which):
                of_queries = plgpu.load(refs.numbers.at[stage, which], layout=tiles.BY_COLUMN)
                return tiles.along_columns(of_queries, (tiles.ROWS_EACH, ring.STEP))

            def bound(which):
                of_keys = bounds_B2S.at[sequence, which, keys]
                of_keys = plgpu.load(of_keys, layout=tiles.BY_ROW, optimized=False)
                return tiles.along_rows(of_keys, (tiles.ROWS_EACH, ring.STEP))

            weights = tiles.exp2(ring.product(own_k, queries), scale, number(LSE))

            def masked():
                seen = (bound(FIRST) <= number(ROW)) & (number(ROW) < bound(PAST))
                return jnp.where(seen, weights, 0.0)

            crosses = (past_keys > row + 1) | (row + ring.STEP > first_end)
            weights = lax.cond(crosses, masked, lambda: weights).astype(d_out.dtype)
            d_weights = ring.product(own_v, d_out)
            # Without the barrier LLVM makes float32 of the weights before they are needed.
            weights = lax.optimization_barrier(weights)
            d_scores = weights.astype(jnp.float32) * (d_weights - number(DELTA))
            plgpu.wgmma(dv, weights, d_out)
            plgpu.wgmma(dk, d_scores.astype(queries.dtype), queries)
            plgpu.wgmma_wait(0)  # meanwhile the other warpgroup has the tensor cores
            plgpu.commit_smem()  # TMA writes next where threads, not tensor cores, read numbers
            plgpu.barrier_arrive(refs.free.at[stage])
            return position + 1

        def sum_up(dk, dv):
            def walk(_, position):
                return lax.fori_loop(0, count, functools.partial(step, dk, dv), position)

            lax.fori_loop(0, group, walk, jnp.int32(0))
            return dk[...], dv[...]

        widths = k_BSIA.shape[3], v_BSIH.shape[3]
        sums = [plgpu.ACC((tiles.ROWS_EACH, width)) for width in widths]
        dk, dv = pl.run_scoped(sum_up, *sums)
        for gradient, stage, target in (
            (dk * scale, refs.own_a, dk_BSIA),
            (dv, refs.own_h, dv_BSIH),
        ):
            tiles.store(gradient, stage.at[warpgroup], target.at[sequence, keys, key_head])
        plgpu.wait_smem_to_gmem(0)
