"""Values that move with the share of the run's tokens already seen.

Knows nothing about what the value is for.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsjax.config import PhaseConfig, ScheduleConfig


def value_at(schedule: ScheduleConfig, progress: Float[Array, ""] | float) -> Float[Array, ""]:
    """Evaluates a schedule.

    Args:
        schedule: its phases.
        progress: float32 share of the run's tokens seen, in [0, 1].

    Returns:
        float32 scalar. A constant phase takes its value from its first moment.
    """
    progress = jnp.asarray(progress, jnp.float32)
    starts = [0.0, *(phase.until for phase in schedule.phases[:-1])]
    befores = [schedule.start, *(phase.value for phase in schedule.phases[:-1])]
    result = jnp.float32(0.0)
    # From the last phase to the first: the earliest phase that has not ended wins.
    for start, before, phase in reversed(list(zip(starts, befores, schedule.phases, strict=True))):
        inside = _within(phase, before, (progress - start) / (phase.until - start))
        last = phase is schedule.phases[-1]
        result = inside if last else jnp.where(progress < phase.until, inside, result)
    return result


def _within(phase: PhaseConfig, before: float, share: jax.Array) -> jax.Array:
    share = jnp.clip(share, 0.0, 1.0)
    if phase.shape == "constant":
        return jnp.full_like(share, phase.value)
    if phase.shape == "linear":
        return before + (phase.value - before) * share
    return phase.value + (before - phase.value) * 0.5 * (1.0 + jnp.cos(jnp.pi * share))
