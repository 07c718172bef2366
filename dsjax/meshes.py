"""A configuration's mesh: its devices, its rules, and whether the run fits.

Knows nothing about steps or files.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from flax.nnx.graphlib import Static
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dsjax.config import Config, MeshConfig
from dsjax.errors import InputError
from dsjax.model.transformer import build
from dsjax.precision import Quantized
from pallas_kernels.tiled import TILE
from sharding.mesh import MeshShape, make_mesh
from sharding.rules import PRESETS, AxisRules, Exchange, Layout, LayoutError, as_spec
from sharding.spread import Spread


def rules_of(config: MeshConfig) -> AxisRules:
    """The rules that a configuration names, with its exchange."""
    exchange = Exchange(kind=config.exchange, buffer_factor=config.buffer_factor, wire=config.wire)
    return dataclasses.replace(PRESETS[config.rules], exchange=exchange)


def spread_of(config: MeshConfig) -> Spread:
    """The mesh over all processes' devices, and how rows lie on it; no mesh for one device.

    Raises:
        InputError: if there are not as many devices, naming both numbers, if a process's border
            cuts rows, or for an exchange that the backend has not got.
    """
    devices, rules = jax.devices(), rules_of(config)
    if config.num_devices == 1 and jax.process_count() == 1:
        return Spread(None, rules)
    shape = ", ".join(f"{name}={size}" for name, size in config.axes.items() if size > 1)
    if config.num_devices > len(devices):
        raise InputError(
            f"mesh ({shape}) needs {config.num_devices} devices; there are {len(devices)}"
        )
    if jax.process_count() > 1 and config.num_devices != len(devices):
        raise InputError(
            f"mesh ({shape or 'one device'}) has {config.num_devices} devices, but the "
            f"{jax.process_count()} processes have {len(devices)}; with several processes all take "
            "part"
        )
    if config.exchange == "ragged" and jax.default_backend() == "cpu":
        raise InputError("mesh.exchange ragged does not run on CPUs; take auto or dense")
    spread = Spread(make_mesh(MeshShape(**config.axes)), rules)
    try:
        spread.check_processes()
    except LayoutError as error:
        raise InputError(f"mesh ({shape}): {error}") from error
    return spread


def check_training(config: Config) -> None:
    """Checks that a run fits its mesh, before anything is made; needs no devices.

    Raises:
        InputError: naming what does not divide, and both sizes.
    """
    mesh, rules = config.mesh, rules_of(config.mesh)
    if mesh.num_devices == 1:
        return
    if mesh.rules == "decode":
        raise InputError(
            "mesh.rules decode lays weights out for generation; training takes fsdp, "
            "fsdp_ep or fsdp_ep_tp"
        )
    for axis, size in mesh.axes.items():
        if size > 1 and axis not in rules.token_axes:
            use = [name for name, r in PRESETS.items() if axis in r.token_axes if name != "decode"]
            told = f"; {', '.join(use)} would" if use else ""
            raise InputError(
                f"mesh.{axis} is {size}, but the rules {mesh.rules!r} lay nothing over it{told}"
            )
    _check_rows(config, rules)
    specs_of(config, rules, mesh.axes)


def layouts_of(
    config: Config, rules: AxisRules, sizes: Mapping[str, int]
) -> dict[str, tuple[nnx.Variable, Layout]]:
    """How each parameter lies on a mesh, by its dotted path, and its shape.

    Args:
        config: of the model.
        rules: where each logical axis goes.
        sizes: devices along each mesh axis.

    Raises:
        InputError: for a dimension that does not divide, naming the weight and the devices, or of
            which FP8's blocks would be cut for good.
    """
    model = jax.eval_shape(build(config, rules), jax.random.key(0))
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path))
        try:
            layout = rules.layout(variable.get_metadata()["axes"], variable.shape, sizes)
        except LayoutError as error:
            raise InputError(f"{name}: {error}") from error
        found[name] = variable, layout
        if config.precision.recipe == "fp8":
            _check_blocks(name, variable, layout, rules, sizes)
    return found


def _check_blocks(name, variable, layout, rules, sizes):
    """Of a weight that devices compute with in parts, each has whole blocks of FP8.

    Where it is gathered before use its borders may lie anywhere (`dsjax.model.fp8`).
    """
    told = variable.get_metadata()
    if not told.get("linear"):
        return
    for dim, (axis, over) in enumerate(zip(told["axes"], layout, strict=True)):
        apart = [a for a in over if a in rules.kept(axis)]
        if not apart or axis not in ("heads", "mlp"):
            continue
        whole = variable.shape[dim] * (variable.shape[dim + 1] if axis == "heads" else 1)
        here = whole // math.prod(sizes[a] for a in apart)
        if here % TILE:
            parts = " x ".join(f"{a}={sizes[a]}" for a in apart)
            raise InputError(
                f"{name}: over {parts} a device has {here} of {whole} numbers along {axis}; "
                f"precision.recipe fp8 needs whole blocks of {TILE}"
            )


def specs_of(
    config: Config, rules: AxisRules, sizes: Mapping[str, int]
) -> dict[str, PartitionSpec]:
    """`layouts_of` as PartitionSpecs."""
    found = layouts_of(config, rules, sizes)
    return {name: as_spec(layout) for name, (_, layout) in found.items()}


def placed(
    params: Any, bias: Any, config: Config, rules: AxisRules, mesh: Mesh | None
) -> tuple[Any, Any]:
    """The shapes of a model's arrays with the places where the rules put them.

    Raises:
        InputError: if a dimension does not divide, naming the weight and the devices.
    """
    if mesh is None:
        single = SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=single), (params, bias)
        )
    by_name = specs_of(config, rules, dict(mesh.shape))

    def leaf(path, x):
        spec = by_name[jax.tree_util.keystr(path, simple=True, separator=".")]
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    def whole(x):  # as a step returns it: how an array lies is part of its type
        sharding = NamedSharding(mesh, PartitionSpec(*(None,) * x.ndim))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(leaf, params), jax.tree.map(whole, bias)


def move(
    params: Any, bias: Any, config: Config, rules: AxisRules, mesh: Mesh | None
) -> tuple[Any, Any]:
    """Moves a model's arrays to where the rules put them; those that lie there stay.

    Raises:
        InputError: if a dimension does not divide, or a weight kept in FP8 would be cut.
    """
    if mesh is None:
        return params, bias
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    if any(isinstance(leaf, Quantized) for leaf in leaves):
        raise InputError("weights kept in FP8 are laid out as they are loaded: load them again")
    like = placed(params, bias, config, rules, mesh)
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), (params, bias), like)


def blueprint_rules(graphdef: nnx.GraphDef) -> AxisRules:
    """The rules that a model's blueprint was made with."""
    # Of a module's static fields; merging arrays to read one would take milliseconds.
    fields = {name: field.value for name, field in graphdef.attributes if isinstance(field, Static)}
    return fields["rules"]


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that a model's weights lie on; None for one device."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return None


def _check_rows(config: Config, rules: AxisRules) -> None:
    axes, train = config.mesh.axes, config.train
    over = [a for a in rules.of("batch") if axes[a] > 1]
    devices = math.prod(axes[a] for a in over)
    stages = [
        ("train", train),
        *((f"train.context_stages.{i}", s) for i, s in enumerate(train.context_stages)),
    ]
    parts = math.prod(axes[a] for a in rules.of("seq")) * (2 if axes["context"] > 1 else 1)
    for where, stage in stages:
        rows, name = stage.micro_batch_size, "micro_batch_size"
        if rows is None:
            rows, name = stage.batch_size, "batch_size"
        if rows % devices:
            raise InputError(
                f"{where}.{name} {rows} does not divide over the {devices} devices of "
                f"{' x '.join(f'{a}={axes[a]}' for a in over)}"
            )
        if stage.seq_len % parts:
            raise InputError(
                f"{where}.seq_len {stage.seq_len} does not divide into the {parts} parts of "
                + " x ".join(f"{a}={axes[a]}" for a in rules.of("seq") if axes[a] > 1)
                + (" (two a device of context)" if axes["context"] > 1 else "")
            )
