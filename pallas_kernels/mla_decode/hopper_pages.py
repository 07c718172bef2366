"""What a warpgroup of `mla_decode` on Hopper computes with pages once they are in shared memory.

An online softmax that two warpgroups have in common: they go through the pages in the same order,
and the greatest score so far is handed from the one that made a page's weights to the other. Each
adds the weighted values of its half of the columns to its accumulator, and sums the weights that it
made itself. Knows nothing about where pages come from, or where outputs go.

r rows of queries, C latent width.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mla_decode.hopper_schedule import PAGE, ROWS
from pallas_kernels.tiled import TILE

STAGES = 2
ROPE = PAGE  # width of rotated keys: in their place lie weights, one a position
# Scores for exponentials to base 2. What is masked weighs exactly zero even beside nothing else.
LOG2E = 1.4426950408889634
MASKED, LOWEST = -1e30, -1e20
BY_ROW = plgpu.Layout.WGMMA.reduce(1)


class Pages:
    """The pages of one piece of work after another.

    Attributes:
        at: references, see `hopper_kernel`.
        me: number of this warpgroup, and of its half of the columns.
        factor: of scores, that makes them exponents of 2.
        fp8: whether pages are.
    """

    def __init__(self, at: Any, me: int, scale: float, *, fp8: bool):
        """As the attributes; `scale` is that of scores."""
        self.at, self.me, self.fp8 = at, me, fp8
        self.factor = scale * LOG2E

    def sum_up(self, first_page, count, limit, out):
        """Adds the values of some pages, weighted, to an accumulator.

        Args:
            first_page: of its sequence, in order.
            count: of pages; the first lies in the first stage, the next one in the second, and so
                on in turn.
            limit: [r], the last position that each row attends to.
            out: accumulator [r, C / 2] of zeros.

        Returns:
            (top [r]: the greatest exponent of 2, relative to which the values are weighted, the sum
            [r] of the weights that this warpgroup made).
        """
        nothing = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), BY_ROW)
        start = nothing + LOWEST, nothing

        def scores(i, stage):
            return self.scores(stage, (first_page + i) * PAGE, limit)

        if self.fp8:

            def page(i, carry):
                stage = lax.rem(i, jnp.int32(STAGES))
                self.widen(stage)
                if self.me == 0:
                    return self.lead(stage, scores(i, stage), carry, out)
                return self.follow(stage, carry, out)

            return lax.fori_loop(0, count, page, start)

        def pair(i, carry):
            if self.me == 0:
                carry = self.lead(0, scores(i, 0), carry, out)
                return self.follow(1, carry, out)
            # Asked for first, its weights are there when the other has used its own.
            own = scores(i + 1, 1)
            return self.lead_after(0, 1, own, carry, out)

        carry = lax.fori_loop(0, count // 2, lambda j, carry: pair(2 * j, carry), start)

        def odd():
            if self.me == 0:
                return self.lead(0, scores(count - 1, 0), carry, out)
            return self.follow(0, carry, out)

        return lax.cond(count % 2 == 1, odd, lambda: carry)

    def lead(self, stage, scores, carry, out):
        """A page whose weights this warpgroup makes."""
        weights, top, total = self.soften(scores, *carry)
        self.publish(stage, weights, top)
        self.add(out, carry[0] - top, stage)
        return top, total

    def follow(self, stage, carry, out):
        """A page whose weights the other one makes."""
        top = self.take(stage)
        before, total = carry
        self.add(out, before - top, stage)
        return top, total * jnp.exp2(before - top)

    def lead_after(self, others, own, scores, carry, out):
        """Both; the other warpgroup is given what it waits for before anything is added."""
        before, total = carry
        middle = self.take(others)
        weights, top, total = self.soften(scores, middle, total * jnp.exp2(before - middle))
        self.publish(own, weights, top)
        self.add(out, before - middle, others)
        self.add(out, middle - top, own)
        return top, total

    def scores(self, stage, first_key, limit):
        """[r, 64] exponents of 2 of a page; its latents and rotated keys need have arrived."""
        at = self.at
        q, _, _ = at.shared
        halves = at.wide if self.fp8 else at.latent_stage.at[stage]
        width = halves.shape[-1]
        if not self.fp8:
            for half in range(2):
                plgpu.barrier_wait(at.latent_full.at[2 * stage + half])
        plgpu.barrier_wait(at.rope_full.at[stage])

        def multiply(acc):
            @pl.loop(0, 2)
            def _half(half):
                columns = q.at[:, pl.ds(half * width, width)]
                plgpu.wgmma(acc, columns, halves.at[half].transpose((1, 0)))

            rope = at.rope_stage.at[stage]
            plgpu.wgmma(acc, q.at[:, pl.ds(2 * width, ROPE)], rope.transpose((1, 0)))
            return acc[...]

        scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, PAGE)))
        iota = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
        seen = first_key + iota <= lax.broadcast_in_dim(limit, scores.shape, (0,))
        return jnp.where(seen, scores * self.factor, MASKED)

    def soften(self, scores, top, total):
        """(weights [r, 64] in BF16, the new top, the new total)."""
        new_top = jnp.maximum(top, scores.max(axis=1))
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, scores.shape, (0,)))
        total = total * jnp.exp2(top - new_top) + weights.sum(axis=1)
        return weights.astype(jnp.bfloat16), new_top, total

    def publish(self, stage, weights, top):
        """Leaves a page's weights to the other warpgroup."""
        self.at.rope_stage[stage] = weights
        self.at.top[stage] = top
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.at.ready.at[stage])

    def take(self, stage):
        """Waits for a page's weights; the top that they are relative to."""
        plgpu.barrier_wait(self.at.ready.at[stage])
        return plgpu.load(self.at.top.at[stage], layout=BY_ROW, optimized=False)

    def add(self, out, change, stage):
        """Adds a page's values to the accumulator, which shrinks by 2^change, and lets it go."""
        at, index = self.at, 2 * stage + self.me
        values = (at.wide if self.fp8 else at.latent_stage.at[stage]).at[self.me]
        if not self.fp8 and stage != self.me:
            plgpu.barrier_wait(at.latent_full.at[index])
        before = out[...]
        out[...] = before * lax.broadcast_in_dim(jnp.exp2(change), before.shape, (0,))
        plgpu.wgmma(out, at.rope_stage.at[stage], values)
        plgpu.wgmma_wait(0)
        if not self.fp8:
            plgpu.barrier_arrive(at.latent_free.at[index])
        plgpu.barrier_arrive(at.rope_free.at[stage])

    def free(self, stage: int):
        """Says that this warpgroup does not need a stage."""
        plgpu.barrier_arrive(self.at.latent_free.at[2 * stage + self.me])
        plgpu.barrier_arrive(self.at.rope_free.at[stage])

    def widen(self, stage):
        """Makes this warpgroup's half of a page BF16, and lets the other one know."""
        at = self.at
        plgpu.barrier_wait(at.latent_full.at[2 * stage + self.me])
        # Eight numbers a thread, 8 bytes and 16; eight threads a row.
        layout = plgpu.Layout.TILED(
            plgpu.Tiling(((16, 64), (4, 64), (8,))),
            warp_dims=(-5,),
            lane_dims=(-3, -2),
            vector_dim=-1,
        )
        tiles = at.wide.shape[-1] // TILE

        @pl.loop(0, tiles)
        def _tile(i):
            here = pl.ds(i * TILE, TILE)
            narrow = plgpu.load(at.latent_stage.at[stage, self.me, :, here], layout=layout)
            scale = plgpu.load(
                at.scale_stage.at[stage, self.me * tiles + i],
                layout=layout.reduce(1),
                optimized=False,
            )
            scale = lax.broadcast_in_dim(scale, narrow.shape, (0,))
            at.wide[self.me, :, here] = (narrow.astype(jnp.float32) * scale).astype(jnp.bfloat16)

        plgpu.commit_smem()
        plgpu.barrier_arrive(at.latent_free.at[2 * stage + self.me])
        if self.me == 1:
            plgpu.barrier_arrive(at.widened)
        else:
            plgpu.barrier_wait(at.widened)
