"""How many parameters a configuration has, and how many bytes of cache a token costs it.

Knows nothing about devices: it reads the shapes of a model that is never made, so 671 billion
parameters are counted in a fraction of a second.

D model width, E experts, K experts a token, V vocabulary, C key/value latent, R rope width,
I key/value heads of widths A and H.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config import Config, ModelConfig, MoeConfig
from dsjax.model.cache import PAGE_SIZE, empty_entries
from dsjax.model.transformer import build


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Trained numbers of a model; the routers' balancing biases, which are not, are left out.

    Attributes:
        total: of the main model, embedding and head included, MTP not.
        mtp: of the prediction modules, which share the main model's embedding and head.
        active: what one token is multiplied with: `total` without the embedding, which is looked
            up, and with K of every layer's E routed experts. A tied embedding stays in: as the head
            it is a product.
        embedding: V * D, of the embedding alone.
    """

    total: int
    mtp: int
    active: int
    embedding: int


def parameter_counts(config: Config) -> ParameterCounts:
    """Counts the parameters of a configuration from abstract shapes; allocates nothing."""
    blueprint = jax.eval_shape(build(config), jax.random.key(0))
    blocks = {stack.name: stack.blocks for stack in config.model.stacks}
    total = mtp = idle = embedding = 0
    for path, variable in nnx.to_flat_state(nnx.state(blueprint, nnx.Param)):
        size = math.prod(variable.shape)
        if path[0] == "mtp_modules":
            mtp += size
            continue
        total += size
        if path[0] == "embed_VD":
            embedding = size
        if "experts" in variable.get_metadata()["axes"]:
            _, stack, index, *_ = path
            assert isinstance(stack, str)
            assert isinstance(index, int)
            ffn = blocks[stack][index].ffn
            assert isinstance(ffn, MoeConfig)
            idle += size // ffn.num_experts * (ffn.num_experts - ffn.num_experts_per_token)
    looked_up = 0 if config.model.tie_embeddings else embedding
    return ParameterCounts(
        total=total, mtp=mtp, active=total - idle - looked_up, embedding=embedding
    )


def cache_bytes_per_token(config: ModelConfig, bytes_per_number: int | float) -> float:
    """Bytes that one cached token takes in all layers; MTP caches none.

    C + R numbers a layer of latent attention, I * (A + H) of grouped-query attention.

    Args:
        config: the model.
        bytes_per_number: 2 for bfloat16; V2's published figure has 0.75, six bits.
    """
    page = jax.eval_shape(lambda: empty_entries(config, 1, jnp.bfloat16))
    numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(page)) // PAGE_SIZE
    return float(numbers * bytes_per_number)
