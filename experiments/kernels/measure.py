"""How right and how fast a call is, on the device that JAX has.

A call's time is that of many in a row: one program makes a call with each of several inputs, so
that none can be folded into another, and all results are kept, so that none can be left out. The
inputs together are several times the cache: what a call reads comes from memory. Knows nothing
about which calls those are.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tiled import TILE, Tiled, dequantize

CACHE_BYTES = 60 << 20  # no smaller than any Hopper's second-level cache
MOST_BYTES = 16 << 30  # of all inputs and results together
MOST_COPIES = 48


class Timing(NamedTuple):
    """Seconds of a call.

    Attributes:
        seconds: the median, launches included.
        spread: the least and the most.
        kernel_seconds: of its kernels alone, as CUPTI counts them; None where it does not.
        calls: in one program.
    """

    seconds: float
    spread: tuple[float, float]
    kernel_seconds: float | None
    calls: int


def copies(num_bytes: int, seconds: float) -> int:
    """How many inputs: past the cache, for a program of 2 ms, as long as they fit.

    Args:
        num_bytes: of a call's arguments and results.
        seconds: that a call takes at least.
    """
    wanted = max(4, -(-4 * CACHE_BYTES // num_bytes), round(2e-3 / seconds))
    return max(2, min(wanted, MOST_COPIES, MOST_BYTES // num_bytes))


def timed(
    call: Callable, inputs: list[tuple], *, repeats: int = 9, least_s: float = 0.02
) -> Timing:
    """Times a call that has been found to be right.

    Args:
        call: arguments to a result.
        inputs: different arguments.
        repeats: medians are over so many.
        least_s: what a repeat takes, in as many runs of the program as that needs.
    """
    one = jax.jit(call)  # traced and lowered once, however often it is called
    program = jax.jit(lambda inputs: [one(*arguments) for arguments in inputs])
    program = program.lower(inputs).compile()

    def seconds(runs: int) -> float:
        result = None
        started = time.perf_counter()
        for _ in range(runs):
            result = program(inputs)
        jax.block_until_ready(result)
        return time.perf_counter() - started

    seconds(2)
    runs = max(2, round(least_s / seconds(1)))
    taken = [seconds(runs) / (runs * len(inputs)) for _ in range(repeats)]
    alone = _kernel_seconds(program, inputs)
    return Timing(statistics.median(taken), (min(taken), max(taken)), alone, len(inputs))


def _kernel_seconds(program, inputs: list[tuple]) -> float | None:
    if jax.default_backend() != "gpu":
        return None
    from jax.experimental.mosaic.gpu import profiler

    try:
        measure = profiler.measure(program, iterations=3)  # and CUPTI is gone again
        _, milliseconds = measure(inputs)
    except Exception:  # a part of JAX that is not public; wall times remain
        return None
    if milliseconds is None:
        return None
    return statistics.median(milliseconds) / 1e3 / len(inputs)


def error(got, wanted) -> float:
    """The worst block's difference, relative to what it should be: no single tile can hide.

    Args:
        got: arrays and FP8 tiles, in a structure.
        wanted: the same.

    Returns:
        The largest over blocks of 128x128 of norm(got - wanted) / norm(wanted), where a block's
        norm counts as no less than a thousandth of an average one's; NaN if anything is.
    """
    is_tiled = {"is_leaf": lambda x: isinstance(x, Tiled)}
    pairs = zip(jax.tree.leaves(got, **is_tiled), jax.tree.leaves(wanted, **is_tiled), strict=True)
    return float(np.max([_block_error(a, b) for a, b in pairs]))


def sampled_error(a_MK: Tiled, b_NK: Tiled, y_MN: jax.Array, count: int = 16) -> float:
    """How far some numbers of a product are from those of float64 on the host, as a relative norm.

    Of so many rows and columns; it is what other results are held against that is checked.
    """
    rng = np.random.default_rng(0)
    rows, cols = (np.sort(rng.choice(size, count, replace=False)) for size in y_MN.shape)
    blocks = cols if b_NK.scale.shape[0] == b_NK.q.shape[0] else cols // TILE
    a = dequantize(Tiled(a_MK.q[rows], a_MK.scale[rows]))
    b = dequantize(Tiled(b_NK.q[cols], b_NK.scale[blocks]))
    wanted = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    difference = np.asarray(y_MN[rows][:, cols], np.float64) - wanted
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted))


@jax.jit
def _block_error(got, wanted) -> jax.Array:
    if isinstance(got, Tiled):
        got, wanted = dequantize(got), dequantize(wanted)

    def squares(x):
        *lead, rows, cols = x.shape
        edges = [(0, 0)] * len(lead) + [(0, -rows % TILE), (0, -cols % TILE)]
        x = jnp.pad(x, edges)
        x = x.reshape(*lead, x.shape[-2] // TILE, TILE, x.shape[-1] // TILE, TILE)
        return jnp.sum(jnp.square(x), axis=(-3, -1))

    wanted = wanted.astype(jnp.float32)
    difference, norm = squares(got.astype(jnp.float32) - wanted), squares(wanted)
    return jnp.sqrt(jnp.max(difference / jnp.maximum(norm, 1e-6 * jnp.mean(norm))))
