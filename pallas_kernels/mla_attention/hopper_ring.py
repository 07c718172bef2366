"""What the two kernels of attention's gradients on Hopper share: all but their mathematics.

A CTA owns 128 rows of a head, queries or keys, and walks the other ones, 64 at a time. Both are of
two widths: what is as wide as a key (queries and keys, A), and what is as wide as a value (values
and the gradients of results, H). Of its three warpgroups one loads by TMA, through a ring of
stages, and two multiply, 64 of the owned rows each. Knows nothing about softmax.

B sequences of S rows, T queries, N heads, I heads of keys and values.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.layouts import swizzled
from pallas_kernels.mla_attention import hopper_tiles as tiles
from pallas_kernels.mla_attention.hopper_spans import Spans

STEP = 64  # rows a stage: the fewest that a swizzled WGMMA contracts
STAGES = 3  # of 40 KiB at widths 192 and 128, beside 80 KiB of what a CTA owns


class Operands(NamedTuple):
    """What gradients are made of.

    Attributes:
        q: [B, T, N, A].
        k: [B, S, I, A].
        v: [B, S, I, H].
        d_out: [B, T, N, H].
        lse: float32 [B, N, T], of the scaled scores, to base 2; T up to whole tiles of 128.
        delta: float32 [B, N, T], the inner products of d_out and the result; as lse.
        spans: what queries see.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    lse: jax.Array
    delta: jax.Array
    spans: Spans


class Refs(NamedTuple):
    """A kernel's shared memory and barriers.

    Attributes:
        own_a: what it owns, [warpgroup, 64, A]; its gradient leaves through here.
        own_h: what it owns, [warpgroup, 64, H].
        own_full: barriers [warpgroup].
        ring_a: what it walks, [stages, 64, A].
        ring_h: what it walks, [stages, 64, H].
        full: barriers [stages]: a stage is loaded.
        free: barriers [stages]: nobody reads a stage any more.
        numbers: float32 of what it walks, [stages, which, 64]; None without.
    """

    own_a: Any
    own_h: Any
    own_full: Any
    ring_a: Any
    ring_h: Any
    full: Any
    free: Any
    numbers: Any = None

    def own(self, warpgroup):
        """A warpgroup's own rows."""
        # The barrier keeps LLVM from computing the dozens of descriptors that WGMMAs of these take
        # once for all steps, which leaves no registers.
        half = lax.optimization_barrier(warpgroup)
        return self.own_a.at[half], self.own_h.at[half]


def build(
    body: Callable,
    at: Operands,
    *,
    out_type: Any,
    owners: tuple[int, int, int],
    name: str,
    numbers: int = 0,
) -> Callable:
    """A kernel.

    Args:
        body: what it does, given operands, results and `Refs`.
        at: of which it takes widths and the dtype.
        out_type: shapes and dtypes of its results.
        owners: sequences, heads, and rows that CTAs own.
        name: of the kernel.
        numbers: how many float32 numbers each of the rows has that it walks.
    """
    a, h, dtype = at.k.shape[-1], at.v.shape[-1], at.q.dtype
    own = tiles.MATH_WARPGROUPS, tiles.ROWS_EACH
    scratch: Mapping[str, Any] = {
        "own_a": swizzled((*own, a), dtype),
        "own_h": swizzled((*own, h), dtype),
        "own_full": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.MATH_WARPGROUPS),
        "ring_a": swizzled((STAGES, STEP, a), dtype),
        "ring_h": swizzled((STAGES, STEP, h), dtype),
        "full": plgpu.Barrier(num_arrivals=3 if numbers else 2, num_barriers=STAGES),
        "free": plgpu.Barrier(num_arrivals=tiles.MATH_WARPGROUPS, num_barriers=STAGES),
    }
    if numbers:
        scratch = {**scratch, "numbers": plgpu.SMEM((STAGES, numbers, STEP), jnp.float32)}
    sequences, heads, rows = owners
    return tiles.kernel(
        lambda *operands, **scratch: body(*operands, Refs(**scratch)),
        out_type=out_type,
        scratch_types=scratch,
        grid=(sequences, heads, pl.cdiv(rows, tiles.ROWS)),
        name=name,
    )


def load(refs: Refs, own: Callable, count: Any, walked: Callable) -> None:
    """The warpgroup that loads.

    Args:
        refs: where to.
        own: given a warpgroup, what it owns: as wide as a key, and as a value.
        count: steps.
        walked: given a step, what is walked, in the order of the rings and the numbers.
    """
    plgpu.set_max_registers(tiles.LOADER_REGISTERS, action="decrease")
    for i in range(tiles.MATH_WARPGROUPS):
        _copy(own(i), (refs.own_a.at[i], refs.own_h.at[i]), refs.own_full.at[i])
    rings = [ring for ring in (refs.ring_a, refs.ring_h, refs.numbers) if ring is not None]

    @pl.loop(0, count)
    def _step(i):
        stage = tiles.stage_of(i, STAGES)

        @pl.when(i >= STAGES)
        def _free():
            plgpu.barrier_wait(refs.free.at[stage])

        _copy(walked(i), [ring.at[stage] for ring in rings], refs.full.at[stage])

    tiles.drain(count, STAGES, refs.free)


def _copy(sources: Sequence[Any], targets: Sequence[Any], full: Any) -> None:
    for source, target in zip(sources, targets, strict=True):
        plgpu.copy_gmem_to_smem(source, target, full)


def product(left: Any, right: Any) -> Any:
    """The product left @ right^T of rows in shared memory, when it is there; float32."""

    def multiply(sums):
        plgpu.wgmma(sums, left, right.transpose((1, 0)))
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((left.shape[0], right.shape[0])))
