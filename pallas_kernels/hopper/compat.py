"""The one module that knows what of Pallas Mosaic GPU is private, or moves between versions.

Written for jax 0.11.2. Knows nothing about kernels.
"""

import contextlib
from collections.abc import Iterator

import jax
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
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
        with interpret_params.force_gpu_interpret_mode(params):
            yield
    except Exception:
        # Otherwise the next kernel would meet what the failed one left behind.
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        raise


def races_found() -> bool:
    """Whether the kernel interpreted last, with `detect_races`, had races."""
    return interpret_pallas_call.get_races().races_found
