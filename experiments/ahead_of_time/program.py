"""Compiles one program of a model for devices that are not there, and says what it takes.

A process of its own, made by `experiments.compile_check`, for a description of CUDA devices must be
the first thing that JAX makes. The request is JSON on stdin, the answer one line of it on stdout.
"""

import dataclasses
import json
import math
import os
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.config import Config
from dsjax.errors import InputError
from dsjax.infer.generate import decode, prefill
from dsjax.meshes import rules_of
from dsjax.model.cache import contiguous_table, empty_entries, page_axes
from dsjax.model.transformer import merge
from dsjax.overrides import from_json
from dsjax.train.state import abstract_state, blueprint
from experiments.ahead_of_time import topologies
from sharding import island
from sharding.mesh import MeshShape, make_mesh
from sharding.rules import LayoutError


def _compile(request: dict, config: Config, mesh: Mesh) -> dict:
    # What predicts further tokens has no part in these programs.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, mtp=None))
    rules, rows, cached = rules_of(config.mesh), request["rows"], request["cached"]
    graphdef, _ = blueprint(config, rules)
    state = abstract_state(config, rules, mesh)
    batch, pages = rules.of("batch"), page_axes(config.model, rules)
    sizes = dict(mesh.shape)
    row_parts = math.prod(sizes[a] for a in batch)
    page_parts = math.prod(sizes[a] for a in pages)
    if rows % row_parts:
        raise InputError(f"--rows={rows} does not divide over {row_parts} devices with rows")

    def placed(shape: jax.ShapeDtypeStruct, *spec) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    def int_B(*shape):
        return placed(jax.ShapeDtypeStruct((rows, *shape), jnp.int32), batch or None)

    table_BX = jax.eval_shape(lambda: contiguous_table(rows, cached, page_parts))
    num_pages = table_BX.size * page_parts
    dtype = jnp.dtype(config.precision.compute_dtype)
    entries = jax.eval_shape(
        lambda: empty_entries(config.model, num_pages, dtype, config.infer.cache)
    )
    entries = jax.tree.map(lambda x: _row_major(placed(x, None, (*batch, *pages) or None)), entries)
    by_row, by_page = PartitionSpec(batch or None), PartitionSpec(None, (*batch, *pages) or None)
    specs = jax.tree.map(lambda _: by_page, entries)

    def step(params, bias, tokens, length_B, entries, table_BX):
        def local(params, bias, tokens, length_B, entries, table_BX):
            model = merge(graphdef, params, bias)
            if request["program"] == "decode":
                running_B = length_B > 0
                return decode(model, tokens, length_B, running_B, entries, table_BX)[:2]
            chunk = config.infer.prefill_chunk
            return prefill(model, tokens, length_B, entries, table_BX, chunk=chunk)[:2]

        arguments = params, bias, tokens, length_B, entries, table_BX
        return island.run(local, (by_row, specs), *arguments)

    tokens = int_B() if request["program"] == "decode" else int_B(cached)
    table_BX = placed(table_BX, batch or None)
    began = time.monotonic()
    with jax.set_mesh(mesh):
        formats = None, jax.tree.map(lambda x: x.format, entries)
        lowered = jax.jit(step, donate_argnums=4, out_shardings=formats).lower(
            state.params, state.bias, tokens, int_B(), entries, table_BX
        )
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    assert memory is not None  # of a compiled program
    cache = _bytes_per_device(entries)
    weights = _bytes_per_device((state.params, state.bias))
    return {
        "topology": request["topology"],
        "program": request["program"],
        "mesh": config.mesh.axes,
        "rows": rows,
        "cached": cached,
        "bytes_per_device": {
            "arguments": memory.argument_size_in_bytes,
            "weights": weights,
            "cache": cache,
            "temporaries": memory.temp_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "peak": memory.peak_memory_in_bytes,
        },
        "kernels": topologies.mosaic_kernels(compiled.as_text() or ""),
        "compile_s": round(time.monotonic() - began, 1),
    }


def _row_major(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """As kernels read it.

    Left alone, XLA on TPU packs what crosses a program's border more densely, and every step would
    copy the whole cache twice.
    """
    order = Layout(tuple(range(len(x.shape))))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=Format(order, x.sharding))


def _bytes_per_device(tree) -> int:
    """As arrays are, without what a device's layout adds."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def main() -> int:
    """Answers the request."""
    # Compilers print to stdout, which is for the answer.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    try:
        devices = topologies.devices(request["topology"])
        config = from_json(Config, request["config"])
        if config.mesh.num_devices != len(devices):
            raise InputError(
                f"the mesh has {config.mesh.num_devices} devices, {request['topology']} has "
                f"{len(devices)}"
            )
        found = _compile(request, config, make_mesh(MeshShape(**config.mesh.axes), devices))
    except (InputError, LayoutError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    print(json.dumps(found), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
