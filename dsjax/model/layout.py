"""How a parameter lies on the mesh, as a layer sees it. Knows nothing about layers."""

from flax import nnx

from sharding import island
from sharding.rules import AxisRules, Layout


def layout_of(variable: nnx.Variable, rules: AxisRules) -> tuple[Layout, Layout]:
    """How a weight is cut on the mesh that is set, and which of the cuts stay where it is used.

    Within a scan over layers, too, where a weight has lost its first dimension.
    """
    told = variable.get_metadata()
    axes = told["axes"][-len(told["whole"]) :]
    layout = rules.layout(axes, told["whole"], island.mesh_sizes())
    kept = tuple(
        tuple(a for a in over if a in rules.kept(axis))
        for over, axis in zip(layout, axes, strict=True)
    )
    return layout, kept
