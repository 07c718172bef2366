"""What the scripts that train share: the processes of a run, how it went, its model at the end."""

from contextlib import AbstractContextManager
from typing import Any

import jax
from absl import flags

from dsjax.config import Config
from dsjax.errors import InputError, RunError
from dsjax.meshes import spread_of
from dsjax.train.loop import PretrainResult
from sharding.distributed import Processes, start


def define_processes(values: flags.FlagValues) -> None:
    """The flags of a script that several processes can run together."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "host:port of process 0, where several processes are one run; auto: SLURM, Kubernetes or a "
        "TPU pod says who they are. Each process gives the same flags but --process_id.",
        flag_values=values,
    )
    flags.DEFINE_integer("process_id", None, "This process's number, from 0.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "How many there are.", flag_values=values)


def joined(values: flags.FlagValues) -> AbstractContextManager[Processes]:
    """This process among those that the flags name, until the context is left.

    Raises:
        InputError: if the flags do not go together, or the processes do not.
    """
    return start(
        values.coordinator,
        values.process_id,
        values.num_processes,
        refusal=InputError,
        loss=RunError,
    )


def tell(result: PretrainResult) -> bool:
    """Prints how a run went; False if it was stopped before its end."""
    if result.before is None or result.after is None:
        print(f"stopped by {result.stopped_by} at step {result.step}; the same command goes on")
        return False
    for label, figures in (("before", result.before), ("after", result.after)):
        loss, bits = figures["eval_loss"], figures["bits_per_byte"]
        print(f"held-out loss {label}: {loss:.4f} nats a token, {bits:.4f} bits a byte")
    if result.tokens_per_s is not None:
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in result.shares.items())
        print(f"{result.tokens_per_s:,.0f} tokens/s; wall time: {shares}")
    return True


def place(config: Config) -> dict[str, Any] | None:
    """Where `load_pretrained` puts a run's model: on its mesh. None, and told, if it is shared."""
    mesh = spread_of(config.mesh).mesh if jax.process_count() == 1 else None
    if config.mesh.num_devices > 1 and mesh is None:
        print("no samples: a model of several processes; experiments.generate loads it")
        return None
    return {} if mesh is None else {"mesh": mesh, "rules": config.mesh.rules}
