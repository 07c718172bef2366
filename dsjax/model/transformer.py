"""The whole decoder: embedding, stacks of scanned blocks, final norm, head, MTP.

One forward serves training, rollout and serving: with a cache it is a prefill or a decode step.
Knows nothing about losses, optimizers, files or meshes (it sees `rules` only).

B sequences, T positions, D width, V vocabulary, L layers of a stack, E experts, K experts a token.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt16

from dsjax.config import Config, ModelConfig, MoeConfig
from dsjax.model.block import Block
from dsjax.model.cache import Cache
from dsjax.model.layers import norm_scale, rms_norm, weight
from dsjax.model.layout import layout_of
from dsjax.model.moe import ExpertStack
from dsjax.model.mtp import MtpModule
from dsjax.model.router import Balance
from dsjax.model.row import Row, row
from dsjax.precision import Precision
from sharding import island
from sharding.dispatch import PLAN, ROWS
from sharding.init import stack
from sharding.rules import AxisRules, Layout

Remat = Literal["none", "dots", "selective", "full"]
# What `selective` keeps of a layer, beside its input.
KEPT = ("latent", "attention_out", "attention_lse", "gate_up", "expert_gate_up", PLAN, ROWS)


class RouterBias(nnx.Variable):
    """The balancing bias of the routers of one stack: state that no gradient trains."""


@no_type_check  # its leaves may be shapes, shardings or flags
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
    """What the layers tell, by stack (a block of a longer pattern: `<stack>_<index>`; MTP: `mtp`).

    Attributes:
        load: int32 [L, E] tokens of each expert.
        balance: float32 [L] each, the balance statistics summed over rows, without their weights.
        routing: uint16 [L, B, T, K] chosen experts.
        overflow: int32 [L] tokens that did not fit the exchange between devices; 0 unless its
            buffers are bounded (`sharding.rules.Exchange`).

    On a mesh, each is of the device's own tokens; a balance is its share.
    """

    load: dict[str, Array]
    balance: dict[str, Balance]
    routing: dict[str, Array]
    overflow: dict[str, Array]

    def __or__(self, other: "Aux") -> "Aux":
        """Joins what different stacks tell."""
        return Aux(
            self.load | other.load,
            self.balance | other.balance,
            self.routing | other.routing,
            self.overflow | other.overflow,
        )


@no_type_check  # its leaves may be shapes, shardings or flags
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Of a forward pass.

    Attributes:
        hidden_BTD: after the final norm.
        cache: with the new positions written, or None without one.
        aux: what the layers tell.
    """

    hidden_BTD: Array
    cache: Cache | None
    aux: Aux


class Head(NamedTuple):
    """The matrix that scores the vocabulary.

    Attributes:
        w_DV: this device's part of [D, V].
        layout: mesh axes of each dimension.
        kept: those over which its logits stay apart.
    """

    w_DV: Array
    layout: Layout
    kept: Layout


def checkpointed(function: Callable, remat: Remat, *, in_loop: bool = True) -> Callable:
    """Wraps a layer so that its backward pass recomputes what the policy does not keep.

    `none` keeps everything, `dots` keeps the products of weights, `full` keeps the layer's input.
    `selective` keeps the latents, attention's result and SwiGLU's input, and computes norms, keys,
    values and queries again, as V3 did (V3 report, 3.2.3).
    Outside a loop the compiler is kept from finding out that it computes the same twice.
    """
    if remat == "none":
        return function
    policy = None
    if remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    elif remat == "selective":
        policy = jax.checkpoint_policies.save_only_these_names(*KEPT)
    return jax.checkpoint(function, policy=policy, prevent_cse=not in_loop)


class Transformer(nnx.Module):
    """A blueprint of parameters and a pure forward pass."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        precision: Precision,
        rules: AxisRules,
        remat: Remat = "none",
        key: PRNGKeyArray,
    ):
        rules = dataclasses.replace(rules, recomputed=remat != "none")
        self.config, self.precision, self.rules, self.remat = config, precision, rules, remat
        key_embed, key_stacks, key_head, key_mtp = jax.random.split(key, 4)
        v, d = config.vocab_size, config.embed_dim
        shared: dict[str, Any] = {"precision": precision, "rules": rules}
        std = {"std": config.init_std, "precision": precision, "linear": False}
        self.embed_VD = weight(key_embed, (v, d), ("vocab", "embed"), **std)
        self.final_norm_D = norm_scale(d, "act_embed", precision)
        if not config.tie_embeddings:
            self.head_DV = weight(key_head, (d, v), ("embed", "vocab"), **std)

        stacks, biases = {}, {}
        for stack_config in config.stacks:
            blocks = []
            for i, block in enumerate(stack_config.blocks):
                key_stacks, key_block = jax.random.split(key_stacks)
                keys = jax.random.split(key_block, stack_config.repeats)
                blocks.append(stack(lambda k, b=block: Block(b, config, key=k, **shared), keys))
                biases |= _bias(stack_config.key(i), block.ffn, stack_config.repeats)
            stacks[stack_config.name] = nnx.List(blocks)
        self.stacks = nnx.Dict(stacks)
        self.mtp_modules = nnx.List([])
        if config.mtp is not None:
            keys = jax.random.split(key_mtp, config.mtp.depth)
            self.mtp_modules = nnx.List([MtpModule(config, key=k, **shared) for k in keys])
            biases |= _bias("mtp", config.mtp.block.ffn, config.mtp.depth)
        self.router_bias = nnx.Dict(biases)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        cache: Cache | None = None,
        routing: dict[str, UInt16[Array, "_L B T _K"]] | None = None,
    ) -> Output:
        """Runs every stack.

        Args:
            tokens_BT: token ids, in [0, V).
            positions_BT: position of each token in its document.
            segments_BT: documents of a packed row, contiguous and numbered from 1; 0 is padding.
            cache: None for training; otherwise the new positions are written to it and attend to
                all that it holds.
            routing: `Aux.routing` of another pass; replays its choices, gates are the current ones.

        Returns:
            Hidden states after the final norm, the cache, and what the layers tell.
        """
        x_BTD = self.embed(tokens_BT)
        where = self.row(positions_BT, segments_BT)
        entries = {} if cache is None else dict(cache.entries)
        aux = Aux({}, {}, {}, {})
        for stack_config in self.config.stacks:
            x_BTD, entries, stack_aux = self._run_stack(
                stack_config, x_BTD, entries, where, cache, routing
            )
            aux = aux | stack_aux
        hidden_BTD = rms_norm(x_BTD, self.final_norm_D[...], self.config.norm_eps)
        new_cache = None if cache is None else dataclasses.replace(cache, entries=entries)
        return Output(hidden_BTD, new_cache, aux)

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks tokens up, in the compute dtype."""
        layout, _ = layout_of(self.embed_VD, self.rules)
        dtype = self.precision.compute_dtype
        return island.lookup(self.embed_VD[...], layout, tokens_BT, self.rules, dtype)

    @property
    def head(self) -> Head:
        """The head's matrix, a parameter of its own or the embedding's, and how it is cut."""
        variable = self.embed_VD if self.config.tie_embeddings else self.head_DV
        layout, kept = layout_of(variable, self.rules)
        if self.config.tie_embeddings:
            return Head(variable[...].T, layout[::-1], kept[::-1])
        return Head(variable[...], layout, kept)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores every token of the vocabulary, float32. Training takes the chunked loss."""
        head, dtype = self.head, self.precision.compute_dtype
        w_DV = head.w_DV
        if head.layout != head.kept:
            w_DV = island.whole(w_DV, head.layout, head.kept, dtype)
        logits_BTV = self.precision.linear(hidden_BTD, w_DV, "btd,dv->btv", role="head")
        if apart := island.inside(head.kept[1]):
            return jax.lax.all_gather(logits_BTV, apart, axis=2, tiled=True)
        return logits_BTV

    def row(self, positions_BT: Int[Array, "B T"], segments_BT: Int[Array, "B T"]) -> Row:
        """Where tokens stand, for all layers at once."""
        blocks = [block for s in self.config.stacks for block in s.blocks]
        if self.config.mtp is not None:
            blocks.append(self.config.mtp.block)
        ropes = dict.fromkeys((block.attention.rope, block.attention.rope_dim) for block in blocks)
        return row(positions_BT, segments_BT, ropes, self.rules)

    def mtp(
        self,
        depth: int,
        hidden_BTD: Float[Array, "B T D"],
        next_tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        routing_BTK: UInt16[Array, "B T K"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Aux]:
        """Runs one prediction depth (V3 report, equations 21-23).

        Args:
            depth: from 0; depth k predicts token i + 2 + k at position i.
            hidden_BTD: after the final norm: the main model's for depth 0, else depth - 1's.
            next_tokens_BT: token i + 1 + depth at position i.
            positions_BT: as in the forward pass.
            segments_BT: as in the forward pass.
            routing_BTK: expert choices to replay.

        Returns:
            (hidden states after this depth's final norm, aux under `mtp` with L = 1).
        """
        module = self.mtp_modules[depth]
        bias = self.router_bias.get("mtp")

        def run(hidden_BTD, embedding_BTD, module, bias_E):
            return module.block(
                module.combine(hidden_BTD, embedding_BTD),
                where=self.row(positions_BT, segments_BT),
                bias_E=bias_E,
                routing_BTK=routing_BTK,
            )

        bias_E = None if bias is None else bias[...][depth]
        run = checkpointed(run, self.remat, in_loop=False)
        x_BTD, _, told = run(hidden_BTD, self.embed(next_tokens_BT), module, bias_E)
        hidden_BTD = rms_norm(x_BTD, module.final_norm_D[...], self.config.norm_eps)
        if told is None:
            return hidden_BTD, Aux({}, {}, {}, {})
        told = jax.tree.map(lambda x: x[None], told)
        return hidden_BTD, _aux("mtp", told)

    def _run_stack(self, config, x_BTD, entries, where, cache, routing):
        """Scans one stack; its caches are part of the carry, its parameters are read only."""
        keys = [config.key(i) for i in range(len(config.blocks))]
        routed = [k for k, b in zip(keys, config.blocks, strict=True) if _routed(b)]

        def layer(carry, xs):
            x_BTD, entries = carry
            blocks, biases, choices, index = xs
            told = {}
            for key, block in zip(keys, blocks, strict=True):
                bank = banks.get(key)
                x_BTD, written, aux = block(
                    x_BTD,
                    where=where,
                    entries=entries.get(key),
                    layer=index,
                    pages=None if cache is None else cache.pages,
                    fresh=cache is None or cache.fresh,
                    bias_E=biases.get(key),
                    routing_BTK=choices.get(key),
                    expert_stack=None if bank is None else ExpertStack(bank[0], bank[1], index),
                )
                if written is not None:
                    entries = entries | {key: written}
                if aux is not None:
                    told[key] = aux
            return (x_BTD, entries), told

        mine = {key: entries[key] for key in keys if key in entries}
        banks = {}
        if cache is not None and not cache.fresh:
            ffns = {k: b.ffn for k, b in zip(keys, self.stacks[config.name], strict=True)}
            banks = {k: (ffns[k].w_in_ED2F[...], ffns[k].w_down_EFD[...]) for k in routed}
        biases = {k: self.router_bias[k][...] for k in routed if k in self.router_bias}
        choices = {} if routing is None else {k: routing[k] for k in routed}
        index = jnp.arange(config.repeats, dtype=jnp.int32)
        (x_BTD, mine), told = jax.lax.scan(
            checkpointed(layer, self.remat),
            (x_BTD, mine),
            (tuple(self.stacks[config.name]), biases, choices, index),
        )
        aux = Aux({}, {}, {}, {})
        for key, value in told.items():
            aux = aux | _aux(key, value)
        return x_BTD, entries | mine, aux


def _routed(block) -> bool:
    return isinstance(block.ffn, MoeConfig)


def _aux(key: str, told) -> Aux:
    return Aux(
        {key: told.load_E}, {key: told.balance}, {key: told.routing_BTK}, {key: told.overflow}
    )


def _bias(key: str, ffn, layers: int) -> dict[str, RouterBias]:
    """The zero bias of a stack's routers; empty for dense layers and for routers without one."""
    if not isinstance(ffn, MoeConfig) or not ffn.balance_bias:
        return {}
    zeros = jnp.zeros((layers, ffn.num_experts), jnp.float32)
    return {key: RouterBias(zeros, axes=("layers", None))}


def build(config: Config, rules: AxisRules = AxisRules()) -> Callable[[jax.Array], Transformer]:  # noqa: B008
    """Returns a function of a key that makes the configured model; see `sharding.init.init`."""

    def make(key: PRNGKeyArray) -> Transformer:
        return Transformer(
            config.model,
            precision=Precision.of(config.precision),
            rules=rules,
            remat=config.train.remat,
            key=key,
        )

    return make


def split(model: Transformer) -> tuple[nnx.GraphDef, dict, dict]:
    """Takes a model apart into its blueprint and plain nested dicts of arrays.

    Returns:
        (graphdef, params, bias {stack: [L, E]}).
    """
    graphdef, params, bias = nnx.split(model, nnx.Param, RouterBias)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(bias).get("router_bias", {})


def merge(graphdef: nnx.GraphDef, params: dict, bias: dict) -> Transformer:
    """Puts a blueprint and its arrays together; the inverse of `split`, free inside a `jit`."""
    return nnx.merge(graphdef, params, {"router_bias": bias} if bias else {})
