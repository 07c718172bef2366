"""FP8 with one scale a tensor, taken from earlier steps: what tiles of 128 are compared with.

Delayed scaling as in NVIDIA's Transformer Engine, whose settings these are: E4M3 forward and E5M2
for gradients, the scale from the largest magnitude of the last 16 steps, values beyond it clipped.
A control for studies, on one device and with whole batches. Knows nothing about layers.

M rows, K columns contracted, N columns; the three of a history are the input, the weight and the
gradient of the result.
"""

import dataclasses
import functools
import math
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import grouped_matmul

HISTORY = 16
FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2


@no_type_check  # its leaves may be shapes or gradients
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Delayed:
    """A weight and the largest magnitudes seen at it, in the place of a parameter's array.

    Attributes:
        w: the weight.
        amax: float32 [..., 3, HISTORY], the newest first. In a gradient: the first column is what
            this step has seen.
    """

    w: Array
    amax: Array

    def __getitem__(self, key) -> "Delayed":
        """Itself: a Flax variable is read as `variable[...]`."""
        return self


def histories(model: nnx.Module) -> dict[str, Array]:
    """Zeros for every linear layer of a model, or of its shapes, by the weight's path.

    A history of zeros stands for scales of 1.
    """
    found = {}
    flat = jax.tree_util.tree_leaves_with_path(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    variables = jax.tree.leaves(
        nnx.state(model, nnx.Param), is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    for (path, _), variable in zip(flat, variables, strict=True):
        told = variable.get_metadata()
        if told.get("linear"):
            lead = variable.shape[:1] if told["axes"][0] == "layers" else ()
            found[_name(path)] = jnp.zeros((*lead, 3, HISTORY), jnp.float32)
    return found


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator=".")


def joined(params: Any, amax: dict[str, Array]) -> Any:
    """Parameters with their histories."""

    def join(path, w):
        name = _name(path)
        return Delayed(w, amax[name]) if name in amax else w

    return jax.tree_util.tree_map_with_path(join, params)


def parted(tree: Any) -> tuple[Any, dict[str, Array]]:
    """The inverse of `joined`, of parameters or of their gradients."""

    def is_delayed(node):
        return isinstance(node, Delayed)

    amax = {
        _name(path): node.amax
        for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_delayed)
        if is_delayed(node)
    }
    bare = jax.tree.map(lambda n: n.w if is_delayed(n) else n, tree, is_leaf=is_delayed)
    return bare, amax


def advanced(amax: dict[str, Array], seen: dict[str, Array]) -> dict[str, Array]:
    """Histories a step later."""
    return {
        name: jnp.concatenate([seen[name][..., :1], old[..., :-1]], axis=-1)
        for name, old in amax.items()
    }


# ---- the layer ----------------------------------------------------------------------------------


def linear(
    x: Float[Array, "..."],
    w: Any,
    in_dims: int,
    *,
    dtype: jnp.dtype,
    tile_expert: Int[Array, " _"] | None = None,
) -> Array:
    """Contracts the last `in_dims` dimensions of x with a weight's first, both in FP8.

    Args:
        x: activations; rows of the dispatch buffer, with `tile_expert`.
        w: a weight with its history, or a bare one, which takes scales from what it is given.
        in_dims: how many dimensions are contracted.
        dtype: of the result.
        tile_expert: the expert of each tile of rows, whose weights are the first dimension's.
    """
    wide = w.w if isinstance(w, Delayed) else w
    amax = w.amax if isinstance(w, Delayed) else None
    lead = x.shape[: x.ndim - in_dims]
    experts = () if tile_expert is None else wide.shape[:1]
    rows = math.prod(wide.shape[len(experts) : len(experts) + in_dims])
    x_MK = x.reshape(-1, rows).astype(dtype)
    w_KN = wide.reshape(*experts, rows, -1)
    y_MN = _linear(x_MK, w_KN, amax, tile_expert)
    return y_MN.reshape(*lead, *wide.shape[len(experts) + in_dims :])


@jax.custom_vjp
def _linear(x_MK, w_KN, amax, tile_expert):
    return _forward(x_MK, w_KN, amax, tile_expert)[0]


def _forward(x_MK, w_KN, amax, tile_expert):
    x, seen_x = _rounded(x_MK, amax, 0, FORWARD)
    w, seen_w = _rounded(w_KN, amax, 1, FORWARD)
    y_MN = _product(_wide(x), _wide(w), tile_expert).astype(x_MK.dtype)
    like = jnp.zeros((0,), x_MK.dtype), jnp.zeros((0,), w_KN.dtype)
    return y_MN, (x, w, amax, (seen_x, seen_w), tile_expert, like)


def _backward(saved, dy_MN):
    x, w, amax, (seen_x, seen_w), tile_expert, like = saved
    dy, seen_dy = _rounded(dy_MN, amax, 2, BACKWARD)
    product = functools.partial(_product, tile_expert=tile_expert)
    dx_MK, dw_KN = jax.vjp(product, _wide(x), _wide(w))[1](_wide(dy))
    if amax is not None:
        amax = jnp.zeros_like(amax).at[:, 0].set(jnp.stack([seen_x, seen_w, seen_dy]))
    no = None if tile_expert is None else np.zeros(tile_expert.shape, jax.dtypes.float0)
    return dx_MK.astype(like[0].dtype), dw_KN.astype(like[1].dtype), amax, no


_linear.defvjp(_forward, _backward)


def _rounded(x, amax, which, dtype):
    """((FP8 numbers, their scale), the largest magnitude)."""
    x = x.astype(jnp.float32)
    largest = float(jnp.finfo(dtype).max)
    seen = jnp.max(jnp.abs(x))
    known = seen if amax is None else jnp.max(amax[which])
    scale = jnp.where(known > 0, jnp.maximum(known / largest, 2.0**-126), 1.0)
    # Saturates what is larger than all of the history; what is not a number stays so.
    q = jnp.clip(x / scale, -largest, largest).astype(dtype)
    return (q, jnp.where(jnp.isfinite(seen), scale, jnp.nan)), seen


def _wide(rounded):
    q, scale = rounded
    return q.astype(jnp.float32) * scale


def _product(x_MK, w_KN, tile_expert):
    if tile_expert is None:
        return x_MK @ w_KN
    return grouped_matmul(x_MK, w_KN, tile_expert)
