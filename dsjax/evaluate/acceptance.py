"""How often the multi-token prediction agrees with the model it would draft for.

Knows nothing about decoding. Source: V3 report, 5.4.3: the second token is accepted 85 to 90% of
the time, measured there on generated text.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dsjax.model.mtp import depth_segments
from dsjax.model.transformer import merge


def second_token_acceptance(
    graphdef: nnx.GraphDef, params: dict, bias: dict, batches: Sequence[dict[str, np.ndarray]]
) -> float:
    """Share of positions where MTP's best second token is the one the main model takes a step on.

    On given text, that is with the true next token in between.

    Args:
        graphdef: of a model with MTP.
        params: its weights.
        bias: its balancing biases.
        batches: packed batches of text that the model was not trained on.

    Raises:
        ValueError: for a model without MTP.
    """
    hits = count = 0.0
    for batch in batches:
        hit, seen = _hits(graphdef, params, bias, batch)
        hits, count = hits + float(hit), count + float(seen)
    return hits / max(count, 1.0)


@partial(jax.jit, static_argnames="graphdef")
def _hits(
    graphdef: nnx.GraphDef, params: dict, bias: dict, batch: dict[str, Array]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    model = merge(graphdef, params, bias)
    if not len(model.mtp_modules):
        raise ValueError("the model has no MTP")
    segments_BT, positions_BT = batch["segments_BT"], batch["positions_BT"]
    output = model(batch["tokens_BT"], positions_BT=positions_BT, segments_BT=segments_BT)
    main_BT = model.logits(output.hidden_BTD).argmax(axis=-1)
    ahead_BT = depth_segments(segments_BT, 0)
    drafted_BTD, _ = model.mtp(
        0,
        output.hidden_BTD,
        batch["targets_BT"],
        positions_BT=positions_BT,
        segments_BT=ahead_BT,
    )
    draft_BT = model.logits(drafted_BTD).argmax(axis=-1)
    real_BT = ahead_BT[:, :-1] != 0
    agree_BT = draft_BT[:, :-1] == main_BT[:, 1:]
    return jnp.sum(agree_BT & real_BT, dtype=jnp.float32), jnp.sum(real_BT, dtype=jnp.float32)
