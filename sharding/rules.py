"""Which mesh axes each logical axis of an array is laid over, and the named sets of such rules.

Knows nothing about models beyond the names of logical axes. Weights are laid out by `embed` (the
model's width), `q_latent`, `kv_latent`, `heads`, `mlp`, `vocab`, `experts`, `expert_mlp`, `layers`;
activations by `batch`, `seq`, `act_heads` and `act_mlp`; the cache of what was attended to by
`pages`. What a layer does with a weight follows
from the two: `sharding.island`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
from jax.sharding import PartitionSpec

from sharding.dispatch import BF16, IDENTITY

MeshAxes = str | tuple[str, ...] | None
Layout = tuple[tuple[str, ...], ...]  # mesh axes of each dimension, the outermost first

# What is cut into parts that never come together again must divide; the rest is only stored so.
_STORED_ONLY = ("q_latent", "kv_latent", "heads", "mlp", "expert_mlp", "vocab")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """How tokens reach experts on other devices (`sharding.dispatch`).

    Attributes:
        kind: "dense", buffers of one size for every pair of devices; "ragged", as many rows as
            there are; "auto", ragged on TPUs.
        buffer_factor: None sizes buffers for the worst case. Otherwise they hold so many times what
            an even router sends; a token that does not fit is counted, and fails the step.
        wire: what rows travel in: "full", as they are computed in, or "bfloat16".
    """

    kind: Literal["auto", "dense", "ragged"] = "auto"
    buffer_factor: float | None = None
    wire: Literal["full", "bfloat16"] = "full"

    def arguments(self) -> dict[str, Any]:
        """Of `dispatch`."""
        kind = self.kind
        if kind == "auto":
            # Compiled for several hosts of GPUs, ragged gathers all buffers unless an option that
            # XLA calls unsupported is set; CPUs have none.
            kind = "ragged" if jax.default_backend() == "tpu" else "dense"
        codec = IDENTITY if self.wire == "full" else BF16
        return {
            "exchange": kind,
            "codec": codec,
            "combine_codec": codec,
            "buffer_factor": self.buffer_factor,
        }


class LayoutError(ValueError):
    """An array or a batch does not fit a mesh; the message names both sizes."""


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
    pages: MeshAxes = None
    act_embed: MeshAxes = None
    act_heads: MeshAxes = None
    act_mlp: MeshAxes = None
    exchange: Exchange = Exchange()
    # Whether layers are computed again in the backward pass, so that none has to see to what it
    # keeps for it: neither whole weights nor the rows of its experts.
    recomputed: bool = False

    def __post_init__(self):
        pages, batch = self.of("pages"), self.of("batch")
        if len(set(pages)) < len(pages) or set(pages) & set(batch):
            raise LayoutError(
                f"pages of a sequence over {pages} and sequences over {batch}: an axis cuts one of "
                "them, once"
            )

    def of(self, axis: str | None) -> tuple[str, ...]:
        """The mesh axes of a logical axis, the outermost first.

        Raises:
            ValueError: for an axis that is none of the fields.
        """
        if axis is None:
            return ()
        known = {field.name for field in dataclasses.fields(self)} - {"exchange", "recomputed"}
        if axis not in known:
            raise ValueError(f"unknown logical axis {axis!r}; known: {', '.join(sorted(known))}")
        found = getattr(self, axis)
        return () if found is None else (found,) if isinstance(found, str) else tuple(found)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Mesh axes over which tokens are spread; what devices along others see is the same."""
        return (
            *self.of("batch"),
            *(axis for axis in self.of("seq") if axis not in self.of("batch")),
        )

    def layout(
        self, axes: tuple[str | None, ...], shape: tuple[int, ...], sizes: Mapping[str, int]
    ) -> Layout:
        """Lays out a weight.

        A mesh axis is used once a weight, by the first dimension that asks for it. Where heads,
        latents, hidden widths or the vocabulary are cut for storing alone and do not divide, the
        axes that do not fit are left off, the innermost first.

        Args:
            axes: logical axis of each dimension.
            shape: of the whole weight.
            sizes: devices along each mesh axis; those of size 1 are left out.

        Raises:
            LayoutError: where what has to divide does not.
        """
        used: set[str] = set()
        found = []
        for axis, length in zip(axes, shape, strict=True):
            over = tuple(a for a in self.of(axis) if sizes.get(a, 1) > 1 and a not in used)
            local = self.kept(axis)
            while over and length % math.prod(sizes[a] for a in over):
                if axis not in _STORED_ONLY or (over[-1] in local and axis != "vocab"):
                    parts = " x ".join(f"{a}={sizes[a]}" for a in over)
                    raise LayoutError(
                        f"a weight's dimension {axis!r} of {length} does not divide over {parts}"
                    )
                over = over[:-1]
            used |= set(over)
            found.append(over)
        return tuple(found)

    def spec(
        self, axes: tuple[str | None, ...], shape: tuple[int, ...], sizes: Mapping[str, int]
    ) -> PartitionSpec:
        """`layout` as a PartitionSpec."""
        return as_spec(self.layout(axes, shape, sizes))

    def kept(self, axis: str | None) -> tuple[str, ...]:
        """Mesh axes over which a device computes with its own part of a weight's dimension.

        Over the others it is gathered before use.
        """
        match axis:
            case "heads":
                return self.of("act_heads")
            case "mlp":
                return self.of("act_mlp")
            case "vocab":
                return tuple(a for a in self.of("vocab") if a not in self.token_axes)
            case "experts":
                return self.of("experts")
        return ()


def as_spec(layout: Layout) -> PartitionSpec:
    """A layout as jax writes it."""
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in layout))


PRESETS: dict[str, AxisRules] = {
    # One device.
    "single": AxisRules(),
    # Weights cut along the model's width and gathered where used (ZeRO-3); `data` replicates them.
    "fsdp": AxisRules(
        batch=("data", "fsdp"), seq="context", embed="fsdp", q_latent="fsdp", kv_latent="fsdp"
    ),
    # And experts on devices of their own; tokens travel to them.
    "fsdp_ep": AxisRules(
        batch=("data", "fsdp", "expert"),
        seq="context",
        embed="fsdp",
        q_latent=("fsdp", "expert"),
        kv_latent=("fsdp", "expert"),
        heads="expert",
        mlp="expert",
        vocab="expert",
        experts="expert",
    ),
    # And attention by heads; elsewhere `tensor` cuts the sequence.
    "fsdp_ep_tp": AxisRules(
        batch=("data", "fsdp", "expert"),
        seq=("context", "tensor"),
        embed="fsdp",
        q_latent=("fsdp", "expert"),
        kv_latent=("fsdp", "expert"),
        heads=("tensor", "expert"),
        mlp=("tensor", "expert"),
        vocab=("tensor", "expert"),
        experts=("expert", "tensor"),
        act_heads="tensor",
    ),
    # One token a step: weights stay where they are, activations travel. A sequence's cache lies
    # over the devices that share its heads, for all heads read the same latents.
    "decode": AxisRules(
        pages=("context", "tensor"),
        batch=("data", "fsdp", "expert"),
        heads="tensor",
        mlp="tensor",
        vocab="tensor",
        experts=("expert", "tensor"),
        act_heads="tensor",
        act_mlp="tensor",
    ),
}
