"""The kernel of `product`: persistent, its warpgroups specialised, in Pallas Mosaic GPU.

Of a CTA's three warpgroups one loads by TMA, through a ring of stages, and two multiply, 64 rows
each. In FP8 each 128 of the contraction are summed from zero, then brought to float32 and scaled
there (DeepSeek-V3 report, section 3.3.2), while the other warpgroup's product keeps the tensor
cores busy. The structure is that of DeepGEMM's kernels for sm_90. Knows nothing about operands that
do not fit. Compiled for an H100 and interpreted, not run.

M rows, N columns, K contracted; E matrices b, of which each 128 rows have one; m, n, k tiles of 128
along them.
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
from pallas_kernels.hopper.tiling import ROWS, STEP_BYTES, Tiling
from pallas_kernels.tiled import TILE

MATH_WARPGROUPS = 2
ROWS_EACH = ROWS // MATH_WARPGROUPS  # as many as a WGMMA has
LOADER = MATH_WARPGROUPS  # index of the warpgroup that loads
LOADER_REGISTERS, MATH_REGISTERS = 40, 232  # a thread; 128 * (40 + 2 * 232) of the SM's 65,536
SNAKE = 8  # row tiles that CTAs go through together, column by column


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Refs:
    """What the kernel reads and writes.

    Attributes:
        a: [M, K].
        b: [E, N, K] or [E, K, N].
        out: [M, N].
        a_stage: [stages, 128, step].
        b_stage: [stages, cols, step] or [stages, step, cols].
        out_stage: [2, 64, cols].
        full: barriers [stages]: a stage is loaded.
        free: barriers [stages]: nobody reads a stage any more.
        a_scale: [k, M]; FP8 alone.
        b_scale: [E, n, k]; FP8 alone.
        expert: [m]; None where there is one b.
    """

    a: Any
    b: Any
    out: Any
    a_stage: Any
    b_stage: Any
    out_stage: Any
    full: Any
    free: Any
    a_scale: Any = None
    b_scale: Any = None
    expert: Any = None


class _Tile(NamedTuple):
    """A tile of the result, by indices, and how many steps of the contraction it takes."""

    row: Any
    col: Any
    expert: Any
    steps: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """What is known when the kernel is compiled, and the kernel."""

    row_tiles: int
    col_tiles: int
    steps: int
    experts: int
    tiling: Tiling
    num_sms: int
    in_dtype: Any
    out_dtype: Any
    k_major: bool

    @property
    def step(self) -> int:
        """Numbers of the contraction in a stage."""
        return STEP_BYTES // self.in_dtype.itemsize

    @property
    def share(self) -> int:
        """CTAs that load the same rows of a together."""
        return 2 if self.tiling.pair else 1

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles, those that are loaded together counted once; an odd one lies past the edge."""
        return self.row_tiles, pl.cdiv(self.col_tiles, self.share)

    def build(self, inputs, out_shape):
        """The function of the inputs so named."""
        stages, cols = self.tiling.stages, self.tiling.cols
        b_shape = (cols, self.step) if self.k_major else (self.step, cols)
        readers = {"num_arrivals": MATH_WARPGROUPS, "num_barriers": stages}
        return plgpu.kernel(
            lambda *refs, **scratch: self.run(
                _Refs(**dict(zip((*inputs, "out"), refs, strict=True)), **scratch)
            ),
            out_type=jax.ShapeDtypeStruct(out_shape, self.out_dtype),
            scratch_types={
                "a_stage": swizzled((stages, ROWS, self.step), self.in_dtype),
                "b_stage": swizzled((stages, *b_shape), self.in_dtype),
                "out_stage": swizzled((MATH_WARPGROUPS, ROWS_EACH, cols), self.out_dtype),
                "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                "free": plgpu.ClusterBarrier(collective_axes=("share",), **readers)
                if self.tiling.pair
                else plgpu.Barrier(**readers),
            },
            grid=(min(math.prod(self.grid), pl.cdiv(self.num_sms, self.share)),),
            grid_names=("worker",),
            cluster=(self.share,),
            cluster_names=("share",),
            num_threads=MATH_WARPGROUPS + 1,
            thread_name="warpgroup",
            # Safe: no warpgroup both reads and writes a piece of shared memory.
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
            kernel_name="product",
        )

    def run(self, at: _Refs):
        """The kernel: what each warpgroup does."""
        warpgroup = lax.axis_index("warpgroup")
        loads = warpgroup == LOADER
        lax.cond(loads, lambda: self.load(at), lambda: self.multiply(at, warpgroup))

    def walk(self, at: _Refs, visit):
        """Calls `visit(tile, position)` for every tile of this CTA.

        A position counts the steps of all tiles so far, and so names a stage; `visit` returns that
        after its own. The ring never empties between tiles.

        Returns:
            The position after the last tile.
        """
        tiles = (math.prod(self.grid),)

        @plgpu.nd_loop(tiles, collective_axes="worker", init_carry=jnp.int32(0))
        def position(info, carry):
            # Tiles that run together lie in a square rather than a row: fewer operands, all in L2.
            row, pair = plgpu.planar_snake(info.index[0], self.grid, 0, SNAKE)
            col = pair * self.share + lax.axis_index("share")
            if at.expert is None:
                return visit(_Tile(row, col, 0, self.steps), carry)
            expert, last = at.expert[row], jnp.int32(self.experts - 1)
            steps = lax.select(expert <= last, jnp.int32(self.steps), jnp.int32(0))
            return visit(_Tile(row, col, lax.min(expert, last), steps), carry)

        return position

    def stage(self, position):
        """Index of a position's stage."""
        return lax.rem(position, jnp.int32(self.tiling.stages))

    def load(self, at: _Refs):
        """The warpgroup that fills the stages."""
        plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
        together = "share" if self.tiling.pair else None

        def visit(tile, position):
            rows = pl.ds(tile.row * ROWS, ROWS)
            cols = pl.ds(tile.col * self.tiling.cols, self.tiling.cols)

            def step(i, position):
                stage, part = self.stage(position), pl.ds(i * self.step, self.step)
                a = at.a.at[rows, part]
                b = at.b.at[(tile.expert, *((cols, part) if self.k_major else (part, cols)))]
                plgpu.barrier_wait(at.free.at[stage])
                full = at.full.at[stage]
                plgpu.copy_gmem_to_smem(a, at.a_stage.at[stage], full, collective_axes=together)
                plgpu.copy_gmem_to_smem(b, at.b_stage.at[stage], full)
                if at.a_scale is not None:
                    # The other warpgroups read them from L2, a few steps from now.
                    plgpu.async_prefetch(at.a_scale.at[i, rows])
                return position + 1

            return lax.fori_loop(0, tile.steps, step, position)

        position = self.walk(at, visit)

        # A CTA may not end while the other one of its pair still tells it what is free.
        @pl.loop(0, self.tiling.stages)
        def _wait(i):
            plgpu.barrier_wait(at.free.at[self.stage(position + i)])

    def multiply(self, at: _Refs, warpgroup):
        """A warpgroup that multiplies what is in the stages, and stores the result."""
        plgpu.set_max_registers(MATH_REGISTERS, action="increase")

        @pl.loop(0, self.tiling.stages)
        def _free_at_first(stage):
            plgpu.barrier_arrive(at.free.at[stage])

        def visit(tile, position):
            first_row = warpgroup * ROWS_EACH
            sum_up = self.sum_bf16 if at.a_scale is None else self.sum_fp8
            position, sums = sum_up(at, tile, position, first_row)
            out = at.out_stage.at[warpgroup]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # for the tile before to have left
            for col, part in sums.items():
                out[:, col : col + part.shape[1]] = part.astype(self.out_dtype)
            plgpu.commit_smem()
            rows = pl.ds(tile.row * ROWS + first_row, ROWS_EACH)
            cols = pl.ds(tile.col * self.tiling.cols, self.tiling.cols)
            plgpu.copy_smem_to_gmem(out, at.out.at[rows, cols])
            return position

        self.walk(at, visit)
        plgpu.wait_smem_to_gmem(0)

    def wgmma(self, acc, at: _Refs, stage, first_row):
        """Begins to add a stage's product to a warpgroup's sums."""
        a = at.a_stage.at[stage, pl.ds(first_row, ROWS_EACH)]
        b = at.b_stage.at[stage]
        plgpu.wgmma(acc, a, b.transpose((1, 0)) if self.k_major else b)

    def sum_fp8(self, at: _Refs, tile, position, first_row):
        """(position, the sums of a warpgroup's rows, by their first column).

        They are in parts as wide as columns surely share a scale. Scales do not come through the
        ring: TMA could overwrite what was read by other than a WGMMA only after a fence a step.
        """
        cols = self.tiling.cols
        width = math.gcd(cols, TILE)
        rows = pl.ds(tile.row * ROWS + first_row, ROWS_EACH)
        # Past the edge b is zero, whatever its scale.
        last_block = jnp.int32(at.b_scale.shape[1] - 1)
        blocks = {
            col: lax.min((tile.col * cols + col) // TILE, last_block)
            for col in range(0, cols, width)
        }

        def step(i, carry):
            position, sums = carry
            stage = self.stage(position)
            # Asked for before the wait, to be there when the product is.
            a_scale = plgpu.load(
                at.a_scale.at[i, rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
            )
            b_scale = {col: at.b_scale[tile.expert, block, i] for col, block in blocks.items()}
            plgpu.barrier_wait(at.full.at[stage])

            def multiply(acc):
                self.wgmma(acc, at, stage, first_row)
                return acc[...]

            product = pl.run_scoped(multiply, plgpu.ACC((ROWS_EACH, cols)))
            plgpu.barrier_arrive(at.free.at[stage])
            new = {}
            for col, part in sums.items():
                scale = lax.broadcast_in_dim(a_scale * b_scale[col], part.shape, (0,))
                new[col] = part + product[:, col : col + width] * scale
            return position + 1, new

        zero = jnp.zeros((ROWS_EACH, width), jnp.float32)
        zeros = dict.fromkeys(blocks, plgpu.layout_cast(zero, plgpu.Layout.WGMMA))
        return lax.fori_loop(0, tile.steps, step, (position, zeros))

    def sum_bf16(self, at: _Refs, tile, position, first_row):
        """As `sum_fp8`, in one part: the tensor cores sum the whole contraction."""

        def multiply(acc):
            def step(i, position):
                stage = self.stage(position)
                plgpu.barrier_wait(at.full.at[stage])
                self.wgmma(acc, at, stage, first_row)
                plgpu.wgmma_wait(1)  # only the product just begun still reads its stage

                @pl.when(i > 0)
                def _free():
                    plgpu.barrier_arrive(at.free.at[self.stage(position - 1)])

                return position + 1

            after = lax.fori_loop(0, tile.steps, step, position)
            sums = acc[...]

            @pl.when(tile.steps > 0)
            def _free():
                plgpu.barrier_arrive(at.free.at[self.stage(after - 1)])

            return after, {0: sums}

        return pl.run_scoped(multiply, plgpu.ACC((ROWS_EACH, self.tiling.cols)))
