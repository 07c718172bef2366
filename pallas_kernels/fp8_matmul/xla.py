"""`fp8_matmul` where no kernel is known: both operands made wide, and one product.

Exact to the order of float32 sums: an FP8 number times its scale fits float32 to 2^-24. Operands
take four times their bytes; the products of single tiles [k, M, N], which XLA would allocate for
the definition as an einsum, are never built.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.tiled import Tiled, dequantize


def fp8_matmul(a_MK: Tiled, b_NK: Tiled, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """See the package for arguments."""
    a, b = dequantize(a_MK), dequantize(b_NK)
    contract = (((1,), (1,)), ((), ()))
    y_MN = jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)
    return y_MN.astype(out_dtype)
