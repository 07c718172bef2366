"""The state of a run, as plain nested dicts of arrays.

Knows nothing about files or loops.
"""

import contextlib
import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from dsjax.config import Config
from dsjax.meshes import specs_of
from dsjax.model.delayed import histories
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
        step: int32, steps of the run, skipped ones included.
        params: what gradients train.
        bias: {stack: float32 [L, E]} balancing biases, which they do not.
        opt: the optimizer's state.
        extra: int32 `skipped` and `skipped_in_a_row`, steps that were not finite; `ema`, float32
            moving averages in the tree of the parameters, where the run keeps them; `amax`, the
            histories of delayed scaling, where the recipe has it (`dsjax.model.delayed`).
    """

    step: jax.Array
    params: Any
    bias: Any
    opt: Any
    extra: Any


def blueprint(
    config: Config, rules: AxisRules
) -> tuple[nnx.GraphDef, optax.GradientTransformationExtraArgs]:
    """The model's blueprint and the optimizer of a configuration; makes no array."""
    model = jax.eval_shape(build(config, rules), jax.random.key(0))
    return split(model)[0], adamw(config.train.optimizer, decays(model))


def create(
    config: Config, key: PRNGKeyArray, rules: AxisRules, mesh: Mesh | None = None
) -> TrainState:
    """Makes a run's first state, committed to its devices as a restored one is.

    The same programs then serve both.

    Args:
        config: of the run.
        key: of the random parameters, which are the same on every mesh.
        rules: where each logical axis goes.
        mesh: None for one device.
    """
    _, optimizer = blueprint(config, rules)
    with _set(mesh):
        _, params, bias = split(init(build(config, rules), key, rules))
        opt = jax.jit(optimizer.init)(params)
    return fresh_state(config, params, bias, opt, mesh)


def fresh_state(
    config: Config, params: Any, bias: Any, opt: Any, mesh: Mesh | None = None
) -> TrainState:
    """The state of a run that begins with these weights."""
    with _set(mesh):
        state = _first(config, params, bias, opt)
    if mesh is not None:
        return state
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), state)


def abstract_state(config: Config, rules: AxisRules, mesh: Mesh | None = None) -> TrainState:
    """Shapes, dtypes and shardings of `create`'s state, to read a saved one into.

    Raises:
        InputError: if a dimension of a weight does not divide.
    """
    _, optimizer = blueprint(config, rules)
    model = jax.eval_shape(build(config, rules), jax.random.key(0))
    _, params, bias = split(model)
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    by_leaf = {} if mesh is None else specs_of(config, rules, dict(mesh.shape))

    def first(params, bias):
        return _first(config, params, bias, optimizer.init(params))

    def placed(path, leaf):
        sharding = single
        if mesh is not None:
            # What belongs to a parameter is named as it is, behind what it is of it.
            names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
            tails = (".".join(names[start:]) for start in range(len(names)))
            spec = next((by_leaf[tail] for tail in tails if tail in by_leaf), None)
            # As a step returns it: on an explicit mesh how an array lies is part of its type.
            spec = PartitionSpec(*(None,) * leaf.ndim) if spec is None else spec
            sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(placed, jax.eval_shape(first, params, bias))


def _set(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _first(config: Config, params: Any, bias: Any, opt: Any) -> TrainState:
    extra: dict[str, Any] = {
        "skipped": jnp.zeros((), jnp.int32),
        "skipped_in_a_row": jnp.zeros((), jnp.int32),
    }
    if config.precision.recipe == "fp8_per_tensor":
        extra["amax"] = histories(jax.eval_shape(build(config), jax.random.key(0)))
    if config.train.ema_decay is not None:  # copies: steps donate what they are given
        extra["ema"] = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    return TrainState(jnp.zeros((), jnp.int32), params, bias, opt, extra)
