"""The one module that knows what of Pallas Mosaic GPU is private, or moves between versions.

Written for jax 0.11.2. Knows nothing about kernels.
"""

import contextlib
from collections.abc import Iterator

import jax
from jax._src.pallas.mosaic_gpu import core, primitives
from jax._src.pallas.mosaic_gpu.interpret import (
    gpu_callbacks,
    interpret_pallas_call,
    race_detection_state,
)
from jax._src.pallas.mosaic_gpu.interpret import params as interpret_params
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.state.primitives import ref_set

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
            _accumulators_written(),
            _operands_checked(),
        ):
            yield
    except Exception:
        # Otherwise the next kernel would meet what the failed one left behind.
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        raise


@contextlib.contextmanager
def _accumulators_written() -> Iterator[None]:
    """Within it, `accumulator[...] = x` is a store that the interpreter knows."""
    registers = memory.get_memory_space_idx(core.MemorySpace.REGS)
    check = race_detection_state.GPURaceDetectionState.check_write

    def check_others(self, thread, clock, key, *arguments, **keywords):
        if key.memory_space_id != registers:  # which are a thread's own
            check(self, thread, clock, key, *arguments, **keywords)

    with (
        _instead(primitives, "wgmma_accumulator_store", lambda ref, x: ref_set(ref, (), x)),
        _instead(race_detection_state.GPURaceDetectionState, "check_write", check_others),
    ):
        yield


@contextlib.contextmanager
def _operands_checked() -> Iterator[None]:
    """Within it, races are looked for between products, which read shared memory, and writes."""
    multiply = gpu_callbacks.wgmma

    def checked(*, thread, **keywords):
        shared = gpu_callbacks._get_shared_memory()
        if shared.detect_races:
            # A product has a clock of its own, as a copy has. It sees what was committed, and who
            # waits for its warpgroup comes after it.
            with shared.lock:
                clock = shared.clocks[thread]
                clock.inc(shared.vector_clock_size - 1 - shared.thread_to_vc_position(thread))
                clock = clock.async_smem_clock.copy()
            for name in ("a", "b"):
                key = keywords[f"{name}_allocation_key_as_array"]
                key = gpu_callbacks.HostAllocationKey.from_array(key)
                there = gpu_callbacks._remove_noop_transforms(keywords[f"{name}_transforms"])
                access = shared.access(key, jax.tree.map(int, there))
                source = keywords["source_info"]
                races = gpu_callbacks.get_races()
                races.check_read(thread, clock, key, access, source_info=source)
        return multiply(thread=thread, **keywords)

    with _instead(gpu_callbacks, "wgmma", checked):
        yield


@contextlib.contextmanager
def _instead(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def races_found() -> bool:
    """Whether the kernel interpreted last, with `detect_races`, had races."""
    return interpret_pallas_call.get_races().races_found
