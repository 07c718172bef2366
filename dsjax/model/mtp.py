"""Multi-token prediction: one more block that sees the next token and predicts the one after.

Knows nothing about the loss. Source: DeepSeek-V3 report, section 2.2, equations 21-23. The
embedding and the head are the main model's.

B sequences, T positions, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsjax.config import ModelConfig
from dsjax.model.block import Block
from dsjax.model.layers import contract, norm_scale, rms_norm, weight
from dsjax.precision import Precision
from sharding import island
from sharding.rules import AxisRules


def depth_segments(
    segments_BT: Int[Array | np.ndarray, "B T"],
    depth: int,
    rules: AxisRules = AxisRules(),  # noqa: B008
) -> Int[Array | np.ndarray, "B T"]:
    """Documents as prediction depth `depth` (from 0) sees them.

    Position i takes part while token i + 1 + depth belongs to its own document and row (equation
    22 ends the sum there); beyond, it is padding: no load, no balance, no loss.
    """
    later_BT = island.shift_row(segments_BT, 1 + depth, rules)
    return segments_BT * (later_BT == segments_BT)


class MtpModule(nnx.Module):
    """One prediction depth: combines the hidden state with the next token, then runs a block."""

    def __init__(
        self, config: ModelConfig, *, precision: Precision, rules: AxisRules, key: PRNGKeyArray
    ):
        assert config.mtp is not None  # the transformer makes no depth without one
        self.precision, self.rules, self.norm_eps = precision, rules, config.norm_eps
        key_proj, key_block = jax.random.split(key)
        d = config.embed_dim
        self.embedding_norm_D = norm_scale(d, "act_embed", precision)
        self.hidden_norm_D = norm_scale(d, "act_embed", precision)
        self.w_proj_2DD = weight(
            *(key_proj, (2 * d, d), ("embed", None)),
            std=config.init_std,
            precision=precision,
            linear=False,
        )
        self.block = Block(
            config.mtp.block, config, precision=precision, rules=rules, key=key_block
        )
        self.final_norm_D = norm_scale(d, "act_embed", precision)

    def combine(
        self, hidden_BTD: Float[Array, "B T D"], embedding_BTD: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """Equation 21. The published `eh_proj` takes the embedding first."""
        both_BT2D = jnp.concatenate(
            [
                rms_norm(embedding_BTD, self.embedding_norm_D[...], self.norm_eps),
                rms_norm(hidden_BTD, self.hidden_norm_D[...], self.norm_eps),
            ],
            axis=-1,
        )
        # Published in BF16 (`eh_proj`), as the head and the router are.
        told = {"rules": self.rules, "precision": self.precision}
        return contract(both_BT2D, self.w_proj_2DD, "btk,kd->btd", role="wide", **told)
