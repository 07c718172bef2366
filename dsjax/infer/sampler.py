"""From logits to a token: temperature, top-p, or the best one.

Knows nothing about models. B sequences, V vocabulary, in N parts of W tokens.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsjax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the best token. R1 recommends 0.6.
        top_p: keeps the smallest set of tokens with at least this probability. R1 recommends 0.95.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0.0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; it must be finite and at least 0")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p is {self.top_p}; it must lie in (0, 1]")


def row_keys(key: PRNGKeyArray, batch: int, first_row: Int[Array, ""] | int = 0) -> Array:
    """A key for each sequence by its place in the batch, wherever it lies.

    Args:
        key: of this draw.
        batch: sequences here.
        first_row: place of the first of them in the whole batch.
    """
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(first_row + jnp.arange(batch))


def sample(
    logits_BV: Float[Array, "B V"],
    key_B: Array,
    *,
    temperature: Float[Array, ""] | float,
    top_p: Float[Array, ""] | float,
    allowed: int,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws one token a sequence.

    Args:
        logits_BV: float32.
        key_B: of this draw; each sequence has its own, so that its tokens depend on neither the
            other sequences nor the devices they lie on.
        temperature: 0 takes the best token; may be traced, so that it needs no new compilation.
        top_p: may be traced.
        allowed: ids from here on are never drawn (rows of the embedding that no token uses).

    Returns:
        (tokens int32, their log probability float32 after temperature and truncation).
    """
    vocab = logits_BV.shape[-1]
    logits_BV = logits_BV.astype(jnp.float32)
    if allowed < vocab:
        logits_BV = jnp.where(jnp.arange(vocab) < allowed, logits_BV, -jnp.inf)

    def best(logits_BV):
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), jnp.zeros(logits_BV.shape[:1])

    def drawn(logits_BV):
        scaled_BV = logits_BV / temperature
        truncated = jnp.asarray(top_p) < 1.0
        scaled_BV = jax.lax.cond(truncated, lambda x: _truncate(x, top_p), lambda x: x, scaled_BV)
        top_B = scaled_BV.max(axis=-1)
        mass_BV = jnp.exp(scaled_BV - top_B[:, None])
        token_B = _pick(mass_BV, key_B)
        logit_B = jnp.take_along_axis(scaled_BV, token_B[:, None], axis=-1)[:, 0]
        return token_B, logit_B - top_B - jnp.log(mass_BV.sum(axis=-1))

    # A branch, not a selection: a sum over the vocabulary costs more than the best one.
    return jax.lax.cond(jnp.asarray(temperature) == 0.0, best, drawn, logits_BV)


def _pick(mass_BV: jax.Array, key_B: jax.Array) -> jax.Array:
    """One index a row, drawn in proportion to its mass; never one without mass.

    A part of the vocabulary first, then a token in it, each by a random number of its own: noise
    for every token (Gumbel's) costs a tenth of a decode step, and one number would have too few
    bits for the rare ones.
    """
    batch, vocab = mass_BV.shape
    width = 1 << round(math.log2(vocab) / 2)
    mass_BNW = jnp.pad(mass_BV, ((0, 0), (0, -vocab % width))).reshape(batch, -1, width)
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(key_B)
    part_B = _first_above(mass_BNW.sum(axis=-1), uniform_B2[:, 0])
    mass_BW = jnp.take_along_axis(mass_BNW, part_B[:, None, None], axis=1)[:, 0]
    return part_B * width + _first_above(mass_BW, uniform_B2[:, 1])


def _first_above(mass_BN: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first index at which the cumulative mass passes a share of the whole."""
    sum_BN = jnp.cumsum(mass_BN, axis=-1)
    target_B = jnp.minimum(uniform_B * sum_BN[:, -1], jnp.nextafter(sum_BN[:, -1], 0.0))
    return jnp.sum(sum_BN <= target_B[:, None], axis=-1, dtype=jnp.int32)


def _truncate(logits_BV: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Keeps the best tokens until their probability reaches `top_p`."""
    log_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    sorted_BV = -jnp.sort(-log_BV, axis=-1)
    before_BV = jnp.cumsum(jnp.exp(sorted_BV), axis=-1) - jnp.exp(sorted_BV)
    lowest_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(log_BV >= lowest_B1, log_BV, -jnp.inf)
