"""Benchmarks `grouped_matmul` as it runs on CPU, against a dense product and jax.lax.ragged_dot.

python -m experiments.bench_grouped_matmul --groups=8 --groups=64 --out=grouped.json

Each is a forward and a backward pass in float32, of equal FLOPs. They alternate in one process, and
ratios of neighbours count, of wall time and of processor time: machines are shared. JSON goes to
stdout or to --out.
"""

import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from dsjax.errors import InputError
from experiments import command
from pallas_kernels.grouped_matmul import grouped_matmul

FLAGS = command.define_flags(default_preset=None, default_workdir=None)
flags.DEFINE_multi_integer("groups", [8, 32, 64], "Groups.", flag_values=FLAGS)
flags.DEFINE_integer("rows", 4096, "Rows of all groups.", flag_values=FLAGS)
flags.DEFINE_integer("d", 512, "What is contracted.", flag_values=FLAGS)
flags.DEFINE_integer("f", 256, "Columns of a group's weight.", flag_values=FLAGS)
flags.DEFINE_integer("block", 64, "Rows of a tile.", flag_values=FLAGS)
flags.DEFINE_integer("repeats", 15, "Passes of each.", flag_values=FLAGS)
flags.DEFINE_bool("ragged_dot", True, "Whether that one runs, too.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "File for the JSON; stdout if left out.", flag_values=FLAGS)


def _body(values: flags.FlagValues) -> None:
    for name, count in values.flag_values_dict().items():
        if name in ("rows", "d", "f", "block", "repeats") and count < 1:
            raise InputError(f"--{name} is {count}; it must be at least 1")
    for groups in values.groups:
        if groups < 1 or values.rows % (groups * values.block):
            raise InputError(
                f"{values.rows} rows do not divide into {groups} groups of whole tiles of"
                f" {values.block}"
            )
    result = {
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "groups": {groups: _measure(values, groups) for groups in values.groups},
        "load_average_after": os.getloadavg(),
    }
    text = json.dumps(result, indent=1)
    if values.out is None:
        print(text)
    else:
        Path(values.out).write_text(text + "\n", encoding="utf-8")


def _measure(values: flags.FlagValues, groups: int) -> dict:
    keys = jax.random.split(jax.random.key(values.seed), 3)
    x_XD = jax.random.normal(keys[0], (values.rows, values.d))
    w_EDF = jax.random.normal(keys[1], (groups, values.d, values.f))
    dy_XF = jax.random.normal(keys[2], (values.rows, values.f))
    each = values.rows // groups
    experts = jnp.repeat(jnp.arange(groups, dtype=jnp.int32), each // values.block)
    sizes = jnp.full(groups, each, jnp.int32)
    sides = {
        "dense": _both_passes(jnp.dot, x_XD, w_EDF[0], dy_XF),
        "grouped_matmul": _both_passes(
            functools.partial(grouped_matmul, tile_expert=experts), x_XD, w_EDF, dy_XF
        ),
    }
    if values.ragged_dot:
        ragged = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
        sides["ragged_dot"] = _both_passes(ragged, x_XD, w_EDF, dy_XF)
    wall: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(values.repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            if i > 0:  # the first one compiles
                wall[name].append(time.perf_counter() - start[0])
                processor[name].append(time.process_time() - start[1])
    return {
        "median_s": {name: statistics.median(taken) for name, taken in wall.items()},
        "over_dense": _over_dense(wall),
        "over_dense_processor": _over_dense(processor),
    }


def _both_passes(
    product: Callable[..., jax.Array], x_XD: jax.Array, w: jax.Array, dy_XF: jax.Array
) -> Callable[[], object]:
    """A compiled product, and its gradients of x and w for that of the result."""

    @jax.jit
    def both(x_XD, w, dy_XF):
        y_XF, backward = jax.vjp(product, x_XD, w)
        return y_XF, backward(dy_XF)

    return functools.partial(both, x_XD, w, dy_XF)


def _over_dense(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Pair by pair."""
    found = {}
    for name in seconds.keys() - {"dense"}:
        pairs = zip(seconds[name], seconds["dense"], strict=True)
        ratios = sorted(one / dense for one, dense in pairs)
        found[name] = {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}
    return found


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
