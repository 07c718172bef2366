"""Which mesh axis each logical axis of an array is laid over.

Knows nothing about models beyond the names of logical axes.
"""

import dataclasses

import jax
from jax.sharding import PartitionSpec

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """Logical axis -> mesh axes.

    Frozen and hashable: as a static field of a module it is part of the jit cache key. Mesh axes
    are data, fsdp, expert, tensor, context, stage (`sharding.mesh`). The defaults lay nothing out:
    one device.
    """

    batch: MeshAxes = None
    seq: MeshAxes = None
    embed: MeshAxes = None
    heads: MeshAxes = None
    q_latent: MeshAxes = None
    kv_latent: MeshAxes = None
    mlp: MeshAxes = None
    experts: MeshAxes = None
    expert_mlp: MeshAxes = None
    vocab: MeshAxes = None
    layers: MeshAxes = None
    stage: MeshAxes = None
    act_embed: MeshAxes = None
    act_heads: MeshAxes = None
    act_mlp: MeshAxes = None

    def __call__(self, *axes: str | None) -> PartitionSpec | None:
        """Lays out an array whose dimensions have these logical axes.

        Returns:
            The PartitionSpec, or None where no mesh is set, so that the same code runs without.

        Raises:
            ValueError: for an axis that is none of the fields.
        """
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := [axis for axis in axes if axis is not None and axis not in known]:
            raise ValueError(
                f"unknown logical axis {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        if jax.sharding.get_abstract_mesh().empty:
            return None
        return PartitionSpec(*(None if axis is None else getattr(self, axis) for axis in axes))
