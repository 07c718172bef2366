"""AdamW with global-norm clipping, and moments in a dtype of their own.

Optax keeps only the first moment in another dtype; V3 keeps both in BF16 (report, 3.3.3), which is
why this is ours. Knows nothing about models beyond which leaves decay.
Source: Loshchilov and Hutter, arXiv 1711.05101.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsjax.config import OptimizerConfig
from dsjax.train.schedule import value_at


def decays(model: nnx.Module) -> dict:
    """Which parameters decay: matrices do, the scales of norms and the biases do not.

    Told by logical axes, not by rank: a stack adds a leading `layers` dimension to both. A bias by
    heads, which has two, says itself that it does not (`layers.bias`).

    Args:
        model: a model, or the abstract one of `jax.eval_shape`.

    Returns:
        bools in the tree of the parameters.
    """

    def decays(variable):
        metadata = variable.get_metadata()
        axes = [axis for axis in metadata["axes"] if axis != "layers"]
        return metadata.get("decays", len(axes) > 1)

    params = nnx.state(model, nnx.Param)
    flags = jax.tree.map(decays, params, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return nnx.to_pure_dict(flags)


def adamw(config: OptimizerConfig, decayed: dict) -> optax.GradientTransformationExtraArgs:
    """Clips by the global norm, then takes an AdamW step.

    Args:
        config: coefficients; the learning rate is `learning_rate * schedule(progress)`.
        decayed: bools in the tree of the parameters.

    Returns:
        An optax transformation whose `update` takes `progress`, the share of tokens seen, and
        whose state is a plain dict {count, mu, nu}. Float32 inside, whatever the moments' dtype.
    """
    moment_dtype = jnp.dtype(config.moment_dtype)

    def init(params):
        def zeros():
            # Like the parameters, on their devices.
            return jax.tree.map(lambda p: jnp.zeros_like(p, moment_dtype), params)

        return {"count": jnp.zeros((), jnp.int32), "mu": zeros(), "nu": zeros()}

    def update(grads, state, params, *, progress, **_):
        count = state["count"] + 1
        clip = jnp.minimum(1.0, config.clip_norm / jnp.maximum(optax.tree.norm(grads), 1e-20))
        rate = config.learning_rate * value_at(config.schedule, progress)
        correction1 = 1.0 - config.beta1 ** count.astype(jnp.float32)
        correction2 = 1.0 - config.beta2 ** count.astype(jnp.float32)

        def leaf(grad, mu, nu, param, decay):
            grad = grad.astype(jnp.float32) * clip
            mu = config.beta1 * mu.astype(jnp.float32) + (1.0 - config.beta1) * grad
            nu = config.beta2 * nu.astype(jnp.float32) + (1.0 - config.beta2) * jnp.square(grad)
            step = (mu / correction1) / (jnp.sqrt(nu / correction2) + config.eps)
            if decay:
                step = step + config.weight_decay * param.astype(jnp.float32)
            return -rate * step, mu.astype(moment_dtype), nu.astype(moment_dtype)

        moved = jax.tree.map(leaf, grads, state["mu"], state["nu"], params, decayed)
        updates, mu, nu = _unzip(moved, grads)
        return updates, {"count": count, "mu": mu, "nu": nu}

    # optax's protocol cannot say that `params` and `progress` must be given.
    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def _unzip(tree_of_tuples: Any, like: Any) -> tuple[Any, ...]:
    """Turns a tree of 3-tuples into three trees."""
    leaves = jax.tree.structure(like).flatten_up_to(tree_of_tuples)
    return tuple(
        jax.tree.unflatten(jax.tree.structure(like), part) for part in zip(*leaves, strict=True)
    )
