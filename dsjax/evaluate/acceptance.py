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
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from dsjax.meshes import blueprint_rules, mesh_of
from dsjax.model.mtp import depth_segments
from dsjax.model.transformer import Transformer, merge
from sharding import island
from sharding.spread import Spread


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
    spread = Spread(mesh_of(params), blueprint_rules(graphdef))
    for batch in batches:
        rows = len(batch["tokens_BT"])
        with spread.mesh_set():
            placed = spread(batch, rows, whole=True)
            hit, seen = _hits(graphdef, params, bias, placed)
        hits, count = hits + float(hit), count + float(seen)
    return hits / max(count, 1.0)


@partial(jax.jit, static_argnames="graphdef")
def _hits(
    graphdef: nnx.GraphDef, params: dict, bias: dict, batch: dict[str, Array]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    def local(*arrays):
        model = merge(graphdef, *arrays[:2])
        return island.sum_tokens(_hits_of(model, arrays[2]), model.rules)

    return island.run(local, PartitionSpec(), params, bias, batch)


def _hits_of(model: Transformer, batch):
    """Of one device's tokens."""
    if not len(model.mtp_modules):
        raise ValueError("the model has no MTP")
    rules = model.rules
    segments_BT, positions_BT = batch["segments_BT"], batch["positions_BT"]
    output = model(batch["tokens_BT"], positions_BT=positions_BT, segments_BT=segments_BT)
    main_BT = model.logits(output.hidden_BTD).argmax(axis=-1)
    ahead_BT = jnp.asarray(depth_segments(segments_BT, 0, rules))
    drafted_BTD, _ = model.mtp(
        0,
        output.hidden_BTD,
        batch["targets_BT"],
        positions_BT=positions_BT,
        segments_BT=ahead_BT,
    )
    draft_BT = model.logits(drafted_BTD).argmax(axis=-1)
    # The last position of a row has no next one; depth_segments has made it padding.
    real_BT = ahead_BT != 0
    agree_BT = draft_BT == island.shift_row(main_BT, 1, rules)
    return jnp.sum(agree_BT & real_BT, dtype=jnp.float32), jnp.sum(real_BT, dtype=jnp.float32)
