"""What several test files measure with, and the packed batches that they measure on."""

import contextlib

import chex
import jax
import numpy as np

# Relative norms. Two float32 programs that sum in another order differ by some 1e-6 here; their
# gradients, which pass through twice as many sums, by some 1e-5.
FLOAT32, FLOAT32_GRADIENT = 1e-5, 1e-4


def distance(got, wanted):
    """The norm of the difference over the norm of what was wanted."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    return np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-6)


def assert_near(got, wanted, tolerance=FLOAT32):
    assert distance(got, wanted) <= tolerance


def assert_trees_near(got, wanted, tolerance=FLOAT32):
    chex.assert_trees_all_equal_structs(got, wanted)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        assert distance(a, b) <= tolerance, jax.tree_util.keystr(path)


def packed_batch(rng, vocab_size, lengths):
    """Rows of documents of the given lengths; what is left of a row is padding."""
    width = max(map(sum, lengths))
    shape = (len(lengths), width)
    batch = {
        "tokens_BT": rng.integers(0, vocab_size, shape).astype(np.int32),
        "targets_BT": np.zeros(shape, np.int32),
        "segments_BT": np.zeros(shape, np.int32),
        "positions_BT": np.zeros(shape, np.int32),
        "weights_BT": np.zeros(shape, np.float32),
    }
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents, 1):
            here = slice(start, start + length)
            batch["segments_BT"][row, here] = number
            batch["positions_BT"][row, here] = np.arange(length)
            batch["weights_BT"][row, start : start + length - 1] = 1.0
            start += length
    batch["targets_BT"][:, :-1] = batch["tokens_BT"][:, 1:]
    return batch


@contextlib.contextmanager
def compilations():
    """The seconds of each program that XLA compiles, or takes from the cache, meanwhile."""
    seen = []

    def hear(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
