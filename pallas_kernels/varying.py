"""Which arrays differ from device to device in a `shard_map` that checks it; else nothing.

Knows nothing about what they hold.
"""

from typing import Any

import jax


def alike(arrays: Any) -> Any:
    """What differs by device along an axis for one array is said to do so for all.

    The gradient of what was the same everywhere is then a sum. Outside of `shard_map`, and where it
    does not check, nothing changes.

    Args:
        arrays: a tree.
    """
    varying = [jax.typeof(x).mat.varying for x in jax.tree.leaves(arrays)]
    axes = frozenset().union(*varying)

    def mark(x):
        missing = tuple(sorted(axes - jax.typeof(x).mat.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, arrays)
