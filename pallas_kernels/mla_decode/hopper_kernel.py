"""The kernel of `mla_decode` for Hopper: persistent, its warpgroups specialised, in Pallas.

Of a CTA's three warpgroups one loads pages by TMA, through a ring of two stages, and two compute,
64 rows of queries at a time. Each keeps one half of the output's columns in registers, so that a
page is read once: its values are the first columns of its keys. Who computes a page's weights
leaves them for the other in shared memory, where the page's rotated keys were, for these nobody
needs any more. In BF16 one warpgroup has the even pages and the other the odd ones, and the softmax
of one runs while the other's products keep the tensor cores busy (the "seesaw" of FlashMLA). In FP8
there is room for one page made wide: each makes its half of it, and the first has all weights.

Knows nothing about how work is shared out (`hopper_schedule`). Compiled for an H100 and
interpreted, not run.

B sequences, R = T * N rows of queries each; G tiles of r rows, in H groups; L layers, X pages of 64
positions, Z = C + 64 latent and rope widths; c tiles of 128 along C.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.layouts import swizzled
from pallas_kernels.mla_decode import NOTHING
from pallas_kernels.mla_decode.hopper_pages import BY_ROW, ROPE, STAGES, Pages
from pallas_kernels.mla_decode.hopper_schedule import PAGE, ROWS
from pallas_kernels.tiled import TILE

LOADER = 2  # index of the warpgroup that loads
LOADER_REGISTERS, MATH_REGISTERS = 40, 232  # a thread; 128 * (40 + 2 * 232) of the SM's 65,536


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Refs:
    """What the kernel reads and writes.

    Attributes:
        q: [B, R, Z].
        layer: [1].
        table: [B, X].
        limit: [G, 64]; this and the next five are a `Schedule`.
        pages: [G].
        start: [H + 1].
        first: [teams].
        last: [teams].
        share: [1].
        latent: [L, X, 64, C], or in BF16 the whole cache [L, X, 64, Z].
        rope: [L, X, 64, 64]; None in BF16.
        scale: [L, X, c, 64]; None in BF16.
        out: [G, r, C].
        part: [2 * CTAs, r, C].
        lse: [G + 2 * CTAs, 64]: of tiles, then of parts.
        shared: q's rows [64, Z], or an output on its way out.
        latent_stage: [2, 2, 64, C / 2], halves of pages as they are in the cache.
        rope_stage: [2, 64, 64]: rotated keys, then weights.
        scale_stage: [2, c, 64]; FP8 alone.
        wide: [2, 64, C / 2], a page in BF16; FP8 alone.
        top: [2, 64], the greatest score up to a page and so what its weights are relative to.
        total: [2, 64], the sum of the weights that each warpgroup made.
        q_full, q_free: barriers of `shared`.
        latent_full, latent_free: barriers [2 * 2] of the halves of stages' columns.
        rope_full, rope_free: barriers [2].
        ready: barriers [2]: a stage's weights and `top` are there.
        widened: barrier: the second warpgroup's half of `wide` is there.
        summed: barrier: both have left their `total`.
    """

    q: Any
    layer: Any
    table: Any
    limit: Any
    pages: Any
    start: Any
    first: Any
    last: Any
    share: Any
    latent: Any
    out: Any
    part: Any
    lse: Any
    shared: Any
    latent_stage: Any
    rope_stage: Any
    top: Any
    total: Any
    q_full: Any
    q_free: Any
    latent_full: Any
    latent_free: Any
    rope_full: Any
    rope_free: Any
    ready: Any
    summed: Any
    rope: Any = None
    scale: Any = None
    scale_stage: Any = None
    wide: Any = None
    widened: Any = None


class _Piece(NamedTuple):
    """Of a tile, what one CTA does.

    Attributes:
        tile: which.
        sequence: whose rows it has.
        row: the first of them.
        page: the first page, in the sequence's order.
        count: of pages; none for a tile that has none.
        whole: whether that is all of the tile.
        slot: where the part goes if it is not.
    """

    tile: Any
    sequence: Any
    row: Any
    page: Any
    count: Any
    whole: Any
    slot: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """What is known when the kernel is compiled, and the kernel.

    Attributes:
        latent: C, a multiple of 128 up to 512; in FP8 of 256.
        fp8: whether the cache is.
        tiles: of rows, a sequence.
        rows: that a tile's result has; fewer than 64 where a sequence has fewer.
        scale: of scores.
        team: CTAs that go through the same pages together.
        ctas: all of them, whole teams.
    """

    latent: int
    fp8: bool
    tiles: int
    rows: int
    scale: float
    team: int
    ctas: int

    @property
    def half(self) -> int:
        """Columns of the output that a warpgroup has."""
        return self.latent // 2

    def build(self, inputs: tuple[str, ...], num_tiles: int):
        """The function of the inputs so named, that gives `out`, `part` and `lse`."""
        float32, bfloat16 = jnp.float32, jnp.bfloat16
        parts = 2 * self.ctas
        out = {
            "out": jax.ShapeDtypeStruct((num_tiles, self.rows, self.latent), bfloat16),
            "part": jax.ShapeDtypeStruct((parts, self.rows, self.latent), float32),
            "lse": jax.ShapeDtypeStruct((num_tiles + parts, ROWS), float32),
        }
        stored = jnp.float8_e4m3fn if self.fp8 else bfloat16
        scratch = {
            "shared": plgpu.RefUnion(
                swizzled((ROWS, self.latent + ROPE), bfloat16),
                swizzled((2, ROWS, self.half), bfloat16),
                swizzled((2, ROWS, self.half // 2), float32),
            ),
            "latent_stage": swizzled((STAGES, 2, PAGE, self.half), stored),
            "rope_stage": swizzled((STAGES, PAGE, ROPE), bfloat16),
            "top": plgpu.SMEM((STAGES, ROWS), float32),
            "total": plgpu.SMEM((2, ROWS), float32),
            "q_full": plgpu.Barrier(),
            "q_free": plgpu.Barrier(num_arrivals=2),
            "latent_full": plgpu.Barrier(num_arrivals=1 + self.fp8, num_barriers=2 * STAGES),
            "latent_free": plgpu.Barrier(num_barriers=2 * STAGES),
            "rope_full": plgpu.Barrier(num_barriers=STAGES),
            "rope_free": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            "ready": plgpu.Barrier(num_barriers=STAGES),
            "summed": plgpu.Barrier(num_arrivals=2),
        }
        if self.fp8:
            tiles = self.latent // TILE
            scratch["scale_stage"] = plgpu.SMEM((STAGES, tiles, PAGE), float32)
            scratch["wide"] = swizzled((2, PAGE, self.half), bfloat16)
            scratch["widened"] = plgpu.Barrier()
        return plgpu.kernel(
            lambda *refs, **scratch: self.run(
                _Refs(**dict(zip((*inputs, *out), refs, strict=True)), **scratch)
            ),
            out_type=tuple(out.values()),
            scratch_types=scratch,
            grid=(self.ctas,),
            grid_names=("cta",),
            num_threads=3,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=True),
            kernel_name="mla_decode_fp8" if self.fp8 else "mla_decode",
        )

    def run(self, at: _Refs):
        """The kernel: what each warpgroup does."""
        warpgroup = lax.axis_index("warpgroup")

        def attend():
            plgpu.set_max_registers(MATH_REGISTERS, action="increase")
            lax.cond(warpgroup == 0, lambda: self.attend(at, 0), lambda: self.attend(at, 1))

        lax.cond(warpgroup == LOADER, lambda: self.load(at), attend)

    def walk(self, at: _Refs, visit):
        """Calls `visit(piece)` for every piece of this CTA's share."""
        cta, size = lax.axis_index("cta"), jnp.int32(self.team)
        team, member = lax.div(cta, size), lax.rem(cta, size)
        share = at.share[0]
        first = at.first[team]

        @pl.loop(first, at.last[team] + 1)
        def _visit(group):
            tile = group * size + member
            start, end = at.start[group], at.start[group + 1]
            begin = lax.max(team * share, start)
            stop = lax.min(team * share + share, end)
            last_page = lax.min(stop - start, at.pages[tile])
            visit(
                _Piece(
                    tile=tile,
                    sequence=lax.div(tile, jnp.int32(self.tiles)),
                    row=lax.rem(tile, jnp.int32(self.tiles)) * ROWS,
                    page=begin - start,
                    count=lax.max(last_page - (begin - start), jnp.int32(0)),
                    whole=(begin == start) & (stop == end),
                    slot=2 * cta + (group != first).astype(jnp.int32),
                )
            )

    def load(self, at: _Refs):
        """The warpgroup that fills the stages."""
        plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
        layer = at.layer[0]
        q_stage, _, _ = at.shared

        def visit(piece):
            plgpu.barrier_wait(at.q_free)
            rows = at.q.at[piece.sequence, pl.ds(piece.row, ROWS)]
            plgpu.copy_gmem_to_smem(rows, q_stage, at.q_full)

            @pl.loop(0, piece.count)
            def _page(i):
                page = at.table[piece.sequence, piece.page + i]
                stage = lax.rem(i, jnp.int32(STAGES))
                for half in range(2):
                    index = 2 * stage + half
                    plgpu.barrier_wait(at.latent_free.at[index])
                    self.load_latent(at, layer, page, stage, half, at.latent_full.at[index])
                plgpu.barrier_wait(at.rope_free.at[stage])
                if self.fp8:
                    rope = at.rope.at[layer, page]
                else:
                    rope = at.latent.at[layer, page, :, pl.ds(self.latent, ROPE)]
                plgpu.copy_gmem_to_smem(rope, at.rope_stage.at[stage], at.rope_full.at[stage])

        self.walk(at, visit)

        # So that all arrivals at a barrier have been waited for.
        plgpu.barrier_wait(at.q_free)
        for i in range(2 * STAGES):
            plgpu.barrier_wait(at.latent_free.at[i])
        for i in range(STAGES):
            plgpu.barrier_wait(at.rope_free.at[i])

    def load_latent(self, at: _Refs, layer, page, stage, half: int, full):
        """Begins to load half of a page's latents, in FP8 with their scales."""
        source = at.latent.at[layer, page, :, pl.ds(half * self.half, self.half)]
        plgpu.copy_gmem_to_smem(source, at.latent_stage.at[stage, half], full)
        if self.fp8:
            tiles = pl.ds(half * self.half // TILE, self.half // TILE)
            target = at.scale_stage.at[stage, tiles]
            plgpu.copy_gmem_to_smem(at.scale.at[layer, page, tiles], target, full)

    def attend(self, at: _Refs, me: int):
        """A warpgroup that computes; `me` is its number and its half of the columns."""
        pages = Pages(at, me, self.scale, fp8=self.fp8)
        for stage in range(STAGES):
            pages.free(stage)
        plgpu.barrier_arrive(at.q_free)

        def visit(piece):
            limit = plgpu.load(at.limit.at[piece.tile], layout=BY_ROW, optimized=False)
            plgpu.barrier_wait(at.q_full)

            def sum_up(out):
                top, total = pages.sum_up(piece.page, piece.count, limit, out)
                return out[...], top, total

            found = pl.run_scoped(sum_up, plgpu.ACC((ROWS, self.half)))
            self.store(at, me, piece, *found)

        self.walk(at, visit)
        plgpu.wait_smem_to_gmem(0)

    def store(self, at: _Refs, me: int, piece: _Piece, values, top, total):
        """Makes a warpgroup's sums its half of an output, and stores it."""
        at.total[me] = total
        plgpu.barrier_arrive(at.summed)
        plgpu.barrier_wait(at.summed)  # and nobody reads the queries any more
        total += plgpu.load(at.total.at[1 - me], layout=BY_ROW, optimized=False)
        something = total > 0
        total = jnp.where(something, total, 1.0)
        values *= lax.broadcast_in_dim(1 / total, values.shape, (0,))
        if me == 0:
            lse = jnp.where(something, top * math.log(2) + jnp.log(total), NOTHING)
            row = lax.select(piece.whole, piece.tile, at.pages.shape[0] + piece.slot)
            at.lse[row] = lse

        _, rounded, wide = at.shared

        def send(stage, target, first: int):
            plgpu.commit_smem()
            columns = pl.ds(me * self.half + first, stage.shape[-1])
            rows = stage.at[me, pl.ds(0, self.rows)]
            plgpu.copy_smem_to_gmem(rows, target.at[:, columns])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def store_output():
            rounded[me] = values.astype(jnp.bfloat16)
            send(rounded, at.out.at[piece.tile], 0)

        def store_part():
            width = self.half // 2  # as much of float32 as there is room for
            for first in (0, width):
                wide[me] = values[:, first : first + width]
                send(wide, at.part.at[piece.slot], first)

        lax.cond(piece.whole, store_output, store_part)
        plgpu.barrier_arrive(at.q_free)
