"""What jax 0.11.2's interpreter of Mosaic GPU lacks of WGMMA: registers, and races.

It takes no left operand from registers, no sums that the kernel writes, and does not look for races
where a WGMMA reads shared memory. Private of jax, as is `compat`; knows nothing about kernels.
"""

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax._src import callback
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.state.types import AbstractRef

_Interpreter = jaxpr_interpret.JaxprInterpreter
_interpret_wgmma = _Interpreter._interpret_wgmma_ref_p
_commit_smem = plgpu.commit_smem  # also where a test takes it away from kernels


@contextlib.contextmanager
def wgmma_by_loads() -> Iterator[None]:
    """Within it, and within `compat.interpreted`, a WGMMA is loads, a product and a store of sums.

    Its loads are any warpgroup's, and so are seen by the race detector; sums are registers, whose
    stores are not.
    """
    with (
        mock.patch.object(plgpu, "wgmma", _multiply),
        mock.patch.object(primitives, "wgmma_accumulator_store", _store),
        mock.patch.object(_Interpreter, "_interpret_wgmma_ref_p", _interpret),
    ):
        yield


def _multiply(sums, a, b):
    left = a if isinstance(a, jax.Array) else a[...]
    sums[...] = sums[...] + jnp.dot(left, b[...], preferred_element_type=jnp.float32)
    _commit_smem()  # a WGMMA reads as copies write, so that none is owed between them


def _store(sums, value):
    """As a WGMMA of registers, which sums are not: that is how `_interpret` knows it."""
    trees = dict.fromkeys(("acc_transforms_tree", "a_transforms_tree", "b_transforms_tree"), None)
    primitives.wgmma_ref_p.bind(sums, value, sums, **trees)


def _interpret(self, eqn, token, get_invals):
    if isinstance(eqn.invars[1].aval, AbstractRef):
        return _interpret_wgmma(self, eqn, token, get_invals)
    sums, value, _ = get_invals()
    write = functools.partial(_write, source_info=eqn.source_info)
    written = callback.io_callback(
        write,
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        key=sums,
        value=value,
    )
    return written, []


@gpu_callbacks.fail_on_exception
def _write(*, token, mesh_location, thread, key, value, source_info):
    shared = gpu_callbacks._get_shared_memory()
    key = memory.HostAllocationKey.from_array(key)
    where = memory.GPULoggingInfo(mesh_location, thread, source_info)
    shared.store_buffer_content(key, shared.access(key, ()), value, thread, logging_info=where)
    return token
