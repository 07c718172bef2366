"""What a checkpoint of reinforcement learning holds beside the state: a rollout, and the reference.

Knows nothing about steps or files.

N completions of at most C new tokens, sequences of at most Y.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from dsjax.config import Config, RlConfig
from dsjax.rl.rows import Sequences
from dsjax.train.state import abstract_state
from sharding.spread import Spread

_ROUTING = "routing_"  # before a stack's name


@dataclasses.dataclass(frozen=True)
class Scored:
    """A rollout with all that its steps read.

    Attributes:
        sequences: what was sampled; a count of 0 marks one that is not learned from.
        log_sample_NC: float32 log probabilities by the sampler.
        log_old_NC: those that ratios are against.
        log_ref_NC: by the reference; 0 where there is none.
        advantage_N: float32.
    """

    sequences: Sequences
    log_sample_NC: np.ndarray
    log_old_NC: np.ndarray
    log_ref_NC: np.ndarray
    advantage_N: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """As a checkpoint has them."""
        of = self.sequences
        return {
            "tokens_NY": of.tokens_NY,
            "prompt_N": of.prompt_N,
            "count_N": of.count_N.astype(np.int32),
            "advantage_N": self.advantage_N,
            "log_sample_NC": self.log_sample_NC,
            "log_old_NC": self.log_old_NC,
            "log_ref_NC": self.log_ref_NC,
            **{_ROUTING + name: kept for name, kept in of.routing.items()},
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Any]) -> "Scored":
        """The inverse of `arrays`."""
        arrays = {name: np.asarray(value) for name, value in arrays.items()}
        routing = {
            name.removeprefix(_ROUTING): value
            for name, value in arrays.items()
            if name.startswith(_ROUTING)
        }
        sequences = Sequences(arrays["tokens_NY"], arrays["prompt_N"], arrays["count_N"], routing)
        names = ("log_sample_NC", "log_old_NC", "log_ref_NC", "advantage_N")
        return cls(sequences, **{name: arrays[name] for name in names})


def abstract(config: Config, rl: RlConfig, spread: Spread) -> dict[str, Any]:
    """Shapes and places of all that a checkpoint holds.

    Returns:
        The fields of the state; `reference`, weights and biases, where there is a KL weight; and
        `rollout`, as `Scored.arrays` makes it, whole on each device.
    """
    state = abstract_state(config, spread.rules, spread.mesh)
    like = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    if rl.kl_weight > 0:
        like["reference"] = {"params": state.params, "bias": state.bias}
    whole = SingleDeviceSharding(jax.local_devices()[0])
    if spread.mesh is not None:
        whole = NamedSharding(spread.mesh, PartitionSpec())
    like["rollout"] = {
        name: jax.ShapeDtypeStruct(shape, kind, sharding=whole)
        for name, (shape, kind) in _shapes(config, rl).items()
    }
    return like


def _shapes(config: Config, rl: RlConfig) -> dict[str, tuple[tuple[int, ...], Any]]:
    n, y, c = rl.completions, rl.longest, rl.max_completion_tokens
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "tokens_NY": ((n, y), np.int32),
        "prompt_N": ((n,), np.int32),
        "count_N": ((n,), np.int32),
        "advantage_N": ((n,), np.float32),
        **{f"log_{name}_NC": ((n, c), np.float32) for name in ("sample", "old", "ref")},
    }
    if rl.replay_routing:
        for stack in config.model.stacks:
            for i, block in enumerate(stack.blocks):
                if chosen := getattr(block.ffn, "num_experts_per_token", 0):
                    shape = n, y, stack.repeats, chosen
                    shapes[_ROUTING + stack.key(i)] = shape, np.uint16
    return shapes
