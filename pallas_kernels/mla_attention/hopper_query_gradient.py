"""The gradient of attention's queries on Hopper's tensor cores, in Pallas Mosaic GPU.

A CTA owns 128 queries of a head and walks their keys. The weights are made again from the
log-sum-exps (arXiv 2307.08691, section 3.1). Knows nothing about the gradients of keys. Compiled
for an H100 and interpreted, not run.

B sequences of S rows, T queries, N heads, I heads of keys and values, A key and H value width; i
tiles along T.
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


def query_gradient(at: ring.Operands, scale: float) -> jax.Array:
    """[B, T, N, A]."""
    b, t, n, _ = at.q.shape
    kernel = ring.build(
        functools.partial(_kernel, scale=scale, group=n // at.k.shape[2]),
        at,
        out_type=jax.ShapeDtypeStruct(at.q.shape, at.q.dtype),
        owners=(b, n, t),
        name="attention_query_gradient",
    )
    last_start_Bi = hopper_spans.last_starts(at.spans, tiles.ROWS_EACH)
    needed = hopper_spans.keys_of_queries(at.spans, tiles.ROWS, ring.STEP)
    return kernel(*at[:-1], at.spans.first_row, at.spans.start_BT, last_start_Bi, *needed)


def _kernel(
    q_BTNA,
    k_BSIA,
    v_BSIH,
    d_out_BTNH,
    lse_BNT,
    delta_BNT,
    first_row,
    start_BT,
    last_start_Bi,
    begin_Bi,
    count_Bi,
    dq_BTNA,
    refs: ring.Refs,
    *,
    scale,
    group,
):
    """See `ring.Operands` and `hopper_spans` for the operands; `group` query heads share keys."""
    sequence, head, tile = tiles.place(begin_Bi.shape[1])
    begin, count = begin_Bi[sequence, tile], count_Bi[sequence, tile]
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == tiles.LOADER)
    def _load():
        key_head = lax.div(head, jnp.int32(group))

        def own(half):
            rows = tiles.rows_of(tile, half)
            return [x.at[sequence, rows, head] for x in (q_BTNA, d_out_BTNH)]

        def walked(i):
            keys = pl.ds((begin + i) * ring.STEP, ring.STEP)
            return [x.at[sequence, keys, key_head] for x in (k_BSIA, v_BSIH)]

        ring.load(refs, own, count, walked)

    @pl.when(warpgroup != tiles.LOADER)
    def _multiply():
        plgpu.set_max_registers(tiles.MATH_REGISTERS, action="increase")
        rows = tiles.rows_of(tile, warpgroup)
        row = first_row[0] + rows.start
        last_start = last_start_Bi[sequence, tile * tiles.MATH_WARPGROUPS + warpgroup]

        def number(ref, *index):
            return plgpu.load(ref.at[*index, rows], layout=tiles.BY_ROW, optimized=False)

        start = number(start_BT, sequence)
        lse, delta = (number(ref, sequence, head) for ref in (lse_BNT, delta_BNT))
        plgpu.barrier_wait(refs.own_full.at[warpgroup])

        def sum_up(dq):
            @pl.loop(0, count)
            def _step(i):
                stage, key = tiles.stage_of(i, ring.STAGES), (begin + i) * ring.STEP
                q, d_out = refs.own(warpgroup)
                keys, values = refs.ring_a.at[stage], refs.ring_h.at[stage]
                plgpu.barrier_wait(refs.full.at[stage])

                def d_scores(scores, d_weights):
                    plgpu.wgmma(scores, q, keys.transpose((1, 0)))
                    plgpu.wgmma(d_weights, d_out, values.transpose((1, 0)))
                    scores = plgpu.wgmma_accumulator_load(scores, wait_n=1)
                    shape = scores.shape
                    weights = tiles.exp2(scores, scale, tiles.along_rows(lse, shape))

                    def masked():
                        seen = tiles.sees(
                            tiles.index_of(shape, 0, row),
                            tiles.along_rows(start, shape),
                            tiles.index_of(shape, 1, key),
                        )
                        return jnp.where(seen, weights, 0.0)

                    crosses = (key + ring.STEP > row + 1) | (key < last_start)
                    weights = lax.cond(crosses, masked, lambda: weights)
                    return weights * (d_weights[...] - tiles.along_rows(delta, shape))

                sums = plgpu.ACC((tiles.ROWS_EACH, ring.STEP))
                d_scores = pl.run_scoped(d_scores, sums, sums)
                plgpu.wgmma(dq, d_scores.astype(keys.dtype), keys)
                plgpu.wgmma_wait(0)  # meanwhile the other warpgroup has the tensor cores
                plgpu.barrier_arrive(refs.free.at[stage])

            return dq[...]

        dq = pl.run_scoped(sum_up, plgpu.ACC((tiles.ROWS_EACH, q_BTNA.shape[3])))
        target = dq_BTNA.at[sequence, rows, head]
        tiles.store(dq * scale, refs.own_a.at[warpgroup], target)
        plgpu.wait_smem_to_gmem(0)
