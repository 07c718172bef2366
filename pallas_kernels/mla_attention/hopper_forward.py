"""Attention forward on Hopper's tensor cores, in Pallas Mosaic GPU.

A CTA owns 128 queries of a head. Of its three warpgroups one loads keys and values by TMA, through
rings of two stages, and two multiply, 64 queries each. The scores of a tile are under way while the
weights of the tile before multiply its values, and go through the softmax meanwhile: the structure
is that of FlashAttention-3 (arXiv 2407.08608, section 3.2). Knows nothing about operands that do
not fit. Compiled for an H100 and interpreted, not run.

B sequences of S rows, T queries, N heads, I heads of keys and values, A key and H value width; i
tiles along T.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.layouts import swizzled
from pallas_kernels.mla_attention import hopper_spans
from pallas_kernels.mla_attention import hopper_tiles as tiles

KEYS = 128  # a stage of keys, or of values
STAGES = 2  # of 80 KiB at widths 192 and 128, beside 48 KiB of queries
MASKED = -1e30  # finite, so that a row that has seen nothing yet is scaled by 1, not by NaN


def attend(
    q_BTNA: jax.Array,
    k_BSIA: jax.Array,
    v_BSIH: jax.Array,
    spans: hopper_spans.Spans,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, H], float32 log-sum-exps of the scaled scores to base 2, [B, N, T])."""
    (b, t, n, a), h, dtype = q_BTNA.shape, v_BSIH.shape[-1], q_BTNA.dtype
    full, free = (
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=STAGES)
        for arrivals in (1, tiles.MATH_WARPGROUPS)
    )
    # A warpgroup's results leave through where its queries were, by pieces that both consist of.
    pieces, half = max(a, h) // tiles.CHUNK, (tiles.MATH_WARPGROUPS, tiles.ROWS_EACH)
    kernel = tiles.kernel(
        functools.partial(_kernel, scale=scale, group=n // k_BSIA.shape[2]),
        out_type=(
            jax.ShapeDtypeStruct((b, t, n, h), dtype),
            jax.ShapeDtypeStruct((b, n, t), jnp.float32),
        ),
        scratch_types={
            "q_stage": swizzled((half[0], pieces, half[1], tiles.CHUNK), dtype),
            "k_stage": swizzled((STAGES, KEYS, a), dtype),
            "v_stage": swizzled((STAGES, KEYS, h), dtype),
            "lse_stage": plgpu.SMEM(half, jnp.float32),
            "q_full": plgpu.Barrier(num_arrivals=a // tiles.CHUNK, num_barriers=half[0]),
            **{"k_full": full, "v_full": full, "k_free": free, "v_free": free},
        },
        grid=(b, n, pl.cdiv(t, tiles.ROWS)),
        name="attention_forward",
    )
    last_start_Bi = hopper_spans.last_starts(spans, tiles.ROWS_EACH)
    needed = hopper_spans.keys_of_queries(spans, tiles.ROWS, KEYS)
    return kernel(q_BTNA, k_BSIA, v_BSIH, spans.first_row, spans.start_BT, last_start_Bi, *needed)


def _pieces(width: int) -> list[pl.Slice]:
    return [pl.ds(i, tiles.CHUNK) for i in range(0, width, tiles.CHUNK)]


def _kernel(
    q_BTNA,
    k_BSIA,
    v_BSIH,
    first_row,
    start_BT,
    last_start_Bi,
    begin_Bi,
    count_Bi,
    out_BTNH,
    lse_BNT,
    *,
    scale,
    group,
    q_stage,
    k_stage,
    v_stage,
    lse_stage,
    q_full,
    k_full,
    v_full,
    k_free,
    v_free,
):
    """Who loads and who multiplies.

    Args:
        q_BTNA: as those that follow, see `hopper_spans`, and `attend` for the results.
        scale: of the scores.
        group: query heads that share keys and values.
        q_stage: [warpgroup, piece, 64, 64].
        k_stage: [stages, keys, A].
        v_stage: [stages, keys, H].
        lse_stage: [warpgroup, 64].
        q_full: barriers [warpgroup]: its queries are loaded.
        k_full: barriers [stages]: a stage is loaded.
        v_full: as k_full.
        k_free: barriers [stages]: nobody reads a stage any more.
        v_free: as k_free.
    """
    sequence, head, tile = tiles.place(begin_Bi.shape[1])
    begin, count = begin_Bi[sequence, tile], count_Bi[sequence, tile]
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == tiles.LOADER)
    def _load():
        plgpu.set_max_registers(tiles.LOADER_REGISTERS, action="decrease")
        key_head = lax.div(head, jnp.int32(group))
        for half in range(tiles.MATH_WARPGROUPS):
            for i, piece in enumerate(_pieces(q_BTNA.shape[3])):
                q = q_BTNA.at[sequence, tiles.rows_of(tile, half), head, piece]
                plgpu.copy_gmem_to_smem(q, q_stage.at[half, i], q_full.at[half])

        def load(source, target, full, free, i):
            stage = tiles.stage_of(i, STAGES)

            @pl.when(i >= STAGES)
            def _free():
                plgpu.barrier_wait(free.at[stage])

            keys = source.at[sequence, pl.ds((begin + i) * KEYS, KEYS), key_head]
            plgpu.copy_gmem_to_smem(keys, target.at[stage], full.at[stage])

        @pl.loop(0, count)
        def _step(i):
            load(k_BSIA, k_stage, k_full, k_free, i)
            load(v_BSIH, v_stage, v_full, v_free, i)

        tiles.drain(count, STAGES, k_free, v_free)

    @pl.when(warpgroup != tiles.LOADER)
    def _multiply():
        plgpu.set_max_registers(tiles.MATH_REGISTERS, action="increase")
        rows = tiles.rows_of(tile, warpgroup)
        row = first_row[0] + rows.start
        start = plgpu.load(start_BT.at[sequence, rows], layout=tiles.BY_ROW, optimized=False)
        last_start = last_start_Bi[sequence, tile * tiles.MATH_WARPGROUPS + warpgroup]

        def softmax(i, scores, top, total):
            """The weights of a tile, the new top and total, and what earlier sums shrink by."""
            shape, key = scores.shape, (begin + i) * KEYS

            def masked():
                seen = tiles.sees(
                    tiles.index_of(shape, 0, row),
                    tiles.along_rows(start, shape),
                    tiles.index_of(shape, 1, key),
                )
                return jnp.where(seen, scores, -jnp.inf)

            crosses = (key + KEYS > row + 1) | (key < last_start)
            scores = lax.cond(crosses, masked, lambda: scores)
            new_top = jnp.maximum(top, scores.max(axis=1) * (scale * tiles.LOG2E))
            weights = tiles.exp2(scores, scale, tiles.along_rows(new_top, shape))
            shrink = jnp.exp2(top - new_top)
            total = total * shrink + weights.sum(axis=1)
            return weights.astype(v_stage.dtype), new_top, total, shrink

        def await_keys(i):
            @pl.when(i < count)
            def _wait():
                plgpu.barrier_wait(k_full.at[tiles.stage_of(i, STAGES)])

        def begin_scores(i, sums):
            keys = k_stage.at[tiles.stage_of(i, STAGES)]
            for j, piece in enumerate(_pieces(k_stage.shape[2])):
                plgpu.wgmma(sums, q_stage.at[warpgroup, j], keys.at[:, piece].transpose((1, 0)))

        def begin_values(i, sums, weights):
            stage = tiles.stage_of(i, STAGES)
            plgpu.barrier_wait(v_full.at[stage])
            plgpu.wgmma(sums, weights, v_stage.at[stage])

        def free(barriers, i):
            plgpu.barrier_arrive(barriers.at[tiles.stage_of(i, STAGES)])

        scores_type = plgpu.ACC((tiles.ROWS_EACH, KEYS))
        out_shape = tiles.ROWS_EACH, v_stage.shape[2]
        nothing = tiles.zeros(tiles.ROWS_EACH)

        def first_weights():
            def multiply(sums):
                await_keys(0)
                begin_scores(0, sums)
                return sums[...]

            scores = pl.run_scoped(multiply, scores_type)
            free(k_free, 0)
            await_keys(1)
            return softmax(0, scores, nothing + MASKED, nothing)[:3]

        def sum_up(out):
            def step(i, carry):
                weights, top, total = carry

                def multiply(sums):
                    begin_scores(i, sums)
                    begin_values(i - 1, out, weights)
                    scores = plgpu.wgmma_accumulator_load(sums, wait_n=1)
                    free(k_free, i)
                    return softmax(i, scores, top, total)

                weights, top, total, shrink = pl.run_scoped(multiply, scores_type)
                # Here, too, because ptxas moves no wait for the tensor cores across it: otherwise
                # it lets the softmax wait for the values.
                await_keys(i + 1)
                before = out[...]
                free(v_free, i - 1)
                out[...] = before * tiles.along_rows(shrink, out_shape)
                return weights, top, total

            weights, top, total = lax.fori_loop(1, count, step, first_weights())
            begin_values(count - 1, out, weights)
            after = out[...]
            free(v_free, count - 1)
            return after, top, total

        plgpu.barrier_wait(q_full.at[warpgroup])
        out, top, total = lax.cond(
            count > 0,
            lambda: pl.run_scoped(sum_up, plgpu.ACC(out_shape)),
            lambda: (tiles.zeros(*out_shape), nothing, nothing),
        )
        total = jnp.where(total == 0, 1.0, total)  # a row of padding gives zero
        out = out * tiles.along_rows(1 / total, out_shape)
        lse_stage[warpgroup] = top + jnp.log2(total)
        pieces = _pieces(out_shape[1])
        for i, piece in enumerate(pieces):
            columns = out[:, piece.start : piece.start + piece.size]
            q_stage[warpgroup, i] = columns.astype(q_stage.dtype)
        plgpu.commit_smem()
        for i, piece in enumerate(pieces):
            target = out_BTNH.at[sequence, rows, head, piece]
            plgpu.copy_smem_to_gmem(q_stage.at[warpgroup, i], target)
        plgpu.copy_smem_to_gmem(lse_stage.at[warpgroup], lse_BNT.at[sequence, head, rows])
        plgpu.wait_smem_to_gmem(0)
