"""The device mesh: six named axes, always present, at size 1 where unused."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices along each axis."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1
    stage: int = 1


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays devices out on the six axes, with explicit sharding.

    Raises:
        ValueError: if the shape needs more devices than there are, naming both numbers.
    """
    sizes = dataclasses.astuple(shape)
    devices = jax.devices() if devices is None else list(devices)
    if math.prod(sizes) > len(devices):
        raise ValueError(f"{shape} needs {math.prod(sizes)} devices; there are {len(devices)}")
    names = tuple(field.name for field in dataclasses.fields(shape))
    axis_types = (AxisType.Explicit,) * len(names)
    chosen = devices[: math.prod(sizes)]
    if chosen[0].platform == "tpu":  # a torus, whose axes may have to be split: 64 of 16 x 16 x 8
        laid = create_device_mesh(sizes, chosen, allow_split_physical_axes=True)
        return Mesh(laid, names, axis_types=axis_types)
    return jax.make_mesh(sizes, names, axis_types=axis_types, devices=chosen)
