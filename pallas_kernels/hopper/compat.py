"""The one module that knows what of Pallas Mosaic GPU is private, or moves between versions.

Written for jax 0.11.2. Knows nothing about kernels.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret import params as interpret_params

SMS = 132  # of an H100 or H200 SXM
# Copies that share a clock look ordered to the race detector, and a race between them is missed.
COPY_CLOCKS = 128


def num_sms() -> int:
    """Multiprocessors of the device that the program being traced is for; else of an H100 SXM."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.num_cores or SMS
    return getattr(jax.devices()[0], "core_count", None) or SMS


@contextlib.contextmanager
def interpreted(*, detect_races: bool = False) -> Iterator[None]:
    """Within it, kernels that are traced run on the CPU: threads, barriers and copies simulated.

    Memory that was never written reads as NaN. Not seen are a missing `wgmma_wait`, for products
    are there as soon as they are asked for, and what the CTAs of a cluster owe each other before
    they copy for each other: here each copies for itself.

    Args:
        detect_races: whether accesses that no barrier orders are looked for (`races_found`).
    """
    params = interpret_params.InterpretGPUParams(
        detect_races=detect_races, num_tma_threads_per_device=COPY_CLOCKS if detect_races else 1
    )
    try:
        with (
            interpret_params.force_gpu_interpret_mode(params),
            mock.patch.object(gpu_callbacks, "wgmma", _multiply),
            mock.patch.object(primitives, "wgmma_accumulator_store", _store),
        ):
            yield
    except Exception:
        # Otherwise the next kernel would meet what the failed one left behind.
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        raise


def races_found() -> bool:
    """Whether the kernel interpreted last, with `detect_races`, had races."""
    return interpret_pallas_call.get_races().races_found


def _store(accumulator, value) -> None:
    """`accumulator[...] = value`, which jax does not interpret, as what `_multiply` takes for it.

    That is a product by the accumulator itself, which is none that a kernel can ask for.
    """
    trees = dict.fromkeys(("acc_transforms_tree", "a_transforms_tree", "b_transforms_tree"))
    primitives.wgmma_ref_p.bind(accumulator, value, accumulator, **trees)


@gpu_callbacks.fail_on_exception
def _multiply(*, token, thread, source_info, **operands):
    """A WGMMA as jax interprets it, and what is lacking there.

    Also interpreted are a left operand from registers and `_store`, and races are looked for
    between products, which read shared memory, and writes.
    """
    shared = gpu_callbacks._get_shared_memory()
    with shared.lock:
        # A product has a clock of its own, as a copy has: that of a warp, for warps are not
        # interpreted beside their warpgroup. It sees what was committed, and who waits for its
        # warpgroup comes after it.
        clock = shared.clocks[thread]
        clock.inc(shared.thread_to_vc_position(thread.warp(0)))
        clock = clock.async_smem_clock.copy()

    def locate(name):
        key = operands[f"{name}_allocation_key_as_array"]
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        transforms = gpu_callbacks._remove_noop_transforms(operands[f"{name}_transforms"])
        return key, shared.access(key, jax.tree.map(int, transforms))

    def load(place):
        numbers, *_ = shared.get_buffer_content(*place, thread)
        assert numbers is not None  # it is where all of it is out of bounds
        return numbers

    def operand(name):
        given = operands[f"{name}_allocation_key_as_array"]
        if given.ndim == 2:  # numbers, rather than the key of a buffer
            return np.asarray(given)
        place = locate(name)
        if shared.detect_races:
            gpu_callbacks.get_races().check_read(thread, clock, *place, source_info=source_info)
        return load(place)

    sums = locate("acc")
    if locate("b") == sums:
        result = operand("a")
    else:
        before = load(sums)
        with np.errstate(all="ignore"):  # too large is infinite, as on the device
            result = before + np.matmul(operand("a"), operand("b"), dtype=before.dtype)
    shared.store_buffer_content(*sums, result, thread)
    return token
