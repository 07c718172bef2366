"""The one train step, in two programs: `accumulate` a micro-batch, `apply` the sum.

Serves every loss of the form `loss(model, batch, totals) -> (scalar, LossAux)`: pretraining, SFT,
distillation, GRPO. Knows nothing about what a batch holds beyond its leading dimension.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dsjax.config import ScheduleConfig
from dsjax.model.delayed import advanced, joined, parted
from dsjax.model.router import health, update_bias
from dsjax.model.transformer import Transformer, merge
from dsjax.train.loss import LossAux
from dsjax.train.schedule import value_at
from dsjax.train.state import TrainState
from sharding import island
from sharding.spread import Spread


@runtime_checkable
class Loss(Protocol):
    """What a step differentiates."""

    def totals(self, batch: dict, progress: float, over_processes: Callable) -> Any:
        """Denominators of the whole batch, on the host."""

    def __call__(self, model: Transformer, batch: dict, totals: Any) -> tuple[Array, LossAux]:
        """Loss of a micro-batch, already divided by the totals."""


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The programs of a step; each is traced once in a run.

    Attributes:
        loss: gives the totals of a batch.
        spread: how micro-batches get onto the devices.
        zero: params -> sums of nothing.
        accumulate: (params, bias, sums, micro-batch, totals) -> sums.
        apply: (state, sums, progress) -> (state, metrics).
    """

    loss: Loss
    spread: Spread
    zero: Callable
    accumulate: Callable
    apply: Callable

    def __call__(
        self, state: TrainState, batch: dict, *, progress: float, micro_batch_size: int
    ) -> tuple[TrainState, dict[str, Array]]:
        """Takes one optimizer step on a batch.

        Args:
            state: donated; use the one that comes back.
            batch: arrays of [B, ...] on the host; with several processes, of this one's rows.
            progress: share of the run's tokens seen before this step.
            micro_batch_size: rows an `accumulate` call, over all processes; must divide B.

        Returns:
            (the new state, metrics on device; `router/...` are [L] by stack).

        Raises:
            ValueError: if the batch does not divide into micro-batches.
        """
        rows, here = next(iter(batch.values())).shape[0], self.spread.own_rows(micro_batch_size)
        if rows % here:
            raise ValueError(f"{rows} rows do not divide into micro-batches of {here}")
        totals = self.loss.totals(batch, progress, self.spread.over_processes)
        params = joined(state.params, state.extra.get("amax", {}))
        with self.spread.mesh_set():
            sums = None
            for start in range(0, rows, here):
                micro = {name: value[start : start + here] for name, value in batch.items()}
                micro = self.spread(micro, micro_batch_size)
                if sums is None:
                    sums = self.zero(params, state.bias, micro, totals)
                sums = self.accumulate(params, state.bias, sums, micro, totals)
            return self.apply(state, sums, np.float32(progress))


def make_train_step(
    graphdef: nnx.GraphDef,
    loss: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    bias_speed: ScheduleConfig,
    ema_decay: float | None = None,
    spread: Spread = Spread(),  # noqa: B008
) -> TrainStep:
    """Builds the two programs.

    A step whose loss or gradient is not finite, or in which a token did not reach an expert,
    changes nothing but the counts in `extra`.

    Args:
        graphdef: the model's blueprint.
        loss: what to minimise.
        optimizer: its `update` takes `progress`.
        bias_speed: gamma of the balancing bias.
        ema_decay: of the moving average of the weights, where the state has one.
        spread: how micro-batches get onto the devices.
    """

    @jax.jit  # of its own, so that `zero` and `accumulate` share one trace
    def value_and_grad(params, bias, batch, totals):
        def local(params, bias, batch, totals):
            model = merge(graphdef, params, bias)
            if idle := set(island.inside(tuple(island.mesh_sizes()))) - set(model.rules.token_axes):
                # Each device along them would add the same gradient again.
                raise ValueError(f"tokens are not spread over {', '.join(sorted(idle))}")

            def of_params(params):
                return loss(merge(graphdef, params, bias), batch, totals)

            (_, aux), grads = jax.value_and_grad(of_params, has_aux=True)(params)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            told = {"metrics": aux.metrics, "load": aux.load, "overflow": aux.overflow}
            return {
                "grads": island.sum_gradients(grads, specs, model.rules),
                **island.sum_tokens(told, model.rules),
                "peaks": island.max_tokens(aux.peaks, model.rules),
            }

        specs = jax.tree.map(island.spec_of, params)
        told = ("metrics", "load", "overflow", "peaks")
        out_specs = {"grads": specs, **dict.fromkeys(told, P())}
        return island.run(local, out_specs, params, bias, batch, totals)

    def zero(params, bias, batch, totals):
        shapes = jax.eval_shape(value_and_grad, params, bias, batch, totals)
        sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes | {"grads": {}})
        sums["peaks"] = jax.tree.map(lambda peak: jnp.full_like(peak, -jnp.inf), sums["peaks"])
        # Like the parameters, on their devices.
        return sums | {"grads": jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)}

    def accumulate(params, bias, sums, batch, totals):
        new = value_and_grad(params, bias, batch, totals)
        peaks = jax.tree.map(jnp.maximum, sums["peaks"], new.pop("peaks"))
        sums = {name: sums[name] for name in new}
        sums = jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, new)
        return sums | {"peaks": peaks}

    def apply(state, sums, progress):
        (grads, seen), load = parted(sums["grads"]), sums["load"]
        updates, opt = optimizer.update(grads, state.opt, state.params, progress=progress)
        params = optax.apply_updates(state.params, updates)
        speed = value_at(bias_speed, progress)
        bias = {  # a loss without MTP tells no loads of its block
            key: update_bias(bias_LE, load[key], speed) if key in load else bias_LE
            for key, bias_LE in state.bias.items()
        }
        metrics = sums["metrics"] | sums["peaks"] | _norms(grads, params, updates)
        finite = jnp.isfinite(metrics["loss_total"]) & jnp.isfinite(metrics["grad_norm"])
        finite = finite & (sums["overflow"] == 0)
        # A choice a leaf, which XLA fuses into the update: no second pass over the state.
        params, bias, opt = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, bias, opt),
            (state.params, state.bias, state.opt),
        )
        extra = {
            "skipped": state.extra["skipped"] + ~finite,
            "skipped_in_a_row": jnp.where(finite, 0, state.extra["skipped_in_a_row"] + 1),
        }
        if seen:
            old = state.extra["amax"]
            extra["amax"] = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), advanced(old, seen), old
            )
        if ema_decay is not None:
            ema = update_ema(state.extra["ema"], params, state.step + 1, ema_decay)
            extra["ema"] = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), ema, state.extra["ema"]
            )
        metrics |= {"skipped_steps": extra["skipped"], "dispatch_overflow": sums["overflow"]}
        metrics |= {f"load/{key}": load_LE for key, load_LE in load.items()}
        metrics |= {f"bias/{key}": bias_LE for key, bias_LE in bias.items()}
        for key, load_LE in load.items():
            for sign, value_L in health(load_LE, bias.get(key)).items():
                metrics[f"router/{key}/{sign}"] = value_L
        return TrainState(state.step + 1, params, bias, opt, extra), metrics

    return TrainStep(
        loss=loss,
        spread=spread,
        zero=jax.jit(zero),
        accumulate=jax.jit(accumulate, donate_argnames="sums"),
        apply=jax.jit(apply, donate_argnames="state"),
    )


def update_ema(ema: Any, params: Any, step: Int[Array, ""], decay: float) -> Any:
    """Moves an average of the weights towards them (V3 report, 3.2.3).

    Args:
        ema: float32, in the tree of the parameters.
        params: the weights after the step.
        step: steps taken, this one included. Early on the average is over a tenth of them, so that
            it does not remember the random start.
        decay: what it keeps in the long run.
    """
    count = step.astype(jnp.float32)
    kept = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    return jax.tree.map(lambda e, p: e + (1.0 - kept) * (p.astype(jnp.float32) - e), ema, params)


def _norms(grads: Any, params: Any, updates: Any) -> dict[str, Float[Array, ""]]:
    return {
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(params),
        "update_norm": optax.tree.norm(updates),
    }
