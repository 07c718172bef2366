"""`mla_decode` on Hopper's tensor cores. Compiled for an H100 and interpreted, not run.

Makes arguments fit the kernel (`hopper_kernel`), shares out its work (`hopper_schedule`) and joins
what was cut. Knows nothing about registers or shared memory.

B sequences, T queries of N heads each, Z = C + R latent and rope widths, L layers, X pages.
"""

import jax.numpy as jnp

from pallas_kernels.choose import Uncovered
from pallas_kernels.hopper import compat
from pallas_kernels.latents import Fp8Latents, page_size
from pallas_kernels.mla_decode.hopper_combine import combine_parts
from pallas_kernels.mla_decode.hopper_kernel import Decode
from pallas_kernels.mla_decode.hopper_pages import ROPE
from pallas_kernels.mla_decode.hopper_schedule import PAGE, ROWS, make_schedule, team_of

WIDEST = 512  # latent: a half of it is 128 registers a thread
OF_HALVES = 64  # numbers in a row of swizzled shared memory, BF16


def mla_decode(
    q_BTNZ,
    cache_LXSZ,
    layer,
    table_BX,
    length_B,
    positions_BT,
    scale,
    value_dim,
    *,
    num_sms: int | None = None,
):
    """See the package for arguments.

    Args:
        num_sms: CTAs that run at once; None for those of the device.

    Raises:
        Uncovered: for other queries or caches than BF16 and FP8, pages that have not 64 positions,
            rotated keys that are not 64 wide, latents that are no multiple of 128 (FP8: 256) up to
            512, and where there is nothing to do.
    """
    _check(q_BTNZ, cache_LXSZ, value_dim, table_BX)
    b, t, n, z = q_BTNZ.shape
    ctas = num_sms or compat.num_sms()
    team = team_of(t * n, ctas)
    schedule = make_schedule(length_B, positions_BT, heads=n, ctas=ctas)
    tiles = len(schedule.limit_Gr)
    inputs = {
        "q": q_BTNZ.reshape(b, t * n, z),
        "layer": jnp.reshape(layer, (1,)).astype(jnp.int32),
        "table": table_BX,
        **dict(zip(("limit", "pages", "start", "first", "last", "share"), schedule, strict=True)),
    }
    fp8 = isinstance(cache_LXSZ, Fp8Latents)
    names = ("latent", "scale", "rope") if fp8 else ("latent",)
    inputs |= dict(zip(names, cache_LXSZ if fp8 else (cache_LXSZ,), strict=True))
    rows = min(ROWS, t * n + -(t * n) % 8)
    kernel = Decode(
        latent=value_dim,
        fp8=fp8,
        tiles=tiles // b,
        rows=rows,
        scale=float(scale),
        team=team,
        ctas=ctas // team * team,
    )
    out_GrC, part_SrC, lse_r = kernel.build(tuple(inputs), tiles)(*inputs.values())
    out_GrC, lse_Gr = combine_parts(
        schedule, out_GrC, part_SrC, lse_r[:tiles, :rows], lse_r[tiles:]
    )
    out = out_GrC.reshape(b, -1, value_dim)[:, : t * n].reshape(b, t, n, value_dim)
    return out, lse_Gr.reshape(b, -1)[:, : t * n].reshape(b, t, n)


def _check(q_BTNZ, cache, value_dim, table_BX):
    fp8 = isinstance(cache, Fp8Latents)
    dtypes = [x.dtype for x in (q_BTNZ, cache.rope_LXSR if fp8 else cache)]
    if {*dtypes} != {jnp.dtype(jnp.bfloat16)}:
        raise Uncovered(f"queries of {dtypes[0]}, keys of {dtypes[1]}; bfloat16 is taken")
    if fp8 and cache.q_LXSC.dtype != jnp.float8_e4m3fn:
        raise Uncovered(f"latents of {cache.q_LXSC.dtype}; float8_e4m3fn is taken")
    if page_size(cache) != PAGE:
        raise Uncovered(f"pages of {page_size(cache)} positions; {PAGE} are taken")
    rope = q_BTNZ.shape[-1] - value_dim
    if rope != ROPE:
        raise Uncovered(f"rotated keys {rope} wide; {ROPE} is taken")
    multiple = 256 if fp8 else 128
    if value_dim % multiple or not 0 < value_dim <= WIDEST:
        raise Uncovered(f"latents {value_dim} wide; multiples of {multiple} to {WIDEST} are taken")
    if 0 in (*q_BTNZ.shape, *table_BX.shape):
        raise Uncovered(f"queries {q_BTNZ.shape} and a table {table_BX.shape}: nothing to do")
