"""Modules whose every array is born where it belongs, and modules stacked along `layers`.

The only file of this room that reads Flax: a variable's logical axes are in its metadata.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key, PRNGKeyArray

from sharding.island import mesh_sizes
from sharding.rules import AxisRules


def is_variable(node: Any) -> bool:
    """True for a Flax variable; the leaf test of the maps below."""
    return isinstance(node, nnx.Variable)


def stack[M: nnx.Module](make: Callable[[jax.Array], M], keys: Key[Array, " L"]) -> M:
    """Builds one module a key, stacked: every variable gains a leading `layers` dimension."""
    module = jax.vmap(make)(keys)
    for _, node in nnx.iter_graph(module):
        if is_variable(node):
            node.set_metadata(axes=("layers", *node.get_metadata()["axes"]))
    return module


def specs(module: Any, rules: AxisRules, sizes: Mapping[str, int] | None = None) -> Any:
    """How each variable of a module, or of a tree of variables, lies on a mesh.

    Args:
        module: with variables, or their shapes, that name their logical axes.
        rules: where those go.
        sizes: devices along each mesh axis; None takes those of the mesh that is set.

    Returns:
        PartitionSpecs, in the place of the variables.

    Raises:
        LayoutError: for a dimension that does not divide, naming the variable's logical axes.
    """
    sizes = mesh_sizes() if sizes is None else sizes

    def spec(variable):
        return rules.spec(variable.get_metadata()["axes"], variable.shape, sizes)

    return jax.tree.map(spec, module, is_leaf=is_variable)


def init[M: nnx.Module](make: Callable[[jax.Array], M], key: PRNGKeyArray, rules: AxisRules) -> M:
    """Builds a module with every array sharded by its logical axes from the start."""
    return program(make, key, rules)(key)


def program(make: Callable, key: PRNGKeyArray, rules: AxisRules) -> jax.stages.Wrapped:
    """The function of a key, under `jit`, that `init` runs.

    `jit(out_shardings=)` would hold replicated temporaries on an explicit mesh; `auto_axes` does
    not. Without a mesh it is a plain `jit`.
    """
    # It runs once: on CPU, compiling it unoptimised takes a third of the time in all.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    if not jax.sharding.get_abstract_mesh().empty:
        make = jax.sharding.auto_axes(make, out_sharding=specs(jax.eval_shape(make, key), rules))
    return jax.jit(make, compiler_options=options)
