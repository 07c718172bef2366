"""The cases of attention: absorbed over a paged cache of latents, and in training.

Knows nothing about compilers, devices or clocks.

B sequences, S positions of each, N heads, T new positions, C latent and R rope width, Z = C + R;
A key and H value width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.kernels.case import Case, normal
from pallas_kernels.latents import Fp8Latents, round_latents
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.mla_decode import mla_decode

PAGE = 64


class AttentionSizes(NamedTuple):
    """What there are cases of.

    Attributes:
        widths: C, R; as in V3, H is a quarter of C, and A that and R.
        decodes: B, S; one query each, for all of `heads`.
        two_queries: the same for two, as in speculation.
        fp8: the same of a cache in FP8.
        heads: N.
        sequences: B, S, N and documents a row, of training.
        compiled: of the ones before, those that the table of resources has.
    """

    widths: tuple[int, int] = (512, 64)
    decodes: tuple[tuple[int, int], ...] = (
        *((1, 1024), (1, 8192), (1, 32_768), (16, 1024), (16, 8192), (16, 32_768)),
        *((128, 1024), (128, 8192), (128, 32_768)),
    )
    two_queries: tuple[tuple[int, int], ...] = ((16, 8192), (128, 8192))
    fp8: tuple[tuple[int, int], ...] = ((1, 32_768), (16, 8192), (128, 8192), (16, 32_768))
    heads: tuple[int, ...] = (16, 128)
    sequences: tuple[tuple[int, int, int, int], ...] = (
        *((4, 1024, 128, 1), (1, 4096, 128, 1), (1, 16_384, 32, 1)),
        *((1, 4096, 128, 4), (1, 32_768, 16, 1)),
    )
    compiled: tuple[tuple[int, ...], ...] = (
        *((1, 32_768), (128, 8192)),
        *((1, 4096, 128, 1), (1, 32_768, 16, 1)),
    )


def attention_cases(sizes: AttentionSizes) -> Iterator[Case]:
    """All of them."""
    for n in sizes.heads:
        for b, s in sizes.decodes:
            yield _decode(sizes, b, s, n, 1, fp8=False)
        for b, s in sizes.two_queries:
            yield _decode(sizes, b, s, n, 2, fp8=False)
        for b, s in sizes.fp8:
            yield _decode(sizes, b, s, n, 1, fp8=True)
    for sequence in sizes.sequences:
        yield from _attention(sizes, *sequence)


def _decode(sizes: AttentionSizes, b: int, s: int, n: int, t: int, *, fp8: bool) -> Case:
    (c, r), pages = sizes.widths, b * s // PAGE

    def make(key):
        q_key, cache_key, page_key = jax.random.split(key, 3)
        (q_BTNZ,) = normal((b, t, n, c + r))(q_key)
        (cache,) = normal((1, pages, PAGE, c + r))(cache_key)
        if fp8:
            latent, rope = round_latents(cache, c)
            cache = Fp8Latents(latent.q, jnp.swapaxes(latent.scale, -1, -2), rope)
        table_BX = jax.random.permutation(page_key, pages).astype(jnp.int32).reshape(b, -1)
        positions_BT = jnp.broadcast_to(s - t + jnp.arange(t, dtype=jnp.int32), (b, t))
        return q_BTNZ, cache, table_BX, jnp.full((b,), s, jnp.int32), positions_BT

    def call(name, q_BTNZ, cache, table_BX, length_B, positions_BT):
        layer, scale = jnp.int32(0), 0.1
        pages = table_BX, length_B, positions_BT
        return mla_decode(q_BTNZ, cache, layer, *pages, scale, value_dim=c, implementation=name)

    return Case(
        op="mla_decode, FP8 cache" if fp8 else "mla_decode",
        shape=f"{b}x{s}, {n} heads, {t} new",
        part="decode",
        sizes=(b, s, n, t, c, r),
        package="pallas_kernels.mla_decode",
        function="mla_decode",
        make=make,
        call=call,
        flops=2.0 * b * t * n * s * (2 * c + r),
        multiplies="bf16",
        compiled=(b, s) in sizes.compiled,
    )


def _attention(sizes: AttentionSizes, b: int, s: int, n: int, documents: int) -> Iterator[Case]:
    c, r = sizes.widths
    a, h = c // 4 + r, c // 4
    packed = f", {documents} documents" if documents > 1 else ""
    length = s // documents
    pairs = b * n * documents * length * length / 2  # of a query and a key, causal

    def make(key):
        q, k, v, d_out = normal((b, s, n, a), (b, s, n, a), (b, s, n, h), (b, s, n, h))(key)
        row = jnp.arange(s, dtype=jnp.int32)
        ids = jnp.broadcast_to(row // length + 1, (b, s)), jnp.broadcast_to(row % length, (b, s))
        return q, k, v, *ids, d_out

    def forward(name, q, k, v, segments, positions, d_out):
        del d_out
        return mla_attention(q, k, v, segments, positions, 0.07, implementation=name)

    def both(name, q, k, v, segments, positions, d_out):
        def attend(q, k, v):
            return mla_attention(q, k, v, segments, positions, 0.07, implementation=name)

        out, backward = jax.vjp(attend, q, k, v)
        return out, *backward(d_out)

    # The backward pass makes scores again: three products as wide as keys, two as values.
    ops = {
        "mla_attention": ("forward", forward, 2 * pairs * (a + h)),
        "mla_attention, both passes": ("backward", both, 2 * pairs * (4 * a + 3 * h)),
    }
    for op, (function, call, flops) in ops.items():
        yield Case(
            op=op,
            shape=f"{b}x{s}, {n} heads{packed}",
            part="attention",
            sizes=(b, s, n, a, h, documents),
            package="pallas_kernels.mla_attention",
            function=function,
            make=make,
            call=call,
            flops=flops,
            multiplies="bf16",
            compiled=(b, s, n, documents) in sizes.compiled,
        )
