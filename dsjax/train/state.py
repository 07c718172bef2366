"""The state of a run, as plain nested dicts of arrays.

Knows nothing about files or loops.
"""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import PRNGKeyArray

from dsjax.config import Config
from dsjax.model.transformer import build, split
from dsjax.train.optimizer import adamw, decays
from sharding.init import init
from sharding.rules import AxisRules


@no_type_check  # its leaves may be shapes, shardings or flags
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes.

    Attributes:
        step: int32, optimizer steps taken.
        params: what gradients train.
        bias: {stack: float32 [L, E]} balancing biases, which they do not.
        opt: the optimizer's state.
        extra: counts and averages that belong to the run and not to the model.
    """

    step: jax.Array
    params: Any
    bias: Any
    opt: Any
    extra: Any


def create(
    config: Config, key: PRNGKeyArray, rules: AxisRules
) -> tuple[nnx.GraphDef, TrainState, optax.GradientTransformationExtraArgs]:
    """Makes a run's first state.

    Returns:
        (graphdef, state, the optimizer whose state it holds).
    """
    make = build(config, rules)
    optimizer = adamw(config.train.optimizer, decays(jax.eval_shape(make, key)))
    graphdef, params, bias = split(init(make, key, rules))
    opt = jax.jit(optimizer.init)(params)
    return graphdef, TrainState(jnp.zeros((), jnp.int32), params, bias, opt, {}), optimizer
