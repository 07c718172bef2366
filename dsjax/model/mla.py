"""Multi-head latent attention, expanded for training and absorbed over the latent cache.

Knows nothing about experts, stacks or how pages are handed out.
Source: DeepSeek-V2 report, section 2.1 and appendix C; V3 report, 2.1.1.

B sequences, T positions, D width, N heads, Q query latent, C key/value latent, P nope, R rope and
H value width a head, A = P + R, Z = C + R, Y = P + H, L layers, X pages of S positions.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsjax.config import MlaConfig
from dsjax.model import rope
from dsjax.model.cache import Pages, write
from dsjax.model.layers import norm_scale, rms_norm, weight
from dsjax.precision import Precision
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.mla_decode import mla_decode
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
            self.q_norm_Q = norm_scale(q, "q_latent", precision)
            self.w_uq_QNA = make(key_uq, (q, n, a), ("q_latent", "heads", None))
        self.w_dkvr_DZ = make(key_dkvr, (embed_dim, z), ("embed", "kv_latent"))
        self.kv_norm_C = norm_scale(c, "kv_latent", precision)
        self.w_ukv_CNY = make(key_ukv, (c, n, y), ("kv_latent", "heads", None))
        self.w_o_NHD = make(key_o, (n, config.value_dim, embed_dim), ("heads", None, "embed"))

    @jax.named_scope("attention")
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        turn: rope.Rotation,
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        entries: Float[Array, "L X S Z"] | None = None,
        layer: Int[Array, ""] | None = None,
        pages: Pages | None = None,
        fresh: bool = True,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L X S Z"] | None]:
        """Attends within the sequence, or to the cache.

        Args:
            x_BTD: normed hidden states.
            turn: `rope.rotation` of the positions.
            positions_BT: int32 positions; negative ones attend to nothing.
            segments_BT: int32 documents of a packed row; 0 is padding.
            entries: the stack's cache [L, X, S, Z], or None without one.
            layer: which layer of the cache is this one's.
            pages: where new positions are written and old ones read.
            fresh: nothing is cached before these positions: attends among them in the expanded
                form, and only writes the cache.

        Returns:
            (output [B, T, D], the cache with this layer's new entries, or None).
        """
        q_nope_BTNP, q_rope_BTNR = self._queries(x_BTD, turn)
        new_BTZ = self._entries(x_BTD, turn)
        if entries is not None:
            assert layer is not None  # it and the pages come with a cache
            assert pages is not None
            entries = write(entries, layer, new_BTZ, pages.slot_BT)
        if fresh:
            out_BTNH = self._expanded(q_nope_BTNP, q_rope_BTNR, new_BTZ, segments_BT, positions_BT)
        else:
            out_BTNH = self._absorbed(q_nope_BTNP, q_rope_BTNR, entries, layer, pages, positions_BT)
        out_BTD = self.precision.linear(
            out_BTNH,
            self.w_o_NHD[...],
            "btnh,nhd->btd",
            out_sharding=self.rules("batch", "seq", "act_embed"),
        )
        return out_BTD, entries

    @property
    def _scale(self) -> float:
        return rope.softmax_scale(self.config.head_dim, self.config.rope.yarn)

    def _queries(self, x_BTD, turn):
        """V2 report, equations 12-14 and 16: queries by head, nope and rotated rope part."""
        linear, rules, config = self.precision.linear, self.rules, self.config
        per_head = rules("batch", "seq", "act_heads", None)
        if config.q_latent_dim is None:
            w_DNA = self.w_q_DNA[...]
            q_BTNA = linear(x_BTD, w_DNA, "btd,dna->btna", out_sharding=per_head)
        else:
            latent = rules("batch", "seq", None)
            c_BTQ = linear(x_BTD, self.w_dq_DQ[...], "btd,dq->btq", out_sharding=latent)
            c_BTQ = rms_norm(c_BTQ, self.q_norm_Q[...], config.latent_norm_eps)
            q_BTNA = linear(c_BTQ, self.w_uq_QNA[...], "btq,qna->btna", out_sharding=per_head)
        q_nope_BTNP, q_rope_BTNR = jnp.split(q_BTNA, [config.nope_dim], axis=-1)
        return q_nope_BTNP, rope.rotate(q_rope_BTNR, turn)

    def _entries(self, x_BTD, turn):
        """V2 report, equations 9 and 15: what is cached, [normed latent ; rotated shared key]."""
        config = self.config
        z_BTZ = self.precision.linear(
            x_BTD,
            self.w_dkvr_DZ[...],
            "btd,dz->btz",
            out_sharding=self.rules("batch", "seq", None),
        )
        latent_BTC, key_BTR = jnp.split(z_BTZ, [config.kv_latent_dim], axis=-1)
        latent_BTC = rms_norm(latent_BTC, self.kv_norm_C[...], config.latent_norm_eps)
        return jnp.concatenate([latent_BTC, rope.rotate(key_BTR, turn)], axis=-1)

    def _expanded(self, q_nope_BTNP, q_rope_BTNR, entries_BTZ, segments_BT, positions_BT):
        """Keys and values of every head from the latent (V2 report, equations 10-11, 17 and 18)."""
        config = self.config
        latent_BTC, key_BTR = jnp.split(entries_BTZ, [config.kv_latent_dim], axis=-1)
        kv_BTNY = self.precision.linear(
            latent_BTC,
            self.w_ukv_CNY[...],
            "btc,cny->btny",
            out_sharding=self.rules("batch", "seq", "act_heads", None),
        )
        k_nope_BTNP, v_BTNH = jnp.split(kv_BTNY, [config.nope_dim], axis=-1)
        k_rope_BTNR = jnp.broadcast_to(key_BTR[:, :, None], q_rope_BTNR.shape)
        q_BTNA = jnp.concatenate([q_nope_BTNP, q_rope_BTNR], axis=-1)
        k_BTNA = jnp.concatenate([k_nope_BTNP, k_rope_BTNR], axis=-1)
        return mla_attention(q_BTNA, k_BTNA, v_BTNH, segments_BT, positions_BT, self._scale)

    def _absorbed(self, q_nope_BTNP, q_rope_BTNR, latent_LXSZ, layer, pages, positions_BT):
        """W^UK taken into the query, W^UV after the sum: multi-query attention over the latent."""
        config, linear = self.config, self.precision.linear
        per_head = self.rules("batch", "seq", "act_heads", None)
        w_ukv_CNY = self.precision.dense(self.w_ukv_CNY[...])
        w_uk_CNP, w_uv_CNH = jnp.split(w_ukv_CNY, [config.nope_dim], axis=-1)
        q_latent_BTNC = linear(q_nope_BTNP, w_uk_CNP, "btnp,cnp->btnc", out_sharding=per_head)
        q_BTNZ = jnp.concatenate([q_latent_BTNC, q_rope_BTNR], axis=-1)
        out_BTNC, _ = mla_decode(
            q_BTNZ,
            latent_LXSZ,
            layer,
            pages.table_BX,
            pages.length_B,
            positions_BT,
            self._scale,
            value_dim=config.kv_latent_dim,
        )
        return linear(out_BTNC, w_uv_CNH, "btnc,cnh->btnh", out_sharding=per_head)
