"""Checksums of arrays that say whether a single bit differs, however the arrays are laid out.

Knows nothing about files. Each element's bits are mixed with its position by a bijection of 32-bit
words, and the words are summed modulo 2**32, in two lanes of different constants. A sum has no
order, so one device and a mesh give the same; a bijection loses nothing, so a change of any one
element changes the sum for certain, and a change of several goes unseen once in 2**64.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

# One row a lane: the odd factor whose powers number the dimensions, two odd factors of the mixing
# and the shift between them (MurmurHash3's finaliser, and Wellons' lowbias32).
_LANES = (
    (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 13),
    (0xB5297A4D, 0x7FEB352D, 0x846CA68B, 15),
)
_BLOCK = 1 << 16  # elements that the host mixes at once: they stay in its cache


def checksums(arrays: dict[str, Any]) -> dict[str, str]:
    """Sums up arrays where they lie.

    Args:
        arrays: name -> array of 1, 2 or 4 bytes an element, of any shape and sharding.

    Returns:
        name -> 16 hexadecimal digits.

    Raises:
        TypeError: for elements of another size.
    """
    for name, array in arrays.items():
        _word(name, array.dtype)
    sums = jax.device_get([_sums_on_device(array) for array in arrays.values()])
    return {name: _text(lanes) for name, lanes in zip(arrays, sums, strict=True)}


def part_sums(arrays: dict[str, Any]) -> dict[str, list[int]]:
    """What this process adds to the sums of arrays that lie on several processes' devices.

    Each element is counted by one process. No device waits for another: programs with sums over
    devices, begun one after the other, may meet in another order elsewhere and wait for ever.

    Returns:
        name -> its two lanes; those of all processes, added modulo 2**32, are `combined`'s.
    """
    found = {}
    for name, array in arrays.items():
        _word(name, array.dtype)
        lanes = [0, 0]
        for data, start in _own_parts(array):
            for lane, value in enumerate(_sums_at(data, start)):
                lanes[lane] = (lanes[lane] + int(value)) % 2**32
        found[name] = lanes
    return found


def combined(parts: Iterable[dict[str, list[int]]]) -> dict[str, str]:
    """`part_sums` of all processes -> `checksums`."""
    total: dict[str, list[int]] = {}
    for part in parts:
        for name, lanes in part.items():
            before = total.get(name, [0, 0])
            total[name] = [(a + b) % 2**32 for a, b in zip(before, lanes, strict=True)]
    return {name: _text(lanes) for name, lanes in total.items()}


def _own_parts(array: Any) -> Iterable[tuple[Any, tuple[int, ...]]]:
    """(data, coordinates of its first element) of the shards whose first copy lies here."""
    if not isinstance(array, jax.Array):
        return [(array, (0,) * array.ndim)] if jax.process_index() == 0 else []
    return [
        (shard.data, tuple(s.start or 0 for s in shard.index))
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]


def _sums_at(data: Any, start: tuple[int, ...]) -> Iterable[Any]:
    if isinstance(data, jax.Array) and all(d.platform != "cpu" for d in data.devices()):
        return jax.device_get(_sums_on_device(data, np.asarray(start, np.uint32)))
    data = np.asarray(data)
    return _sums_on_host(data.view(_word("array", data.dtype)), start)


def host_checksum(array: np.ndarray) -> str:
    """Sums up an array in the host's memory, with little more of it; equals `checksums`."""
    words = array.view(_word("array", array.dtype))
    return _text(_sums_on_host(words, (0,) * array.ndim))


def _word(name: str, dtype: Any) -> np.dtype:
    """The unsigned type of an element's size."""
    dtype = np.dtype(dtype)
    if dtype.itemsize not in (1, 2, 4) or dtype.hasobject:
        raise TypeError(f"{name} is {dtype}; arrays of 1, 2 or 4 bytes an element can be saved")
    return np.dtype(f"u{dtype.itemsize}")


def _text(sums: Iterable[Any]) -> str:
    return "".join(f"{int(lane):08x}" for lane in sums)


@jax.jit  # one program a shape, not one a tree: leaves share few shapes, and XLA compiles slowly
def _sums_on_device(array: Array, start: Any = None) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    if array.dtype == jnp.bool_:
        words = array.astype(jnp.uint32)
    else:
        words = jax.lax.bitcast_convert_type(array, _word("array", array.dtype)).astype(jnp.uint32)
    lanes = []
    for base, first, second, shift in _LANES:
        # Wrapping coordinates, not the flat index: elements 2**32 apart must not look the same.
        key = jnp.uint32(0)
        for dim in range(words.ndim):
            factor = jnp.uint32(pow(base, dim + 1, 1 << 32))
            place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
            key += (place if start is None else place + start[dim]) * factor
        mixed = words ^ key
        mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(first)
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(second)
        lanes.append(mixed ^ (mixed >> 16))
    zero = jnp.uint32(0)
    # Both lanes in one reduction: read once, and on a CPU in vector instructions.
    return jax.lax.reduce(
        tuple(lanes),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        tuple(range(words.ndim)),
    )


def _sums_on_host(words: np.ndarray, start: tuple[int, ...]) -> tuple[int, int]:
    """The two sums of a part whose first element has these coordinates."""
    if words.size > _BLOCK:
        longest = int(np.argmax(words.shape))
        half = words.shape[longest] // 2
        low, high = np.split(words, [half], axis=longest)
        beyond = (*start[:longest], start[longest] + half, *start[longest + 1 :])
        (a, b), (c, d) = _sums_on_host(low, start), _sums_on_host(high, beyond)
        return (a + c) % 2**32, (b + d) % 2**32
    sums = []
    for base, first, second, shift in _LANES:
        key = np.zeros((1,) * words.ndim, np.uint32)
        for dim, length in enumerate(words.shape):
            coordinates = np.arange(start[dim], start[dim] + length, dtype=np.uint64)
            keys = (coordinates * np.uint64(pow(base, dim + 1, 1 << 32))).astype(np.uint32)
            key = key + keys.reshape(-1, *(1,) * (words.ndim - dim - 1))
        mixed = np.array(words, np.uint32)
        mixed ^= key
        mixed ^= mixed >> 16
        mixed *= np.uint32(first)
        mixed ^= mixed >> shift
        mixed *= np.uint32(second)
        mixed ^= mixed >> 16
        sums.append(int(np.sum(mixed, dtype=np.uint32)))
    return sums[0], sums[1]
