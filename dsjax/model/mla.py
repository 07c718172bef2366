"""Multi-head latent attention, expanded for training and absorbed over the latent cache.

Knows nothing about experts, stacks or how pages are handed out.
Source: DeepSeek-V2 report, section 2.1 and appendix C; V3 report, 2.1.1.

B sequences, T positions (S of a whole row), D width, N heads, Q query latent, C key/value latent,
P nope, R rope and H value width a head, A = P + R, Z = C + R, Y = P + H, L layers, X pages of S
positions.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsjax.config import MlaConfig
from dsjax.model import fp8, rope
from dsjax.model.cache import Pages, read_rows, write_latents
from dsjax.model.layers import (
    Normed,
    contract,
    contract_all,
    enter,
    norm_scale,
    read,
    rms_norm,
    weight,
)
from dsjax.model.row import Row, attend
from dsjax.precision import Precision
from pallas_kernels.latents import Latents
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.mla_decode import mla_decode
from sharding import island
from sharding.rules import AxisRules


class MultiHeadLatentAttention(nnx.Module):
    """MLA with fused weights, laid out as published so that FP8's blocks fall where they should."""

    def __init__(
        self,
        config: MlaConfig,
        embed_dim: int,
        *,
        std: float,
        precision: Precision,
        rules: AxisRules,
        key: PRNGKeyArray,
    ):
        self.config, self.precision, self.rules = config, precision, rules
        n, q, c = config.num_heads, config.q_latent_dim, config.kv_latent_dim
        a, z = config.head_dim, config.cache_dim
        y = config.nope_dim + config.value_dim
        key_dq, key_uq, key_dkvr, key_ukv, key_o = jax.random.split(key, 5)

        def make(key, shape, axes):
            return weight(key, shape, axes, std=std, precision=precision)

        if q is None:
            self.w_q_DNA = make(key_uq, (embed_dim, n, a), ("embed", "heads", None))
        else:
            self.w_dq_DQ = make(key_dq, (embed_dim, q), ("embed", "q_latent"))
            self.q_norm_Q = norm_scale(q, None, precision)
            self.w_uq_QNA = make(key_uq, (q, n, a), ("q_latent", "heads", None))
        self.w_dkvr_DZ = make(key_dkvr, (embed_dim, z), ("embed", "kv_latent"))
        self.kv_norm_C = norm_scale(c, None, precision)
        self.w_ukv_CNY = make(key_ukv, (c, n, y), ("kv_latent", "heads", None))
        self.w_o_NHD = make(key_o, (n, config.value_dim, embed_dim), ("heads", None, "embed"))

    @jax.named_scope("attention")
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"] | Normed,
        *,
        where: Row,
        entries: Latents | None = None,
        layer: Int[Array, ""] | None = None,
        pages: Pages | None = None,
        fresh: bool = True,
    ) -> tuple[Float[Array, "B T D"], Latents | None]:
        """Attends within the sequence, or to the cache.

        Args:
            x_BTD: normed hidden states, or such as wait for it.
            where: the places of the tokens.
            entries: the stack's cache [L, X, S, Z], also in FP8, or None without one.
            layer: which layer of the cache is this one's.
            pages: where new positions are written and old ones read.
            fresh: nothing is cached before these positions: attends among them in the expanded
                form, and only writes the cache.

        Returns:
            (output [B, T, D], the cache with this layer's new entries, or None).
        """
        turn = (self.config.rope, self.config.rope_dim)
        latent_BTQ, z_BTZ = self._latents(x_BTD)
        q_nope_BTNP, q_rope_BTNR = self._queries(latent_BTQ, where.query_turns[turn])
        new_BTZ = self._entries(z_BTZ, where.turns[turn])
        if entries is not None:
            assert layer is not None  # it and the pages come with a cache
            assert pages is not None
            entries = write_latents(entries, layer, new_BTZ, pages.slot_BT)
        if fresh:
            out_BTNH = self._expanded(q_nope_BTNP, q_rope_BTNR, new_BTZ, where)
        else:
            assert pages is not None
            many = q_nope_BTNP.shape[1] > self._worth_expanding
            arguments = q_nope_BTNP, q_rope_BTNR, entries, layer, pages
            if many and pages.first_row is not None:
                out_BTNH = self._continued(*arguments, where)
            else:
                out_BTNH = self._absorbed(*arguments)
        out_BTD = self._linear(out_BTNH, self.w_o_NHD, "btnh,nhd->btd", fp8.CROSSING)
        return island.leave(out_BTD, self.rules.of("act_heads"), self.rules), entries

    @property
    def _scale(self) -> float:
        return rope.softmax_scale(self.config.head_dim, self.config.rope.yarn)

    @property
    def _worth_expanding(self) -> float:
        """New positions from which the expanded form takes fewer operations than the absorbed one.

        A key costs C * Y a head to expand, and a pair of a query and a key A + H then, 2 C + R
        absorbed; in V3 171 queries make up for it.
        """
        config = self.config
        expand = config.kv_latent_dim * (config.nope_dim + config.value_dim)
        absorbed = config.kv_latent_dim + config.cache_dim
        spared = absorbed - config.head_dim - config.value_dim
        return expand / spared if spared > 0 else float("inf")

    def _linear(self, x, variable, spec, how=None):
        return contract(x, variable, spec, rules=self.rules, precision=self.precision, how=how)

    def _latents(self, x_BTD):
        """V2 report, equations 9, 12 and 15: what both projections down give, not yet normed.

        Without a query latent its place is taken by x.
        """
        if self.config.q_latent_dim is None:
            c_BTQ, z_BTZ = x_BTD, self._linear(x_BTD, self.w_dkvr_DZ, "btd,dz->btz")
        else:
            weights, told = [self.w_dq_DQ, self.w_dkvr_DZ], {"precision": self.precision}
            c_BTQ, z_BTZ = contract_all(x_BTD, weights, "btd,dz->btz", rules=self.rules, **told)
            c_BTQ = checkpoint_name(c_BTQ, "latent")
        return c_BTQ, checkpoint_name(z_BTZ, "latent")

    def _queries(self, c_BTQ, turn):
        """V2 report, equations 13, 14 and 16: queries by head, nope and rotated rope part."""
        linear, rules, config = self._linear, self.rules, self.config
        heads = rules.of("act_heads")
        if config.q_latent_dim is None:
            x_BTD = enter(c_BTQ, heads, rules)
            q_BTNA = linear(x_BTD, self.w_q_DNA, "btd,dna->btna")
        else:
            # The latent travels, which is narrower than x.
            c_BTQ = island.enter(c_BTQ, heads, rules)
            normed_BTQ = Normed(c_BTQ, self.q_norm_Q[...], config.latent_norm_eps)
            q_BTNA = linear(normed_BTQ, self.w_uq_QNA, "btq,qna->btna")
        q_nope_BTNP, q_rope_BTNR = jnp.split(q_BTNA, [config.nope_dim], axis=-1)
        return q_nope_BTNP, rope.rotate(q_rope_BTNR, turn)

    def _entries(self, z_BTZ, turn):
        """What is cached, [normed latent ; rotated shared key]."""
        config = self.config
        latent_BTC, key_BTR = jnp.split(z_BTZ, [config.kv_latent_dim], axis=-1)
        latent_BTC = rms_norm(latent_BTC, self.kv_norm_C[...], config.latent_norm_eps)
        return jnp.concatenate([latent_BTC, rope.rotate(key_BTR, turn)], axis=-1)

    def _expanded(self, q_nope_BTNP, q_rope_BTNR, entries_BTZ, where):
        """Attention within the row; of one that devices share the latents travel, Z a token."""
        k_BSNA, v_BSNH = self._keys_values(island.whole_row(entries_BTZ, self.rules))
        q_BTNA = jnp.concatenate([q_nope_BTNP, q_rope_BTNR], axis=-1)
        return attend(
            q_BTNA, k_BSNA, v_BSNH, where, self._scale, self.rules, self.precision.attention_kept
        )

    def _continued(self, q_nope_BTNP, q_rope_BTNR, latent_LXSZ, layer, pages, where):
        """Many new positions after cached ones: all that is cached is expanded again."""
        t = q_nope_BTNP.shape[1]
        entries_BSZ = read_rows(latent_LXSZ, layer, pages, q_nope_BTNP.dtype)
        entries_BSZ = jnp.pad(entries_BSZ, ((0, 0), (0, -entries_BSZ.shape[1] % t), (0, 0)))
        position_S = jnp.arange(entries_BSZ.shape[1], dtype=jnp.int32)
        cached_BS = position_S <= jnp.max(where.positions_BT, axis=1, keepdims=True)
        # A page that is not in use may hold NaN, which no weight of zero would hide.
        entries_BSZ = jnp.where(cached_BS[..., None], entries_BSZ, 0)
        k_BSNA, v_BSNH = self._keys_values(entries_BSZ)
        return mla_attention(
            jnp.concatenate([q_nope_BTNP, q_rope_BTNR], axis=-1),
            k_BSNA,
            v_BSNH,
            cached_BS.astype(jnp.int32),
            jnp.broadcast_to(position_S, cached_BS.shape),
            self._scale,
            first_row=pages.first_row,
            kept=self.precision.attention_kept,
        )

    def _keys_values(self, entries_BSZ):
        """Of every head, from the latent (V2 report, equations 10-11, 17 and 18)."""
        config = self.config
        latent_BSC, key_BSR = jnp.split(entries_BSZ, [config.kv_latent_dim], axis=-1)
        kv_BSNY = self._linear(latent_BSC, self.w_ukv_CNY, "btc,cny->btny")
        k_nope_BSNP, v_BSNH = jnp.split(kv_BSNY, [config.nope_dim], axis=-1)
        k_rope_BSNR = jnp.broadcast_to(
            key_BSR[:, :, None], (*k_nope_BSNP.shape[:3], key_BSR.shape[-1])
        )
        return jnp.concatenate([k_nope_BSNP, k_rope_BSNR], axis=-1), v_BSNH

    def _absorbed(self, q_nope_BTNP, q_rope_BTNR, latent_LXSZ, layer, pages):
        """W^UK taken into the query, W^UV after the sum: multi-query attention over the latent.

        Where devices that share heads share latents, too, each attends for all of those heads.
        """
        config, linear = self.config, self.precision.linear
        if self.precision.recipe == "fp8":
            told = {"rules": self.rules, "precision": self.precision}
            w_ukv_CNY = fp8.rounded(self.w_ukv_CNY, 1, **told)
        else:
            w_ukv_CNY = self.precision.dense(read(self.w_ukv_CNY, self.rules, self.precision))
        w_uk_CNP, w_uv_CNH = jnp.split(w_ukv_CNY, [config.nope_dim], axis=-1)
        q_latent_BTNC = linear(q_nope_BTNP, w_uk_CNP, "btnp,cnp->btnc", role="wide")
        q_BTNZ = jnp.concatenate([q_latent_BTNC, q_rope_BTNR], axis=-1)
        shared = tuple(a for a in pages.axes if a in self.rules.of("act_heads"))
        out_BTNC, lse_BTN = mla_decode(
            island.gather_heads(q_BTNZ, shared),
            latent_LXSZ,
            layer,
            pages.table_BX,
            pages.length_B,
            pages.seen_BT,
            self._scale,
            value_dim=config.kv_latent_dim,
        )
        out_BTNC = island.combine_parts(out_BTNC, lse_BTN, pages.axes, shared)
        return linear(out_BTNC, w_uv_CNH, "btnc,cnh->btnh", role="wide")
