"""Grouped-query attention: fewer key/value heads than query heads, as in Qwen2 and Llama.

The room of dense students. Knows nothing about experts, stacks or how pages are handed out.
Source: Ainslie et al. 2023 (arXiv 2305.13245).

B sequences, T positions, D width, N heads, I key/value heads, A key and H value width a head,
L layers, X pages of S positions.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsjax.config import GqaConfig
from dsjax.model import fp8, rope
from dsjax.model.cache import KeysValues, Pages, write
from dsjax.model.layers import Normed, bias, contract, contract_all, enter, read, weight
from dsjax.model.row import Row, attend
from dsjax.precision import Precision
from pallas_kernels.gqa_decode import gqa_decode
from sharding import island
from sharding.rules import AxisRules


class GroupedQueryAttention(nnx.Module):
    """Query head n attends with key/value head n // (N / I); the whole head turns."""

    def __init__(
        self,
        config: GqaConfig,
        embed_dim: int,
        *,
        std: float,
        precision: Precision,
        rules: AxisRules,
        key: PRNGKeyArray,
    ):
        self.config, self.precision, self.rules = config, precision, rules
        n, i, a, h = config.num_heads, config.num_kv_heads, config.head_dim, config.value_dim
        key_q, key_k, key_v, key_o = jax.random.split(key, 4)
        in_axes, made = ("embed", "heads", None), {"std": std, "precision": precision}
        self.w_q_DNA = weight(key_q, (embed_dim, n, a), in_axes, **made)
        self.w_k_DIA = weight(key_k, (embed_dim, i, a), in_axes, **made)
        self.w_v_DIH = weight(key_v, (embed_dim, i, h), in_axes, **made)
        self.w_o_NHD = weight(key_o, (n, h, embed_dim), ("heads", None, "embed"), **made)
        if config.qkv_bias:
            self.b_q_NA = bias((n, a), ("heads", None), precision)
            self.b_k_IA = bias((i, a), ("heads", None), precision)
            self.b_v_IH = bias((i, h), ("heads", None), precision)
        if config.out_bias:
            self.b_o_D = bias((embed_dim,), ("act_embed",), precision)

    @jax.named_scope("attention")
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"] | Normed,
        *,
        where: Row,
        entries: KeysValues | None = None,
        layer: Int[Array, ""] | None = None,
        pages: Pages | None = None,
        fresh: bool = True,
    ) -> tuple[Float[Array, "B T D"], KeysValues | None]:
        """Attends within the sequence, or to the cache.

        Args:
            x_BTD: normed hidden states, or such as wait for it.
            where: the places of the tokens.
            entries: the stack's cache, or None without one.
            layer: which layer of the cache is this one's.
            pages: where new positions are written and old ones read.
            fresh: nothing is cached before these positions: attends among them, and only writes
                the cache.

        Returns:
            (output [B, T, D], the cache with this layer's new entries, or None).
        """
        x_BTD = enter(x_BTD, self.rules.of("act_heads"), self.rules)
        turn = where.query_turns[(self.config.rope, self.config.rope_dim)]
        q_BTNA, k_BTIA, v_BTIH = self._project(x_BTD, turn)
        if entries is not None:
            assert layer is not None  # it and the pages come with a cache
            assert pages is not None
            entries = KeysValues(
                write(entries.k_LXSIA, layer, k_BTIA, pages.slot_BT),
                write(entries.v_LXSIH, layer, v_BTIH, pages.slot_BT),
            )
        if fresh:
            if "context" in self.rules.of("seq"):
                k_BTIA, v_BTIH = island.context_row(k_BTIA), island.context_row(v_BTIH)
            kept = self.precision.attention_kept
            out_BTNH = attend(q_BTNA, k_BTIA, v_BTIH, where, self._scale, self.rules, kept)
        else:
            assert entries is not None  # what is not fresh lies in a cache
            assert layer is not None
            assert pages is not None
            out_BTNH, lse_BTN = gqa_decode(
                q_BTNA,
                entries.k_LXSIA,
                entries.v_LXSIH,
                layer,
                pages.table_BX,
                pages.length_B,
                pages.seen_BT,
                self._scale,
            )
            out_BTNH = island.combine_parts(out_BTNH, lse_BTN, pages.axes)
        out_BTD = self._linear(out_BTNH, self.w_o_NHD, "btnh,nhd->btd", fp8.CROSSING)
        out_BTD = island.leave(out_BTD, self.rules.of("act_heads"), self.rules)
        if self.config.out_bias:
            out_BTD = out_BTD + self.b_o_D[...].astype(out_BTD.dtype)
        return out_BTD, entries

    @property
    def _scale(self) -> float:
        return rope.softmax_scale(self.config.head_dim, self.config.rope.yarn)

    def _linear(self, x, variable, spec, how=None):
        return contract(x, variable, spec, rules=self.rules, precision=self.precision, how=how)

    def _bias(self, variable, dtype):
        return self.precision.dense(read(variable, self.rules, self.precision), dtype)

    def _project(self, x_BTD, turn):
        """Queries and keys by head, rotated, and values."""
        weights = [self.w_q_DNA, self.w_k_DIA, self.w_v_DIH]
        q_BTNA, k_BTIA, v_BTIH = contract_all(
            x_BTD, weights, "btd,dna->btna", rules=self.rules, precision=self.precision
        )
        if self.config.qkv_bias:
            q_BTNA = q_BTNA + self._bias(self.b_q_NA, q_BTNA.dtype)
            k_BTIA = k_BTIA + self._bias(self.b_k_IA, k_BTIA.dtype)
            v_BTIH = v_BTIH + self._bias(self.b_v_IH, v_BTIH.dtype)
        return rope.rotate(q_BTNA, turn), rope.rotate(k_BTIA, turn), v_BTIH
