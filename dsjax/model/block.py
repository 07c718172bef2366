"""One pre-norm transformer block: attention, then a dense or expert feed-forward layer.

Knows nothing about stacks. B sequences, T positions, D width.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt16

from dsjax.config import BlockConfig, GqaConfig, ModelConfig, MoeConfig
from dsjax.model.cache import Entries, Pages
from dsjax.model.gqa import GroupedQueryAttention
from dsjax.model.layers import Normed, SwiGlu, norm_scale
from dsjax.model.mla import MultiHeadLatentAttention
from dsjax.model.moe import ExpertStack, MixtureOfExperts, MoeAux
from dsjax.model.row import Row
from dsjax.precision import Precision
from sharding.rules import AxisRules


class Block(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(
        self,
        config: BlockConfig,
        model: ModelConfig,
        *,
        precision: Precision,
        rules: AxisRules,
        key: PRNGKeyArray,
    ):
        self.norm_eps = model.norm_eps
        key_attention, key_ffn = jax.random.split(key)
        d, shared = model.embed_dim, {"std": model.init_std, "precision": precision, "rules": rules}
        self.attention_norm_D = norm_scale(d, "act_embed", precision)
        self.attention: MultiHeadLatentAttention | GroupedQueryAttention
        if isinstance(config.attention, GqaConfig):
            self.attention = GroupedQueryAttention(config.attention, d, key=key_attention, **shared)
        else:
            self.attention = MultiHeadLatentAttention(
                config.attention, d, key=key_attention, **shared
            )
        self.ffn_norm_D = norm_scale(d, "act_embed", precision)
        self.ffn: MixtureOfExperts | SwiGlu
        if isinstance(config.ffn, MoeConfig):
            self.ffn = MixtureOfExperts(config.ffn, d, key=key_ffn, **shared)
        else:
            self.ffn = SwiGlu(d, config.ffn.hidden_dim, key=key_ffn, **shared)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        where: Row,
        entries: Entries | None = None,
        layer: Int[Array, ""] | None = None,
        pages: Pages | None = None,
        fresh: bool = True,
        bias_E: Float[Array, " E"] | None = None,
        routing_BTK: UInt16[Array, "B T K"] | None = None,
        expert_stack: ExpertStack | None = None,
    ) -> tuple[Float[Array, "B T D"], Entries | None, MoeAux | None]:
        """Runs the block.

        Args:
            x_BTD: hidden states.
            where: the places of the tokens.
            entries: the stack's cache, or None.
            layer: this block's layer of the cache.
            pages: places in the cache.
            fresh: nothing is cached before these positions.
            bias_E: balancing bias of the router.
            routing_BTK: expert choices to replay.
            expert_stack: see `MixtureOfExperts`.

        Returns:
            (hidden states, the cache, what the experts tell or None for a dense layer).
        """
        normed_BTD = Normed(x_BTD, self.attention_norm_D[...], self.norm_eps)
        attended_BTD, entries = self.attention(
            normed_BTD,
            where=where,
            # The cache of a stack is of its attention's kind.
            entries=entries,  # pyrefly: ignore[bad-argument-type]
            layer=layer,
            pages=pages,
            fresh=fresh,
        )
        x_BTD = x_BTD + attended_BTD
        normed_BTD = Normed(x_BTD, self.ffn_norm_D[...], self.norm_eps)
        if isinstance(self.ffn, SwiGlu):
            return x_BTD + self.ffn(normed_BTD), entries, None
        y_BTD, aux = self.ffn(
            normed_BTD.value(),
            bias_E=bias_E,
            segments_BT=where.segments_BT,
            routing_BTK=routing_BTK,
            expert_stack=expert_stack,
        )
        return x_BTD + y_BTD, entries, aux
