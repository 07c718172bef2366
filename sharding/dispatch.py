"""Sends tokens to their experts and sums what comes back.

Rows leave sorted by expert and padded to whole blocks, ready for a grouped matmul; every token
reaches all its experts, none is dropped. This is the local form, on one device; the exchange
between devices stands beside it when there is more than one. Knows nothing about routers.

U tokens, K experts a token, W = U * K assignments, E experts, X rows of the sorted buffer, D width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

# A remat policy that saves this name does not sort again.
PLAN = "dispatch_plan"


class Plan(NamedTuple):
    """Where each assignment went: what `combine` and the grouped matmul need."""

    slot_UK: jax.Array  # int32 row of the buffer; X for an assignment that goes nowhere
    token_X: jax.Array  # int32 token of each row; U for a padding row
    tile_expert: jax.Array  # int32 [X / block]; E for an unused tile
    sizes_E: jax.Array  # int32 tokens of each expert


def block_rows(assignments: int, num_experts: int) -> int:
    """Rows of a tile: a power of two near a 32nd of an expert's mean share, from 1 to 128.

    A tile is the unit of padding: larger ones suit hardware, smaller ones waste fewer rows.
    """
    share = max(1, assignments // (32 * num_experts))
    return min(128, 1 << (share.bit_length() - 1))


def plan_dispatch(expert_UK: Int[Array, "U K"], *, num_experts: int, block: int) -> Plan:
    """Sorts assignments by expert and gives each a row.

    Args:
        expert_UK: int32; `num_experts` or more sends the assignment nowhere (padding tokens).
        num_experts: E.
        block: rows of a tile; a tile holds one expert's rows.

    Returns:
        The plan. X is the worst case, W + E * (block - 1) rounded to whole tiles, so that nothing
        is ever dropped.
    """
    num_tokens, per_token = expert_UK.shape
    assignments = num_tokens * per_token
    busy = min(num_experts, assignments)  # experts that can hold a part-filled tile
    tiles = -(-(assignments + busy * (block - 1)) // block)
    expert_W = jnp.minimum(expert_UK.reshape(-1).astype(jnp.int32), num_experts)
    order_W = jnp.argsort(expert_W, stable=True)
    sorted_W = expert_W[order_W]
    # searchsorted on the sorted list is cheaper than a histogram's scatter-add
    border = jnp.searchsorted(sorted_W, jnp.arange(num_experts + 1))
    border = border.astype(jnp.int32)
    sizes_E = border[1:] - border[:-1]
    last_tile_E = jnp.cumsum(-(-sizes_E // block))
    first_row_E = (last_tile_E - -(-sizes_E // block)) * block
    tile_expert = jnp.searchsorted(
        last_tile_E, jnp.arange(tiles), side="right", method="compare_all"
    ).astype(jnp.int32)
    # Each buffer row finds its assignment by arithmetic, so no scatter of rows is needed.
    expert_X = jnp.repeat(tile_expert, block)
    known_X = jnp.minimum(expert_X, num_experts - 1)
    rank_X = jnp.arange(tiles * block, dtype=jnp.int32) - first_row_E[known_X]
    real_X = (expert_X < num_experts) & (rank_X < sizes_E[known_X])
    assignment_X = order_W[jnp.where(real_X, border[known_X] + rank_X, 0)]
    token_X = jnp.where(real_X, assignment_X // per_token, num_tokens).astype(jnp.int32)
    nowhere = jnp.full((assignments,), tiles * block, jnp.int32)
    rows_X = jnp.arange(tiles * block, dtype=jnp.int32)
    slot_W = nowhere.at[jnp.where(real_X, assignment_X, assignments)].set(rows_X, mode="drop")
    return Plan(slot_W.reshape(num_tokens, per_token), token_X, tile_expert, sizes_E)


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


@jax.named_scope("dispatch")
def dispatch(
    x_UD: Float[Array, "U D"],
    gates_UK: Float[Array, "U K"],
    expert_UK: Int[Array, "U K"],
    *,
    num_experts: int,
) -> tuple[Float[Array, "X D"], Float[Array, " X"], Int[Array, " E"], Plan]:
    """Brings each token's row, and its gate, to the experts it chose.

    Args:
        x_UD: tokens.
        gates_UK: the weight of each choice; it travels along and is applied on the expert's side,
            so that `combine` is a plain sum.
        expert_UK: int32; `num_experts` or more sends the assignment nowhere.
        num_experts: E.

    Returns:
        (x_XD sorted by expert with zero padding rows, gates_X, sizes_E int32, the plan).
    """
    block = block_rows(expert_UK.size, num_experts)
    plan = plan_dispatch(expert_UK, num_experts=num_experts, block=block)
    plan = jax.tree.map(lambda x: checkpoint_name(x, PLAN), plan)
    rows = plan.token_X.shape[0]
    gates_W = gates_UK.reshape(-1)
    gates_X = (
        jnp.zeros((rows,), gates_UK.dtype).at[plan.slot_UK.reshape(-1)].set(gates_W, mode="drop")
    )
    return _send(x_UD, plan.token_X, plan.slot_UK), gates_X, plan.sizes_E, plan


@jax.named_scope("combine")
def combine(y_XD: Float[Array, "X D"], plan: Plan) -> Float[Array, "U D"]:
    """Sums the rows of each token: [X, D] -> [U, D]."""
    return _collect(y_XD, plan.token_X, plan.slot_UK)
