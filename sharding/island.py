"""Islands: code that runs on every device with its own part of all arrays, and what moves there.

Everything that moves weights or tokens between devices is written here or in `dispatch`, and moves
by name; no compiler guesses it. Inside an island gradients are taken of the sum over devices of
each one's loss: so a loss is returned in shares, the transpose of a sum over devices is that sum
again, and the gradient of a weight of which each device has a copy is the sum of its parts
(`sum_gradients`). Where no mesh is set, or an axis has size 1, every function here is the identity.

The sequence of a row lies over `context` in a balanced order: cut into 2n chunks, device i has the
chunks i and 2n - 1 - i, so that causal attention is as much work for each (`row_order`). `tensor`
cuts what is left.

B sequences, T positions of this device, S of the whole row, V vocabulary, D width.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from sharding.rules import AxisRules, Layout

Axes = tuple[str, ...]
CONTEXT = "context"


def mesh_sizes() -> dict[str, int]:
    """Devices along each axis of the mesh that is set; empty without one."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def inside(axes: Axes) -> Axes:
    """Those of the axes that this code is an island over, without those of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(a for a in axes if a in mesh.manual_axes and mesh.shape[a] > 1)


def count(axes: Axes) -> int:
    """Devices along these axes together, as seen inside an island; 1 outside."""
    return math.prod(mesh_sizes()[a] for a in inside(axes))


def place(axes: Axes) -> Any:
    """This device's number along these axes, the first of which is the outermost; 0 outside."""
    axes = inside(axes)
    return lax.axis_index(axes) if axes else 0


def run(function: Callable, out_specs: Any, *arguments: Any) -> Any:
    """Calls a function as an island over every axis of the mesh, or plainly where none is set.

    Args:
        function: sees each device's part.
        out_specs: PartitionSpecs of what it returns.
        arguments: arrays; each is cut as it lies.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(*arguments)
    # Unchecked, because kernels cannot say along which axes what they return varies. Tests compare
    # what is said to be the same on all devices, device by device.
    return jax.shard_map(function, out_specs=out_specs, check_vma=False)(*arguments)


def spec_of(x: Any) -> PartitionSpec:
    """How an array lies on the mesh, by its type; of a traced one, too."""
    return jax.typeof(x).sharding.spec


# ---- weights ------------------------------------------------------------------------------------


def whole(w: jax.Array, layout: Layout, kept: tuple[Axes, ...], dtype: Any) -> jax.Array:
    """Gathers a weight of which each device stores a part, in `dtype`.

    Its gradient is summed over those devices in float32, and each keeps its own part: a sum in
    BF16 over many devices would lose what they add.

    Args:
        w: this device's part.
        layout: mesh axes of each dimension.
        kept: axes of each dimension over which it stays apart.
        dtype: what travels.
    """
    gathered = _gathered(layout, kept)
    if not gathered:
        return w.astype(dtype)
    return _whole(w, gathered, jnp.dtype(dtype))


def gather(w: jax.Array, layout: Layout, kept: tuple[Axes, ...], dtype: Any) -> jax.Array:
    """`whole` for code that sees to gradients itself; they go back by `scatter`."""
    return _gather(w, _gathered(layout, kept), jnp.dtype(dtype))


def scatter(dw: jax.Array, layout: Layout, kept: tuple[Axes, ...]) -> jax.Array:
    """Sums the gradients of a whole weight over the devices that store it, each its own part."""
    return _scatter(dw, _gathered(layout, kept))


def _gathered(layout: Layout, kept: tuple[Axes, ...]) -> tuple[tuple[int, Axes], ...]:
    """The dimensions that are gathered, and over which axes."""
    gathered = []
    for dim, (axes, stay) in enumerate(zip(layout, kept, strict=True)):
        apart = inside(tuple(a for a in axes if a not in stay))
        assert axes[len(axes) - len(apart) :] == apart or not apart, "kept axes are the outermost"
        if apart:
            gathered.append((dim, apart))
    return tuple(gathered)


def _gather(w: jax.Array, gathered: tuple, dtype: Any) -> jax.Array:
    w = w.astype(dtype)
    for dim, axes in gathered:
        w = lax.all_gather(w, axes, axis=dim, tiled=True)
    return w


_whole = jax.custom_vjp(_gather, nondiff_argnums=(1, 2))


def _whole_forward(w, gathered, dtype):
    return _gather(w, gathered, dtype), jnp.zeros((0,), w.dtype)


def _scatter(dw: jax.Array, gathered: tuple) -> jax.Array:
    dw = dw.astype(jnp.float32)
    for dim, axes in reversed(gathered):
        dw = lax.psum_scatter(dw, axes, scatter_dimension=dim, tiled=True)
    return dw


def _whole_backward(gathered, dtype, like, dw):
    return (_scatter(dw, gathered).astype(like.dtype),)


_whole.defvjp(_whole_forward, _whole_backward)


def sum_gradients(gradients: Any, specs: Any, rules: AxisRules) -> Any:
    """Adds up the gradients of weights over the devices that have copies of them.

    Args:
        gradients: each device's part.
        specs: how the weights lie.
        rules: over which axes tokens are spread.
    """

    def summed(gradient, spec):
        axes = inside(tuple(a for a in rules.token_axes if a not in _axes_of(spec)))
        return lax.psum(gradient, axes) if axes else gradient

    return jax.tree.map(summed, gradients, specs)


def _axes_of(spec: PartitionSpec) -> set[str]:
    return {a for axes in spec if axes for a in ((axes,) if isinstance(axes, str) else axes)}


def sum_tokens(tree: Any, rules: AxisRules) -> Any:
    """Adds up, over the devices among which tokens are spread, what each says of its own."""
    axes = inside(rules.token_axes)
    return lax.psum(tree, axes) if axes else tree


def max_tokens(tree: Any, rules: AxisRules) -> Any:
    """The largest of what the devices among which tokens are spread say of their own."""
    axes = inside(rules.token_axes)
    return lax.pmax(tree, axes) if axes else tree


# ---- the cache ----------------------------------------------------------------------------------


def gather_heads(q_BTN: jax.Array, axes: Axes) -> jax.Array:
    """The queries [B, T, N, ...] of all heads, which are cut over `axes`."""
    axes = inside(axes)
    return lax.all_gather(q_BTN, axes, axis=2, tiled=True) if axes else q_BTN


def combine_parts(
    out_BTNC: jax.Array, lse_BTN: jax.Array, axes: Axes, heads: Axes = ()
) -> jax.Array:
    """What attention over all keys gives, of which each device along `axes` has some.

    Args:
        out_BTNC: over this device's keys.
        lse_BTN: their log-sum-exp, float32; finite also of no keys.
        axes: over which keys are spread.
        heads: those of the axes along which each device wants its own heads only, as
            `gather_heads` found them.

    Returns:
        As `out_BTNC`, with N of this device's heads.
    """
    axes, heads = inside(axes), inside(heads)
    if not axes:
        return out_BTNC
    assert set(heads) <= set(axes), "heads are cut over some of the devices that have keys"
    weight_BTN = jnp.exp(lse_BTN - lax.pmax(lse_BTN, axes))
    weight_BTN = weight_BTN / lax.psum(weight_BTN, axes)
    sum_BTNC = out_BTNC.astype(jnp.float32) * weight_BTN[..., None]
    if heads:
        sum_BTNC = lax.psum_scatter(sum_BTNC, heads, scatter_dimension=2, tiled=True)
    if others := tuple(a for a in axes if a not in heads):
        sum_BTNC = lax.psum(sum_BTNC, others)
    return sum_BTNC.astype(out_BTNC.dtype)


# ---- tokens -------------------------------------------------------------------------------------


def sum_row(x: jax.Array, rules: AxisRules) -> jax.Array:
    """Adds up, over the devices that share a row, what each says of its own positions."""
    axes = inside(rules.of("seq"))
    return lax.psum(x, axes) if axes else x


def row_devices(rules: AxisRules) -> int:
    """Devices that share a row."""
    return count(rules.of("seq"))


def enter(x_BT: jax.Array, axes: Axes, rules: AxisRules) -> jax.Array:
    """Before heads or hidden units are cut over `axes`: brings together what of the row they cut.

    Args:
        x_BT: [B, T, ...].
        axes: which of them cut the sequence, too, is known by the rules.
        rules: the layout of the sequence.
    """
    shared = inside(tuple(a for a in axes if a in rules.of("seq")))
    return lax.all_gather(x_BT, shared, axis=1, tiled=True) if shared else x_BT


def leave(y_BT: jax.Array, axes: Axes, rules: AxisRules) -> jax.Array:
    """The way back: sums over `axes`, and each device keeps its own positions."""
    shared = inside(tuple(a for a in axes if a in rules.of("seq")))
    other = inside(tuple(a for a in axes if a not in rules.of("seq")))
    if shared:
        y_BT = lax.psum_scatter(y_BT, shared, scatter_dimension=1, tiled=True)
    return lax.psum(y_BT, other) if other else y_BT


def row_order(length: int, parts: int) -> np.ndarray:
    """The balanced order of a row's positions: entry i is the position that lies at place i."""
    chunks = np.arange(length).reshape(2 * parts, -1)
    return np.concatenate([chunks[[i, 2 * parts - 1 - i]].reshape(-1) for i in range(parts)])


def whole_row(x_BT: jax.Array, rules: AxisRules) -> jax.Array:
    """[B, T, ...] of this device to [B, S, ...] of the row, in the order of its positions."""
    inner = tuple(a for a in rules.of("seq") if a != CONTEXT)
    x_BT = enter(x_BT, inner, rules)
    return context_row(x_BT) if CONTEXT in rules.of("seq") else x_BT


def context_row(x_BT: jax.Array) -> jax.Array:
    """`whole_row` of what the other axes have brought together already."""
    parts = count((CONTEXT,))
    if parts == 1:
        return x_BT
    x_BS = lax.all_gather(x_BT, CONTEXT, axis=1, tiled=True)
    # Back in order by moving whole chunks.
    places = np.argsort(row_order(2 * parts, parts))
    chunks = x_BS.reshape(x_BS.shape[0], 2 * parts, -1, *x_BS.shape[2:])
    return jnp.concatenate([chunks[:, place] for place in places], axis=1)


def own_part(x_BS: jax.Array, rules: AxisRules) -> jax.Array:
    """[B, S, ...] of the row, in the order of its positions, to [B, T, ...] of this device."""
    axes = rules.of("seq")
    parts, inner = (
        count((CONTEXT,)) if CONTEXT in axes else 1,
        tuple(a for a in axes if a != CONTEXT),
    )
    if parts > 1:
        x_BS = jnp.concatenate(
            [_chunk(x_BS, first, 2 * parts) for first in context_chunks()], axis=1
        )
    if inside(inner):
        x_BS = _chunk(x_BS, lax.axis_index(inside(inner)), count(inner))
    return x_BS


def _chunk(x_BS: jax.Array, number: Any, parts: int) -> jax.Array:
    length = x_BS.shape[1] // parts
    return lax.dynamic_slice_in_dim(x_BS, number * length, length, axis=1)


def context_chunks() -> tuple[jax.Array, jax.Array]:
    """The numbers of the two chunks of a row, of twice as many as devices, that lie here."""
    here = lax.axis_index(CONTEXT)
    return here, 2 * count((CONTEXT,)) - 1 - here


def shift_row(x_BT: Any, steps: int, rules: AxisRules) -> Any:
    """Moves a row `steps` positions to the left, zeros behind."""
    if row_devices(rules) == 1:
        pad = np.pad if isinstance(x_BT, np.ndarray) else jnp.pad  # of the host's, on the host
        return pad(x_BT[:, steps:], ((0, 0), (0, steps)))
    x_BS = whole_row(x_BT, rules)
    return own_part(jnp.pad(x_BS[:, steps:], ((0, 0), (0, steps))), rules)


def split_tokens(x_UD: jax.Array, axes: Axes, fill: Any = 0) -> jax.Array:
    """This device's part of tokens of which all devices along `axes` have the same.

    Args:
        x_UD: [U, ...]; filled up to whole parts.
        axes: their mesh axes.
        fill: of the rows behind the last.
    """
    axes = inside(axes)
    if not axes:
        return x_UD
    parts = count(axes)
    pad = -x_UD.shape[0] % parts
    x_UD = jnp.pad(x_UD, ((0, pad), *((0, 0),) * (x_UD.ndim - 1)), constant_values=fill)
    length = x_UD.shape[0] // parts
    return lax.dynamic_slice_in_dim(x_UD, lax.axis_index(axes) * length, length, axis=0)


def join_tokens(x_uD: jax.Array, axes: Axes, tokens: int) -> jax.Array:
    """The way back from `split_tokens`."""
    axes = inside(axes)
    return lax.all_gather(x_uD, axes, axis=0, tiled=True)[:tokens] if axes else x_uD


# ---- the vocabulary -----------------------------------------------------------------------------


def lookup(
    table: jax.Array, layout: Layout, tokens_BT: jax.Array, rules: AxisRules, dtype: Any
) -> jax.Array:
    """Looks tokens up in an embedding of which each device stores some rows and columns.

    Rows are gathered, or, where all devices that share them have the same tokens, looked up by
    their owner. Columns stay: the devices that share them exchange their tokens instead, and each
    gets its tokens' columns from the others.

    Args:
        table: this device's part of [V, D].
        layout: its mesh axes.
        tokens_BT: this device's tokens.
        rules: over which axes tokens are spread.
        dtype: of the result; looked up, and its gradient summed, in the table's own.
    """
    rows, columns = inside(layout[0]), inside(layout[1])
    apart = tuple(a for a in rows if a not in rules.token_axes)
    table = whole(table, layout, (apart, columns), table.dtype)
    ids = tokens_BT
    if columns:
        ids = lax.all_gather(ids, columns, axis=0, tiled=True)
    if apart:
        first = lax.axis_index(apart) * table.shape[0]
        here = (ids >= first) & (ids < first + table.shape[0])
        x = jnp.where(here[..., None], table[jnp.where(here, ids - first, 0)], 0)
        x = lax.psum(x, apart)
    else:
        x = table[ids]
    x = x.astype(dtype)
    return lax.all_to_all(x, columns, 0, x.ndim - 1, tiled=True) if columns else x
