"""Products for the gradients of weights, contracted over rows, on Hopper's tensor cores.

One persistent kernel in two flavours. FP8: both operands lie along the contraction, with a scale
for every 128 of it; a step's product starts from zero and is scaled by its row and its column when
float32 adds it to the sums (DeepSeek-V3 report, section 3.3.2). BF16: both operands lie as the rows
of a batch do, and tensor cores sum the whole contraction. The contraction falls into groups, each
with a product of its own; the structure is that of DeepGEMM's kernels for it.

Of a CTA's three warpgroups one loads by TMA, through a ring of stages that runs on from tile to
tile, and two multiply, 64 rows each. Two CTAs that need the same columns load half of them each,
for both. Knows nothing about routing or models. Compiled for an H100 and interpreted, not run.

M rows, N columns, K contracted, E groups; k steps of 128 along K.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.choose import Uncovered
from pallas_kernels.hopper import compat
from pallas_kernels.hopper.groups import Groups
from pallas_kernels.hopper.layouts import swizzled
from pallas_kernels.tiled import Tiled, tiles

ROWS, COLS = 128, 192  # of a CTA's tile; more columns spill registers in FP8
ROWS_EACH = ROWS // 2  # of a warpgroup: what one WGMMA has
PART = COLS // 2  # columns that are scaled, and stored, at a time: no registers for more scales
STEP_BYTES = 128  # of the contraction in a stage: a row of swizzled shared memory
FP8_STEP, BF16_STEP = STEP_BYTES, STEP_BYTES // 2
STAGES = 4  # 41 KiB each, beside 48 KiB for results on their way out
LOADER = 2  # index of the warpgroup that loads
LOADER_REGISTERS, MATH_REGISTERS = 40, 232  # a thread; 128 * (40 + 2 * 232) of the SM's 65,536
SNAKE = 8  # row tiles that pairs of CTAs go through together, column by column
EDGE = 64  # sizes of results are padded to: TMA leaves out what is past the edge by swizzled pieces


def fp8(
    a_MK: Tiled,
    b_NK: Tiled,
    groups_E: Groups | None = None,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    num_sms: int | None = None,
) -> jax.Array:
    """Sums a b^T over each group, both in tiles of 1x128 along the contraction.

    Args:
        a_MK: rows of the results.
        b_NK: columns of the results.
        groups_E: in steps of `FP8_STEP`; None for one group of everything.
        out_dtype: float32 or bfloat16.
        num_sms: CTAs that run at once, an even number; None for those of the device.

    Returns:
        [E, M, N], zeros for a group without steps; without groups [M, N].

    Raises:
        Uncovered: for another dtype, or nothing to multiply.
    """
    if {a_MK.q.dtype, b_NK.q.dtype} != {jnp.dtype(jnp.float8_e4m3fn)}:
        raise Uncovered(f"FP8 products of {a_MK.q.dtype} and {b_NK.q.dtype}: float8_e4m3fn only")
    if groups_E is None:
        nothing_E = jnp.zeros((1,), jnp.int32)
        everything = Groups(nothing_E, nothing_E, nothing_E + tiles(a_MK.q.shape[1]))
        return fp8(a_MK, b_NK, everything, out_dtype=out_dtype, num_sms=num_sms)[0]
    a, b = (_pad(x.q, EDGE, FP8_STEP) for x in (a_MK, b_NK))
    # A step's scales of a tile's rows, and of its columns, lie side by side.
    a_scale, b_scale = (_pad(x.scale, EDGE, 1).T for x in (a_MK, b_NK))
    stages = {
        "a_stage": swizzled((STAGES, ROWS, FP8_STEP), a.dtype),
        "b_stage": swizzled((STAGES, COLS, FP8_STEP), b.dtype),
        "a_scale_stage": plgpu.SMEM((STAGES, ROWS), jnp.float32),
        "b_scale_stage": plgpu.SMEM((STAGES, COLS), jnp.float32),
    }
    sizes = a.shape[0], b.shape[0]
    sums_EMN = _run(_fp8, (a, b, a_scale, b_scale), stages, groups_E, sizes, out_dtype, num_sms)
    return sums_EMN[:, : a_MK.q.shape[0], : b_NK.q.shape[0]]


def bf16(
    a_KM: jax.Array, b_KN: jax.Array, groups_E: Groups, *, num_sms: int | None = None
) -> jax.Array:
    """Sums a^T b over each group.

    Args:
        a_KM: bfloat16.
        b_KN: bfloat16.
        groups_E: in steps of `BF16_STEP`.
        num_sms: as in `fp8`.

    Returns:
        float32 [E, M, N]; zeros for a group without steps.

    Raises:
        Uncovered: for another dtype, or nothing to multiply.
    """
    if {a_KM.dtype, b_KN.dtype} != {jnp.dtype(jnp.bfloat16)}:
        raise Uncovered(f"products of {a_KM.dtype} and {b_KN.dtype}: bfloat16 only")
    a, b = (_pad(x, BF16_STEP, EDGE) for x in (a_KM, b_KN))
    stages = {
        "a_stage": swizzled((STAGES, BF16_STEP, ROWS), a.dtype),
        "b_stage": swizzled((STAGES, BF16_STEP, COLS), b.dtype),
    }
    sizes = a.shape[1], b.shape[1]
    sums_EMN = _run(_bf16, (a, b), stages, groups_E, sizes, jnp.float32, num_sms)
    return sums_EMN[:, : a_KM.shape[1], : b_KN.shape[1]]


def _pad(x, *multiples):
    """Zeros past the end of each dimension, up to a multiple."""
    missing = [-size % multiple for size, multiple in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, [(0, count) for count in missing]) if any(missing) else x


def _run(flavour, operands, stages, groups_E, sizes, out_dtype, num_sms):
    """Launches the kernel: `_fp8` or `_bf16`, with a ring of stages for each of its operands."""
    out_dtype = jnp.dtype(out_dtype)
    shape = groups_E.group_E.shape[0], *sizes
    if out_dtype not in (jnp.float32, jnp.bfloat16):
        raise Uncovered(f"a result in {out_dtype}: float32 or bfloat16 only")
    if 0 in (*shape, *operands[0].shape):
        raise Uncovered(f"nothing to multiply: {operands[0].shape} for a result {shape}")
    return plgpu.kernel(
        functools.partial(_kernel, flavour),
        out_type=jax.ShapeDtypeStruct(shape, out_dtype),
        scratch_types={
            **stages,
            "out_stage": swizzled((2, ROWS_EACH, PART), out_dtype),
            "full": plgpu.Barrier(num_arrivals=len(operands), num_barriers=STAGES),
            # Both CTAs write into a stage's columns, so that both must know that it is free.
            "free": plgpu.ClusterBarrier(
                collective_axes=("pair",), num_arrivals=2, num_barriers=STAGES
            ),
        },
        grid=((num_sms or compat.num_sms()) // 2,),
        grid_names=("worker",),
        cluster=(2,),
        cluster_names=("pair",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name=f"weight_gradient{flavour.__name__}",
    )(groups_E, *operands)


class _Tile(NamedTuple):
    """A tile of the results: its group, that one's steps, and where it begins."""

    group: jax.Array
    first_step: jax.Array
    steps: jax.Array
    row: jax.Array
    col: jax.Array


def _kernel(flavour, groups_E, *refs, out_stage, full, free, **stages):
    """Deals out the tiles of all groups, and in a CTA who loads and who multiplies.

    Args:
        flavour: given operands, their stages and the rows of this warpgroup, returns how to load a
            step and how to sum a tile.
        groups_E: `Groups`.
        refs: operands, then the result [E, M, N].
        out_stage: [2, 64, PART], results on their way out.
        full: barriers [stages]: what a stage needs has arrived.
        free: barriers [stages]: nobody reads a stage any more, in either CTA.
        stages: [stages, ...] for each operand.
    """
    *operands, out = refs
    warpgroup = lax.axis_index("warpgroup")
    first_row = warpgroup * ROWS_EACH
    load_step, sum_steps = flavour(operands, first_row, **stages)
    row_pairs, col_tiles = pl.cdiv(out.shape[1], 2 * ROWS), pl.cdiv(out.shape[2], COLS)

    def walk(visit):
        """Calls `visit(tile, position)` for every tile of this CTA.

        A position counts the steps of the tiles before, and so names the next stage: the ring never
        empties between tiles.

        Returns:
            The position after the last tile.
        """
        grid = out.shape[0], row_pairs * col_tiles

        @plgpu.nd_loop(grid, collective_axes="worker", init_carry=jnp.int32(0))
        def position(info, carry):
            rank, index = info.index
            # Tiles that run together lie in a square rather than a row: fewer operands, all in L2.
            row_pair, col = plgpu.planar_snake(index, (row_pairs, col_tiles), 0, SNAKE)
            row = (2 * row_pair + lax.axis_index("pair")) * ROWS
            group, first, steps = (of_E[rank] for of_E in groups_E)
            tile = _Tile(group, first, steps, row, col * COLS)
            visit(tile, carry)
            return carry + tile.steps

        return position

    def stage_of(position):
        return lax.rem(position, jnp.int32(STAGES))

    @pl.when(warpgroup == LOADER)
    def _load():
        plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

        def visit(tile, position):
            @pl.loop(0, tile.steps)
            def _step(i):
                stage = stage_of(position + i)

                @pl.when(position + i >= STAGES)
                def _free():
                    plgpu.barrier_wait(free.at[stage])

                load_step(tile, tile.first_step + i, stage, full.at[stage])

        position = walk(visit)

        # A CTA may not end while the other one of its pair still tells it what is free.
        @pl.loop(lax.max(position - STAGES, jnp.int32(0)), position)
        def _wait(position):
            plgpu.barrier_wait(free.at[stage_of(position)])

    @pl.when(warpgroup != LOADER)
    def _multiply():
        plgpu.set_max_registers(MATH_REGISTERS, action="increase")

        def visit(tile, position):
            def over_steps(add, carry):
                def step(i, carry):
                    stage = stage_of(position + i)
                    plgpu.barrier_wait(full.at[stage])
                    carry = add(stage, carry)
                    plgpu.barrier_arrive(free.at[stage])
                    return carry

                return lax.fori_loop(0, tile.steps, step, carry)

            rows = pl.ds(tile.row + first_row, ROWS_EACH)
            for i, part in enumerate(sum_steps(over_steps)):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # for the part before to have left
                out_stage[warpgroup] = part.astype(out.dtype)
                plgpu.commit_smem()
                cols = pl.ds(tile.col + i * PART, PART)
                plgpu.copy_smem_to_gmem(out_stage.at[warpgroup], out.at[tile.group, rows, cols])

        walk(visit)
        plgpu.wait_smem_to_gmem(0)


def _fp8(operands, first_row, *, a_stage, b_stage, a_scale_stage, b_scale_stage):
    """Each step's product from zero, scaled and added to float32 registers."""
    a_MK, b_NK, a_scale_kM, b_scale_kN = operands
    mine = pl.ds(first_row, ROWS_EACH)

    def load_step(tile, step, stage, full):
        rows, cols = pl.ds(tile.row, ROWS), pl.ds(tile.col, COLS)
        part = pl.ds(step * FP8_STEP, FP8_STEP)
        plgpu.copy_gmem_to_smem(a_MK.at[rows, part], a_stage.at[stage], full)
        plgpu.copy_gmem_to_smem(
            b_NK.at[cols, part], b_stage.at[stage], full, collective_axes="pair"
        )
        plgpu.copy_gmem_to_smem(a_scale_kM.at[step, rows], a_scale_stage.at[stage], full)
        plgpu.copy_gmem_to_smem(b_scale_kN.at[step, cols], b_scale_stage.at[stage], full)

    def load_scales(scale, shape, dim):
        """Scales of rows (0) or columns (1), each in the registers of what it scales."""
        layout = plgpu.Layout.WGMMA.reduce(1 - dim)
        scale = plgpu.load(scale, layout=layout, optimized=False)
        return lax.broadcast_in_dim(scale, shape, (dim,))

    def sum_steps(over_steps):
        def add(stage, parts):
            def multiply(acc):
                plgpu.wgmma(acc, a_stage.at[stage, mine], b_stage.at[stage].transpose((1, 0)))
                return acc[...]

            product = pl.run_scoped(multiply, plgpu.ACC((ROWS_EACH, COLS)))
            sums = []
            for i, part in enumerate(parts):
                cols = slice(i * PART, (i + 1) * PART)
                a_scale = load_scales(a_scale_stage.at[stage, mine], part.shape, 0)
                b_scale = load_scales(b_scale_stage.at[stage, cols], part.shape, 1)
                sums.append(part + product[:, cols] * a_scale * b_scale)
            plgpu.commit_smem()  # TMA writes next where threads, not tensor cores, read the scales
            return sums

        zero = jnp.zeros((ROWS_EACH, PART), jnp.float32)
        return over_steps(add, [plgpu.layout_cast(zero, plgpu.Layout.WGMMA)] * (COLS // PART))

    return load_step, sum_steps


def _bf16(operands, first_row, *, a_stage, b_stage):
    """All steps summed by the tensor cores, from operands with the contraction first."""
    a_KM, b_KN = operands

    def load_step(tile, step, stage, full):
        rows, cols = pl.ds(tile.row, ROWS), pl.ds(tile.col, COLS)
        part = pl.ds(step * BF16_STEP, BF16_STEP)
        plgpu.copy_gmem_to_smem(a_KM.at[part, rows], a_stage.at[stage], full)
        plgpu.copy_gmem_to_smem(
            b_KN.at[part, cols], b_stage.at[stage], full, collective_axes="pair"
        )

    def sum_steps(over_steps):
        def multiply(acc):
            def add(stage, _):
                a_MK = a_stage.at[stage, :, pl.ds(first_row, ROWS_EACH)].transpose((1, 0))
                plgpu.wgmma(acc, a_MK, b_stage.at[stage])
                plgpu.wgmma_wait(0)  # meanwhile the other warpgroup has the tensor cores

            over_steps(add, None)
            return acc[...]

        sums = pl.run_scoped(multiply, plgpu.ACC((ROWS_EACH, COLS)))
        return [sums[:, start : start + PART] for start in range(0, COLS, PART)]

    return load_step, sum_steps
