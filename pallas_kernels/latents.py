"""The latent cache in FP8: 656 bytes a token and layer where BF16 takes 1,152 (C 512, R 64).

The latent in E4M3 with a float32 scale for every 128 of it, the rotated key in BF16, as DeepSeek's
own decoding keeps it (FlashMLA). Knows nothing about pages or attention.

L layers, X pages of S positions, C latent and R rope width, Z = C + R, c tiles of 128 along C.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import quantize
from pallas_kernels.tiled import Tiled, dequantize


class Fp8Latents(NamedTuple):
    """A cache of latents, of all layers and pages.

    Attributes:
        q_LXSC: float8_e4m3fn latents.
        scale_LXcS: float32; those of a tile run along the positions of a page.
        rope_LXSR: rotated keys, in the dtype that the model computes in.
    """

    q_LXSC: jax.Array
    scale_LXcS: jax.Array
    rope_LXSR: jax.Array


# What attention reads: [L, X, S, Z], latent first, or that in FP8.
Latents = jax.Array | Fp8Latents


def round_latents(entries_BTZ: jax.Array, latent_dim: int) -> tuple[Tiled, jax.Array]:
    """Entries as an `Fp8Latents` keeps them.

    Args:
        entries_BTZ: [..., Z].
        latent_dim: C.

    Returns:
        (the latents, q [..., C] and scale [..., c]; the rotated keys [..., R], as they are).
    """
    *lead, _ = entries_BTZ.shape
    latent, rope = entries_BTZ[..., :latent_dim], entries_BTZ[..., latent_dim:]
    q, scale = quantize(latent.reshape(-1, latent_dim), implementation="reference")
    return Tiled(q.reshape(*lead, -1), scale.reshape(*lead, -1)), rope


def read_pages(
    cache: Latents, layer: jax.Array | int, pages: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Entries of some pages of a layer, [*pages.shape, S, Z] in `dtype`; FP8 is made wide."""
    if not isinstance(cache, Fp8Latents):
        return cache[layer, pages].astype(dtype)
    q, scale = cache.q_LXSC[layer, pages], cache.scale_LXcS[layer, pages]
    latent = dequantize(Tiled(q, jnp.swapaxes(scale, -1, -2)), dtype)
    return jnp.concatenate([latent, cache.rope_LXSR[layer, pages].astype(dtype)], axis=-1)


def page_size(cache: Latents) -> int:
    """S."""
    return (cache.q_LXSC if isinstance(cache, Fp8Latents) else cache).shape[2]
