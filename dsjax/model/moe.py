"""Fine-grained mixture of experts: route, dispatch, run the experts, sum, add the shared ones.

Knows nothing about attention, or about where the balancing bias is kept.
Source: DeepSeek-V3 report, section 2.1.2 (DeepSeekMoE).

B sequences, T positions, U = B * T tokens, D width, F expert width, E experts, K experts a token,
X rows of the dispatch buffer.
"""

import dataclasses
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt16

from dsjax.config import MoeConfig
from dsjax.model import delayed, fp8, router
from dsjax.model.layers import SwiGlu, contract, read, swiglu, weight
from dsjax.model.layout import layout_of
from dsjax.precision import Precision, Quantized
from pallas_kernels.tiled import TILE
from sharding import island
from sharding.dispatch import PLAN, ROWS, combine, dispatch
from sharding.rules import AxisRules


@no_type_check  # its leaves may be shapes, shardings or flags
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeAux:
    """What one MoE layer tells.

    Attributes:
        load_E: int32 tokens each expert received; padding sends none.
        balance: float32 scalars, the balance statistics summed over rows (without their weights).
        routing_BTK: uint16 chosen experts.
        overflow: int32, tokens that did not fit the exchange between devices.
    """

    load_E: Array
    balance: router.Balance
    routing_BTK: Array
    overflow: Array


class ExpertStack(NamedTuple):
    """The experts of all layers of a stack, and which layer is meant.

    Decoding reads the few experts that a token chose straight out of the stack: a scan that hands
    a layer its own weights copies all of them first.
    """

    w_in_LED2F: Array | Quantized
    w_down_LEFD: Array | Quantized
    layer: Array


class MixtureOfExperts(nnx.Module):
    """Routed experts, dropless through one grouped matmul, and shared experts beside them."""

    def __init__(
        self,
        config: MoeConfig,
        embed_dim: int,
        *,
        std: float,
        precision: Precision,
        rules: AxisRules,
        key: PRNGKeyArray,
    ):
        self.config, self.precision, self.rules = config, precision, rules
        e, f = config.num_experts, config.expert_dim
        key_router, key_in, key_down, key_shared = jax.random.split(key, 4)
        # The router's weight stays float32 whatever the others are kept in (V3 report, 3.3).
        values = std * jax.random.normal(key_router, (embed_dim, e), jnp.float32)
        self.w_router_DE = nnx.Param(values, axes=("embed", None), whole=values.shape)
        self.w_in_ED2F = weight(
            key_in,
            (e, embed_dim, 2 * f),
            ("experts", "embed", "expert_mlp"),
            std=std,
            precision=precision,
        )
        self.w_down_EFD = weight(
            key_down,
            (e, f, embed_dim),
            ("experts", "expert_mlp", "embed"),
            std=std,
            precision=precision,
        )
        if config.num_shared_experts:
            self.shared = SwiGlu(
                embed_dim,
                config.num_shared_experts * f,
                std=std,
                precision=precision,
                rules=rules,
                key=key_shared,
            )

    @jax.named_scope("moe")
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        bias_E: Float[Array, " E"] | None,
        segments_BT: Int[Array, "B T"],
        routing_BTK: UInt16[Array, "B T K"] | None = None,
        expert_stack: ExpertStack | None = None,
    ) -> tuple[Float[Array, "B T D"], MoeAux]:
        """Sends each token to K experts.

        Args:
            x_BTD: normed hidden states.
            bias_E: balancing bias, for selection only.
            segments_BT: 0 marks padding, which goes to no expert.
            routing_BTK: replays these choices; gates still come from the current scores.
            expert_stack: where this layer's experts also lie; read instead of the layer's own
                weights where fewer experts are chosen than there are.

        Returns:
            (output, what the layer tells).
        """
        config = self.config
        b, t, d = x_BTD.shape
        how = {"rules": self.rules, "precision": self.precision}
        logits_BTE = contract(x_BTD, self.w_router_DE, "btd,de->bte", role="router", **how)
        scores_BTE = router.affinities(logits_BTE, config)
        scores_UE = scores_BTE.reshape(b * t, -1)
        real_BT = segments_BT != 0
        if routing_BTK is None:
            expert_UK = router.select(scores_UE, bias_E, config)
        else:
            expert_UK = routing_BTK.reshape(b * t, -1).astype(jnp.int32)
        gates_UK = router.gates(scores_UE, expert_UK, config)

        sent_UK = jnp.where(real_BT.reshape(-1, 1), expert_UK, config.num_experts)
        x_UD = x_BTD.reshape(b * t, d)
        # Where all devices along an axis have the same tokens, each sends its part of them.
        apart = tuple(a for a in self.rules.of("experts") if a not in self.rules.token_axes)
        x_UD, gates_UK = island.split_tokens(x_UD, apart), island.split_tokens(gates_UK, apart)
        sent_UK = island.split_tokens(sent_UK, apart, config.num_experts)
        if expert_stack is not None and self._reads_stack and sent_UK.size <= config.num_experts:
            y_UD, load_E, overflow = self._routed_few(x_UD, gates_UK, sent_UK, expert_stack)
        else:
            y_UD, load_E, overflow = self._routed(x_UD, gates_UK, sent_UK)
        y_UD = island.join_tokens(y_UD, apart, b * t)
        y_BTD = y_UD.reshape(b, t, d)
        if config.num_shared_experts:
            y_BTD = y_BTD + self.shared(x_BTD)
        expert_BTK = expert_UK.reshape(b, t, -1)
        balance = router.balance_loss(scores_BTE, expert_BTK, real_BT, config, self.rules)
        aux = MoeAux(
            load_E=load_E,
            balance=jax.tree.map(jnp.sum, balance),
            routing_BTK=expert_BTK.astype(jnp.uint16),
            overflow=overflow,
        )
        return y_BTD, aux

    @property
    def _exchange(self) -> dict[str, Any]:
        """How tokens reach their experts."""
        rules = self.rules
        return {
            "num_experts": self.config.num_experts,
            "axis": island.inside(rules.of("experts")) or None,
            **rules.exchange.arguments(),
            **self._crossing,
        }

    @property
    def _crossing(self) -> dict[str, Any]:
        """What FP8 changes: rows cross in it, and tiles hold whole tiles of its scales."""
        if self.precision.recipe != "fp8":
            return {}
        told = {"codec": fp8.TO_EXPERTS, "combine_codec": fp8.FROM_EXPERTS}
        return told | {"block": TILE}

    @property
    def _reads_stack(self) -> bool:
        """Whether experts lie whole where they are used."""
        return all(
            layout == kept
            for layout, kept in (
                layout_of(w, self.rules) for w in (self.w_in_ED2F, self.w_down_EFD)
            )
        )

    def _routed(self, x_UD, gates_UK, expert_UK):
        """Dispatches, runs the experts, combines; keeps one [X, 2F] array for the backward pass.

        The gate multiplies the hidden vector, which is the same by linearity and needs no output
        kept for its gradient. The rows of the buffer and the hidden vectors are gathered and
        computed again: no matrix product is.
        """
        rules, precision = self.rules, self.precision
        linear = precision.grouped_linear
        if precision.recipe == "fp8_per_tensor":

            def linear(x_XD, w, tile_expert):
                dtype = precision.compute_dtype
                return delayed.linear(x_XD, w, 1, dtype=dtype, tile_expert=tile_expert)

        if precision.recipe == "fp8":
            x_UD = fp8.as_sent(x_UD)

        def run_fp8(x_UD, gates_UK):
            x_XD, gates_X, load_E, plan = dispatch(x_UD, gates_UK, expert_UK, **self._exchange)
            with jax.named_scope("experts"):
                told = {"rules": rules, "precision": precision}
                w_in, w_down = self.w_in_ED2F, self.w_down_EFD
                y_XD = fp8.experts(x_XD, gates_X, plan.tile_expert, w_in, w_down, **told)
            return fp8.gradient_as_sent(combine(y_XD, plan)), load_E, plan.overflow

        def run_wide(x_UD, gates_UK):
            x_XD, gates_X, load_E, plan = dispatch(x_UD, gates_UK, expert_UK, **self._exchange)
            with jax.named_scope("experts"):
                w_in_ED2F = self._weights(self.w_in_ED2F)
                gate_up_X2F = linear(x_XD, w_in_ED2F, plan.tile_expert)
                gate_up_X2F = checkpoint_name(gate_up_X2F, "expert_gate_up")
                hidden_XF = swiglu(gate_up_X2F)
                hidden_XF = hidden_XF * gates_X[:, None].astype(hidden_XF.dtype)
                w_down_EFD = self._weights(self.w_down_EFD)
                y_XD = linear(hidden_XF, w_down_EFD, plan.tile_expert)
            return combine(y_XD, plan), load_E, plan.overflow

        run = run_fp8 if precision.recipe == "fp8" else run_wide
        if not rules.recomputed:
            keep = jax.checkpoint_policies.save_only_these_names(PLAN, ROWS, "expert_gate_up")
            run = jax.checkpoint(run, policy=keep, prevent_cse=False)
        return run(x_UD, gates_UK)

    def _weights(self, variable):
        if self.precision.recipe == "fp8_per_tensor":
            return variable[...]
        return read(variable, self.rules, self.precision)

    def _routed_few(self, x_UD, gates_UK, expert_UK, stack):
        """`_routed` for a handful of tokens: expert e of layer l is number l * E + e."""
        precision, is_fp8 = self.precision, self.precision.recipe == "fp8"
        layers, num_experts = jax.tree.leaves(stack.w_in_LED2F)[0].shape[:2]  # of this device
        how = self._exchange
        if is_fp8:
            x_UD = fp8.as_sent(x_UD)
            how["block"] = None  # no gradient is taken: tiles may be small
        x_XD, gates_X, load_E, plan = dispatch(x_UD, gates_UK, expert_UK, **how)
        tile_expert = jnp.where(
            plan.tile_expert < num_experts,
            plan.tile_expert + stack.layer * num_experts,
            layers * num_experts,
        )
        w_in, w_down = _joined(stack.w_in_LED2F), _joined(stack.w_down_LEFD)
        with jax.named_scope("experts"):
            if is_fp8:
                told = {"precision": precision}
                y_XD = fp8.few_experts(x_XD, gates_X, tile_expert, w_in, w_down, **told)
            else:
                hidden_XF = swiglu(precision.grouped_linear(x_XD, w_in, tile_expert))
                hidden_XF = hidden_XF * gates_X[:, None].astype(hidden_XF.dtype)
                y_XD = precision.grouped_linear(hidden_XF, w_down, tile_expert)
        return combine(y_XD, plan), load_E, plan.overflow


def _joined(w_LEDF):
    """Layers and experts as one dimension."""
    if isinstance(w_LEDF, Quantized):
        return w_LEDF.joined()
    return w_LEDF.reshape(-1, *w_LEDF.shape[2:])
