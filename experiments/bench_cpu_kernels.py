"""Benchmarks ops as they run on a CPU: each against what a user would write in its place.

python -m experiments.bench_cpu_kernels --op=grouped_matmul --groups=8 --groups=64 --out=cpu.json
python -m experiments.bench_cpu_kernels --op=mla_attention --rows=512 --rows=4096

`grouped_matmul` against a dense product of equal FLOPs and jax.lax.ragged_dot; `mla_attention`
against its plain form, which builds all scores. Each is a forward and a backward pass in float32.
They alternate in one process, and ratios of neighbours count, of wall time and of processor time:
machines are shared. JSON goes to stdout or to --out.
"""

import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from dsjax.errors import InputError
from experiments import command
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.mla_attention import mla_attention

FLAGS = command.define_flags(default_preset=None, default_workdir=None)
flags.DEFINE_multi_enum(
    "op",
    ["grouped_matmul", "mla_attention"],
    ["grouped_matmul", "mla_attention"],
    "What is measured.",
    flag_values=FLAGS,
)
flags.DEFINE_multi_integer(
    "groups",
    [8, 32, 64],
    "Groups of 4,096 rows in all, [4096, 512] by [G, 512, 256], in tiles of 64.",
    lower_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_multi_integer(
    "rows",
    [512, 4096],
    "Lengths of sequences, of 4,096 tokens in all: four heads, 48 wide, of values 32.",
    lower_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_integer("tokens", 4096, "Tokens of all sequences or groups.", 1, flag_values=FLAGS)
flags.DEFINE_integer("repeats", 15, "Passes of each.", 1, flag_values=FLAGS)
flags.DEFINE_bool("ragged_dot", True, "Whether that one runs, too.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "File for the JSON; stdout if left out.", flag_values=FLAGS)

BLOCK, D, F = 64, 512, 256  # rows of a group's tile, what is contracted, columns of its weight
HEADS, A, H = 4, 48, 32  # and widths of keys and of values


def _body(values: flags.FlagValues) -> None:
    tokens = values.tokens
    for groups in values.groups:
        if tokens % (groups * BLOCK):
            raise InputError(
                f"{tokens} tokens do not divide into {groups} groups of whole tiles of {BLOCK}"
            )
    for rows in values.rows:
        if tokens % rows:
            raise InputError(f"{tokens} tokens do not divide into sequences of {rows}")
    result: dict[str, Any] = {
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
    }
    if "grouped_matmul" in values.op:
        result["groups"] = {groups: _grouped(values, groups) for groups in values.groups}
    if "mla_attention" in values.op:
        result["rows"] = {rows: _attention(values, rows) for rows in values.rows}
    result["load_average_after"] = os.getloadavg()
    text = json.dumps(result, indent=1)
    if values.out is None:
        print(text)
    else:
        Path(values.out).write_text(text + "\n", encoding="utf-8")


def _grouped(values: flags.FlagValues, groups: int) -> dict:
    keys = jax.random.split(jax.random.key(values.seed), 3)
    x_XD = jax.random.normal(keys[0], (values.tokens, D))
    w_EDF = jax.random.normal(keys[1], (groups, D, F))
    dy_XF = jax.random.normal(keys[2], (values.tokens, F))
    each = values.tokens // groups
    experts = jnp.repeat(jnp.arange(groups, dtype=jnp.int32), each // BLOCK)
    product = functools.partial(grouped_matmul, tile_expert=experts)
    sides = {
        "dense": _both_passes(jnp.dot, dy_XF, x_XD, w_EDF[0]),
        "grouped_matmul": _both_passes(product, dy_XF, x_XD, w_EDF),
    }
    if values.ragged_dot:
        sizes = jnp.full(groups, each, jnp.int32)
        ragged = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
        sides["ragged_dot"] = _both_passes(ragged, dy_XF, x_XD, w_EDF)
    return _alternate(sides, "dense", values.repeats)


def _attention(values: flags.FlagValues, rows: int) -> dict:
    keys = jax.random.split(jax.random.key(values.seed), 4)
    batch = values.tokens // rows
    q_BTNA, k_BTNA = (jax.random.normal(key, (batch, rows, HEADS, A)) for key in keys[:2])
    v_BTNH, dy_BTNH = (jax.random.normal(key, (batch, rows, HEADS, H)) for key in keys[2:])
    ids = (
        jnp.ones((batch, rows), jnp.int32),
        jnp.tile(jnp.arange(rows, dtype=jnp.int32), (batch, 1)),
    )

    def attention(name):
        def attend(q, k, v):
            return mla_attention(q, k, v, *ids, A**-0.5, implementation=name)

        return _both_passes(attend, dy_BTNH, q_BTNA, k_BTNA, v_BTNH)

    sides = {"plain": attention("reference"), "mla_attention": attention("xla")}
    return _alternate(sides, "plain", values.repeats)


def _alternate(sides: dict[str, Callable[[], object]], base: str, repeats: int) -> dict:
    """Medians of each side, and ratios to the base, which ran beside it."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            if i > 0:  # the first one compiles
                wall[name].append(time.perf_counter() - start[0])
                processor[name].append(time.process_time() - start[1])
    return {
        "median_s": {name: statistics.median(taken) for name, taken in wall.items()},
        f"over_{base}": _over(base, wall),
        f"over_{base}_processor": _over(base, processor),
    }


def _both_passes(
    function: Callable[..., jax.Array], dy: jax.Array, *operands: jax.Array
) -> Callable[[], object]:
    """A compiled function, and its gradients of the operands for that of the result."""

    @jax.jit
    def both(dy, *operands):
        y, backward = jax.vjp(function, *operands)
        return y, backward(dy)

    return functools.partial(both, dy, *operands)


def _over(base: str, seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Pair by pair."""
    found = {}
    for name in seconds.keys() - {base}:
        pairs = zip(seconds[name], seconds[base], strict=True)
        ratios = sorted(one / other for one, other in pairs)
        found[name] = {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}
    return found


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
