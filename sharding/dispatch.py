"""Sends tokens to their experts and sums what comes back.

Rows leave sorted by expert and padded to whole blocks, ready for a grouped matmul; every token
reaches all its experts, none is dropped. Experts may lie on the devices of a mesh axis: rows then
cross to the devices that hold theirs first, inside a `jax.shard_map`, whose arrays are this
device's; there alone may room be bounded, and what is lost is counted. Knows nothing about routers.

Source of the exchange: DeepSeek-V3 report, section 3.2.2; a token goes to a device once, however
many of its experts lie there.

U tokens, K experts a token, W = U * K assignments, E experts, X rows of the sorted buffer, D width.
Across n devices, e = E / n experts each: U are one device's tokens, of which each goes to at most
J = min(K, n) devices; Y rows to send, Z rows received, k = min(K, e) choices in a received row.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

# A remat policy that saves the first name does not sort again, nor exchange experts and gates; one
# that saves the second too does not exchange rows again, and keeps them as they look on the wire.
PLAN, ROWS = "dispatch_plan", "dispatch_rows"

EXCHANGES = ("dense", "ragged")


@dataclasses.dataclass(frozen=True)
class Codec:
    """How rows look on the wire, forward and backward apart.

    An encoder maps [rows, D] to arrays that have the same rows, each encoded by itself, in any
    widths and dtypes; a decoder maps them back to [rows, D] of the dtype asked for.
    """

    name: str
    encode: Callable[[jax.Array], tuple[jax.Array, ...]]
    decode: Callable[[tuple[jax.Array, ...], jax.typing.DTypeLike], jax.Array]
    encode_gradient: Callable[[jax.Array], tuple[jax.Array, ...]]
    decode_gradient: Callable[[tuple[jax.Array, ...], jax.typing.DTypeLike], jax.Array]


def _as_is(x_XD):
    return (x_XD,)


def _to_bfloat16(x_XD):
    return (x_XD.astype(jnp.bfloat16),)


def _to_dtype(arrays, dtype):
    (x_XD,) = arrays
    return x_XD.astype(dtype)


IDENTITY = Codec("identity", _as_is, _to_dtype, _as_is, _to_dtype)
BF16 = Codec("bf16", _to_bfloat16, _to_dtype, _to_bfloat16, _to_dtype)


@no_type_check  # its leaves may be shapes, shardings or flags
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wire:
    """Which rows cross to which device, and the way back.

    Attributes:
        slot_UJ: int32 row to send of each token and device; Y for one that is not sent.
        token_Y: int32 token of each row to send; U for an unused row.
        out: int32 [n] each, the offsets and sizes of `ragged_all_to_all`; none if dense.
        home: the same for the way back.
        axis: of the mesh; a tuple's first varies slowest.
        received: Z.
        combine_codec: of `combine`.
    """

    slot_UJ: jax.Array
    token_Y: jax.Array
    out: tuple[jax.Array, ...]
    home: tuple[jax.Array, ...]
    axis: str | tuple[str, ...] = dataclasses.field(metadata={"static": True})
    received: int = dataclasses.field(metadata={"static": True})
    combine_codec: Codec = dataclasses.field(metadata={"static": True})


@no_type_check  # its leaves may be shapes, shardings or flags
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each assignment went: what `combine` and the grouped matmul need.

    Where rows cross devices, U, K and E stand for Z, k and e: received rows take the tokens' part.

    Attributes:
        slot_UK: int32 row of the buffer; X for an assignment that goes nowhere.
        token_X: int32 token of each row; U for a padding row.
        tile_expert: int32 [X / block]; E for an unused tile.
        sizes_E: int32 rows that each expert was sent.
        overflow: int32 rows and assignments of this device lost for want of room: 0 without a
            `buffer_factor`; otherwise the caller sums it over devices, and fails if it is not 0.
        wire: how rows crossed; None if they did not.
    """

    slot_UK: jax.Array
    token_X: jax.Array
    tile_expert: jax.Array
    sizes_E: jax.Array
    overflow: jax.Array = dataclasses.field(default_factory=lambda: jnp.zeros((), jnp.int32))
    wire: Wire | None = None


def block_rows(assignments: int, num_experts: int) -> int:
    """Rows of a tile: a power of two near a 32nd of an expert's mean share, from 1 to 128.

    A tile is the unit of padding: larger ones suit hardware, smaller ones waste fewer rows.
    """
    share = max(1, assignments // (32 * num_experts))
    return min(128, 1 << (share.bit_length() - 1))


def plan_dispatch(
    expert_UK: Int[Array, "U K"], *, num_experts: int, block: int, capacity: int | None = None
) -> Plan:
    """Sorts assignments by expert and gives each a row.

    Args:
        expert_UK: int32; `num_experts` or more sends the assignment nowhere (padding tokens).
        num_experts: E.
        block: rows of a tile; a tile holds one expert's rows.
        capacity: assignments for which there must be room; None: all of them.

    Returns:
        The plan. X is the worst case, W + E * (block - 1) rounded to whole tiles, so that nothing
        is ever dropped; with `capacity` in the place of W, `overflow` counts what found no room.
    """
    assignments = expert_UK.size
    busy = min(num_experts, assignments)  # experts that can hold a part-filled tile
    room = assignments if capacity is None else min(assignments, capacity)
    tiles = -(-(room + busy * (block - 1)) // block)
    sorted_W, order_W = _sort(expert_UK, num_experts)
    border = _borders(sorted_W, num_experts)
    sizes_E = border[1:] - border[:-1]
    last_tile_E = jnp.cumsum(-(-sizes_E // block))
    first_row_E = (last_tile_E - -(-sizes_E // block)) * block
    tile_expert = jnp.searchsorted(
        last_tile_E, jnp.arange(tiles), side="right", method="compare_all"
    ).astype(jnp.int32)
    expert_X = jnp.repeat(tile_expert, block)
    rows_X = jnp.arange(tiles * block, dtype=jnp.int32)
    rank_X = rows_X - first_row_E[jnp.minimum(expert_X, num_experts - 1)]
    slot_UK, token_X = _lay(expert_UK.shape, order_W, border, expert_X, rank_X, sizes_E)
    plan = Plan(slot_UK, token_X, tile_expert, sizes_E)
    if room < assignments:
        lost = border[-1] - jnp.sum(token_X < expert_UK.shape[0], dtype=jnp.int32)
        plan = dataclasses.replace(plan, overflow=lost)
    return plan


def _sort(group_UK, groups):
    """Group numbers in order, `groups` for nowhere, and whose they are: both int32 [W]."""
    group_W = jnp.minimum(group_UK.reshape(-1).astype(jnp.int32), groups)
    order_W = jnp.argsort(group_W, stable=True)
    return group_W[order_W], order_W


def _borders(sorted_W, groups):
    """Where each group begins, and the last one ends: int32 [groups + 1]."""
    # searchsorted on the sorted list is cheaper than a histogram's scatter-add
    return jnp.searchsorted(sorted_W, jnp.arange(groups + 1)).astype(jnp.int32)


def _lay(shape, order_W, border, group_X, rank_X, sizes):
    """The row of each assignment and the token of each row, from each row's group and rank in it.

    Rows past their group's size are unused, as are those of no group.
    """
    num_tokens, per_token = shape
    assignments, rows, groups = num_tokens * per_token, group_X.shape[0], sizes.shape[0]
    # Each row finds its assignment by arithmetic, so no scatter of rows is needed.
    known_X = jnp.minimum(group_X, groups - 1)
    real_X = (group_X < groups) & (rank_X < sizes[known_X])
    assignment_X = order_W[jnp.where(real_X, border[known_X] + rank_X, 0)]
    token_X = jnp.where(real_X, assignment_X // per_token, num_tokens).astype(jnp.int32)
    nowhere_W = jnp.full((assignments,), rows, jnp.int32)
    rows_X = jnp.arange(rows, dtype=jnp.int32)
    slot_W = nowhere_W.at[jnp.where(real_X, assignment_X, assignments)].set(rows_X, mode="drop")
    return slot_W.reshape(shape), token_X


def plan_exchange(
    expert_UK: Int[Array, "U K"],
    *,
    num_experts: int,
    axis: str | tuple[str, ...],
    exchange: str,
    room: int,
    combine_codec: Codec,
) -> tuple[Wire, Int[Array, ""]]:
    """Decides which rows cross to which device, each token once to each.

    Args:
        expert_UK: int32; `num_experts` or more sends the assignment nowhere.
        num_experts: E.
        axis: of the mesh, over which the experts lie in order.
        exchange: of `EXCHANGES`.
        room: a device receives n * room rows: `room` from each (dense), or as many from all
            together, those of the first devices first (ragged).
        combine_codec: of `combine`.

    Returns:
        (the wire, int32 rows that this device does not send because there is no room for them).
    """
    n = jax.lax.axis_size(axis)
    device_UJ = _devices(expert_UK, num_experts, n)
    sorted_W, order_W = _sort(device_UJ, n)
    border = _borders(sorted_W, n)
    count_n = border[1:] - border[:-1]
    if exchange == "dense":
        out, home = (), ()
        sent_n = jnp.minimum(count_n, room)
        device_Y = jnp.repeat(jnp.arange(n, dtype=jnp.int32), room)
        rank_Y = jnp.tile(jnp.arange(room, dtype=jnp.int32), n)
    else:
        out, home = _segments(count_n, n * room, axis)
        sent_n = out[1]
        device_Y = sorted_W
        rank_Y = jnp.arange(sorted_W.size, dtype=jnp.int32) - border[device_Y]
    slot_UJ, token_Y = _lay(device_UJ.shape, order_W, border, device_Y, rank_Y, sent_n)
    wire = Wire(slot_UJ, token_Y, out, home, axis, n * room, combine_codec)
    return wire, jnp.sum(count_n - sent_n)


def _devices(expert_UK, num_experts, n):
    """The devices of a token's experts, once each: int32 [U, J], n for none."""
    device_UK = jnp.minimum(expert_UK.astype(jnp.int32), num_experts) // (num_experts // n)
    device_UK = jnp.sort(device_UK, axis=1)
    again_UK = jnp.pad(device_UK[:, 1:] == device_UK[:, :-1], ((0, 0), (1, 0)))
    return jnp.sort(jnp.where(again_UK, n, device_UK), axis=1)[:, : min(expert_UK.shape[1], n)]


def _segments(count_n, received, axis):
    """Offsets and sizes for `ragged_all_to_all`, out and home: int32 [n] each.

    Where rows lie here, how many go, where they will lie there, how many come. Both sides keep
    rows in the order of the device at the other end.
    """
    me = jax.lax.axis_index(axis)
    count_nn = jax.lax.all_gather(count_n, axis)  # [from, to]
    start_nn = jnp.cumsum(count_nn, axis=1) - count_nn  # among the sender's rows
    place_nn = jnp.minimum(jnp.cumsum(count_nn, axis=0) - count_nn, received)  # the receiver's
    size_nn = jnp.minimum(count_nn, received - place_nn)
    out = (start_nn[me], size_nn[me], place_nn[me], size_nn[:, me])
    home = (place_nn[:, me], size_nn[:, me], start_nn[:, me], size_nn[me])
    return out, home


@jax.custom_vjp
def _send(x_UD: jax.Array, token_X: jax.Array, slot_UK: jax.Array) -> jax.Array:
    """Gathers rows; its transpose is a gather too, where autodiff would scatter."""
    return x_UD.at[token_X].get(mode="fill", fill_value=0)


def _send_forward(x_UD, token_X, slot_UK):
    return _send(x_UD, token_X, slot_UK), (token_X, slot_UK)


def _send_backward(saved, dx_XD):
    token_X, slot_UK = saved
    return _collect(dx_XD, token_X, slot_UK), _no_gradient(token_X), _no_gradient(slot_UK)


@jax.custom_vjp
def _collect(y_XD: jax.Array, token_X: jax.Array, slot_UK: jax.Array) -> jax.Array:
    """Sums each token's rows; the transpose of `_send`."""
    parts = (y_XD.at[slot_UK[:, k]].get(mode="fill", fill_value=0) for k in range(slot_UK.shape[1]))
    return functools.reduce(jnp.add, parts)


def _collect_forward(y_XD, token_X, slot_UK):
    return _collect(y_XD, token_X, slot_UK), (token_X, slot_UK)


def _collect_backward(saved, dy_UD):
    token_X, slot_UK = saved
    return _send(dy_UD, token_X, slot_UK), _no_gradient(token_X), _no_gradient(slot_UK)


def _no_gradient(x: jax.Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)


_send.defvjp(_send_forward, _send_backward)
_collect.defvjp(_collect_forward, _collect_backward)


def _cross(x_Y, segments, rows, wire, fill=0):
    """Brings rows to the other devices; how many come is static."""
    if not segments:
        return jax.lax.all_to_all(x_Y, wire.axis, 0, 0, tiled=True)
    output = jnp.full((rows, *x_Y.shape[1:]), fill, x_Y.dtype)
    return jax.lax.ragged_all_to_all(x_Y, output, *segments, axis_name=wire.axis)


def _to_experts(x_UD, wire, fill=0):
    """Tokens' rows to the devices of their experts: [U, D] -> [Z, D], `fill` in unused rows."""
    x_YD = x_UD.at[wire.token_Y].get(mode="fill", fill_value=fill)
    return _cross(x_YD, wire.out, wire.received, wire, fill)


def _encoded_to_experts(x_UD, wire, encode, decode):
    # Tokens are encoded before they are gathered: they are fewer than the rows to send.
    arrays = tuple(_to_experts(x, wire) for x in encode(x_UD))
    return decode(tuple(checkpoint_name(x, ROWS) for x in arrays), x_UD.dtype)


def _encoded_home(y_ZD, wire, encode, decode):
    rows = wire.token_Y.shape[0]
    y_YD = decode(tuple(_cross(y, wire.home, rows, wire) for y in encode(y_ZD)), y_ZD.dtype)
    return _collect(y_YD, wire.token_Y, wire.slot_UJ)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _go(x_UD: jax.Array, wire: Wire, codec: Codec) -> jax.Array:
    """Tokens' rows to the devices of their experts: [U, D] -> [Z, D]."""
    return _encoded_to_experts(x_UD, wire, codec.encode, codec.decode)


def _go_forward(x_UD, wire, codec):
    # Not by `_go`, in which a remat policy would not see the name.
    return _encoded_to_experts(x_UD, wire, codec.encode, codec.decode), wire


def _go_backward(codec, wire, dx_ZD):
    dx_UD = _encoded_home(dx_ZD, wire, codec.encode_gradient, codec.decode_gradient)
    return dx_UD, jax.tree.map(_no_gradient, wire)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _return(y_ZD: jax.Array, wire: Wire, codec: Codec) -> jax.Array:
    """The transpose of `_go`: rows back to where their tokens live, and summed."""
    return _encoded_home(y_ZD, wire, codec.encode, codec.decode)


def _return_forward(y_ZD, wire, codec):
    return _encoded_home(y_ZD, wire, codec.encode, codec.decode), wire


def _return_backward(codec, wire, dy_UD):
    dy_ZD = _encoded_to_experts(dy_UD, wire, codec.encode_gradient, codec.decode_gradient)
    return dy_ZD, jax.tree.map(_no_gradient, wire)


_go.defvjp(_go_forward, _go_backward)
_return.defvjp(_return_forward, _return_backward)


@jax.named_scope("dispatch")
def dispatch(
    x_UD: Float[Array, "U D"],
    gates_UK: Float[Array, "U K"],
    expert_UK: Int[Array, "U K"],
    *,
    num_experts: int,
    axis: str | tuple[str, ...] | None = None,
    exchange: str = "dense",
    codec: Codec = IDENTITY,
    combine_codec: Codec = IDENTITY,
    buffer_factor: float | None = None,
    block: int | None = None,
) -> tuple[Float[Array, "X D"], Float[Array, " X"], Int[Array, " E"], Plan]:
    """Brings each token's row, and its gate, to the experts it chose.

    Args:
        x_UD: tokens; of this device, with an `axis`.
        gates_UK: the weight of each choice; it travels along and is applied on the expert's side,
            so that `combine` is a plain sum.
        expert_UK: int32; `num_experts` or more sends the assignment nowhere.
        num_experts: E, over all devices.
        axis: of the enclosing `jax.shard_map(..., check_vma=False)`, over which experts lie in
            order; the rows returned are for this device's E / n, numbered from 0. None, or an axis
            of size 1: no row leaves its device, and what follows has no effect.
        exchange: "dense" sends buffers padded to the most that may be needed; "ragged" sends only
            what there is (not on CPU).
        codec: of rows on their way to the experts, and of their gradients on the way back. In V3
            rows go in FP8 and gradients come back in BF16.
        combine_codec: of results on their way back in `combine`, and of their gradients on the way
            to the experts. In V3 results come in BF16 and gradients go in FP8.
        buffer_factor: makes room for so many times an even router's share, not for the worst case:
            min(U, factor * U * min(K, n) / n) rows from a device to another, and factor * U * K
            assignments to the experts of a device. `overflow` of the plan counts what is lost.
        block: rows of a tile; None takes `block_rows`.

    Returns:
        (x_XD sorted by expert with zero padding rows, gates_X, sizes_E int32 choices of each of
        all E experts by these tokens, the plan).

    Raises:
        ValueError: for an unknown exchange, a factor that is not positive, or experts that the
            devices of the axis cannot share equally.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"unknown exchange {exchange!r}; known: {', '.join(EXCHANGES)}")
    if buffer_factor is not None and not buffer_factor > 0:
        raise ValueError(f"buffer_factor must be positive, not {buffer_factor}")
    n = 1 if axis is None else jax.lax.axis_size(axis)
    if num_experts % n:
        raise ValueError(f"{num_experts} experts do not divide among {n} devices of {axis!r}")
    num_tokens, per_token = expert_UK.shape
    local_experts = num_experts // n
    # What comes to a device from all others is, on average, as much as it sends.
    block = block or block_rows(expert_UK.size, local_experts)
    if axis is None or n == 1:
        plan = _named(plan_dispatch(expert_UK, num_experts=num_experts, block=block))
        return *_sorted_rows(x_UD, gates_UK, plan), plan.sizes_E, plan

    room, capacity = num_tokens, None
    if buffer_factor is not None:
        share = num_tokens * min(per_token, n) / n
        room = max(1, min(num_tokens, math.ceil(buffer_factor * share)))
        capacity = max(1, math.ceil(buffer_factor * expert_UK.size))
    wire, unsent = plan_exchange(
        expert_UK,
        num_experts=num_experts,
        axis=axis,
        exchange=exchange,
        room=room,
        combine_codec=combine_codec,
    )
    wire = _named(wire)
    # A row's choices travel whole; its receiver picks those that are its own.
    expert_ZK = _to_experts(expert_UK.astype(jnp.int32), wire, fill=num_experts)
    expert_ZK = expert_ZK - local_experts * jax.lax.axis_index(axis)
    mine_ZK = (expert_ZK >= 0) & (expert_ZK < local_experts)
    expert_ZK = _named(jnp.where(mine_ZK, expert_ZK, local_experts))
    gates_ZK = _named(_go(gates_UK, wire, IDENTITY))
    expert_Zk, gates_Zk = _merge(expert_ZK, gates_ZK, local_experts)
    plan = plan_dispatch(expert_Zk, num_experts=local_experts, block=block, capacity=capacity)
    plan = _named(dataclasses.replace(plan, overflow=plan.overflow + unsent))
    x_XD, gates_X = _sorted_rows(_go(x_UD, wire, codec), gates_Zk, plan)
    sorted_W, _ = _sort(expert_UK, num_experts)
    sizes_E = jnp.diff(_borders(sorted_W, num_experts))
    return x_XD, gates_X, sizes_E, dataclasses.replace(plan, wire=wire)


def _named(tree):
    return jax.tree.map(lambda x: checkpoint_name(x, PLAN), tree)


def _merge(expert_ZK, gates_ZK, num_experts):
    """One column an expert where these are fewer than choices; gates of one chosen twice add."""
    if num_experts >= expert_ZK.shape[1]:
        return expert_ZK, gates_ZK
    experts_e = jnp.arange(num_experts, dtype=jnp.int32)
    chosen_ZKe = expert_ZK[:, :, None] == experts_e
    gates_Ze = jnp.sum(jnp.where(chosen_ZKe, gates_ZK[:, :, None], 0), axis=1)
    return jnp.where(jnp.any(chosen_ZKe, axis=1), experts_e, num_experts), gates_Ze


def _sorted_rows(x_UD, gates_UK, plan):
    rows = plan.token_X.shape[0]
    gates_W = gates_UK.reshape(-1)
    gates_X = (
        jnp.zeros((rows,), gates_UK.dtype).at[plan.slot_UK.reshape(-1)].set(gates_W, mode="drop")
    )
    return _send(x_UD, plan.token_X, plan.slot_UK), gates_X


@jax.named_scope("combine")
def combine(y_XD: Float[Array, "X D"], plan: Plan) -> Float[Array, "U D"]:
    """Sums the rows of each token, where it lives: [X, D] -> [U, D]."""
    y_UD = _collect(y_XD, plan.token_X, plan.slot_UK)
    return y_UD if plan.wire is None else _return(y_UD, plan.wire, plan.wire.combine_codec)
