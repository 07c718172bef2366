"""What a mesh does with every tensor of a configuration, from shapes alone; needs no devices.

Derived from the functions that the model runs by (`AxisRules.layout`, `kept`), so that what is
printed cannot differ from what is done. Knows nothing about programs; what moves in one is in
`dsjax.plan.collectives`.

B sequences, T positions of a device, S of a whole row, D width, N heads, A key width, Q query
latent, Z cached width, U tokens of a device, K experts a token.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from dsjax.config import Config, MlaConfig, MoeConfig
from dsjax.errors import InputError
from dsjax.meshes import layouts_of
from sharding.rules import PRESETS, AxisRules, Layout

Axes = tuple[str, ...]
AXES = ("data", "fsdp", "expert", "tensor", "context")
# Every axis in use, and small enough for every dimension of a published model.
TWO_EACH = dict.fromkeys(AXES, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One parameter on a mesh.

    Attributes:
        name: dotted path.
        axes: logical axis of each dimension.
        shape: of the whole.
        layout: mesh axes that each dimension is stored over.
        kept: those of them over which it stays apart where it is used.
        added: mesh axes whose devices have copies of its part, and so add its gradients up.
        dtype: it is stored in.
        sizes: devices along each mesh axis.
        tied: an embedding that is the head, too.
        copies: how many such parameters the name stands for.
    """

    name: str
    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    layout: Layout
    kept: Layout
    added: Axes
    dtype: jnp.dtype
    sizes: tuple[tuple[str, int], ...]
    tied: bool = False
    copies: int = 1

    @property
    def gathered(self) -> Layout:
        """Mesh axes of each dimension over which it is brought together for use."""
        return tuple(
            tuple(a for a in over if a not in stay)
            for over, stay in zip(self.layout, self.kept, strict=True)
        )

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of what one device stores."""
        sizes = dict(self.sizes)
        return tuple(
            length // math.prod(sizes[a] for a in over)
            for length, over in zip(self.shape, self.layout, strict=True)
        )

    @property
    def is_embedding(self) -> bool:
        """Whether tokens are looked up in it."""
        return self.name.rpartition(".")[2] == "embed_VD"

    @property
    def is_head(self) -> bool:
        """Whether it scores the vocabulary, and nothing else."""
        return self.name.rpartition(".")[2] == "head_DV"

    @property
    def stored(self) -> str:
        """In words."""
        cut = [
            f"{axis} over {_list(over)}"
            for axis, over in zip(self.axes, self.layout, strict=True)
            if over
        ]
        return ", ".join(cut) or "whole"

    @property
    def use(self) -> str:
        """What happens before it is multiplied with, in words."""
        if not any(self.layout):
            return "there already"
        parts, over = [], _flat(self.layout if self.tied else self.gathered)
        for axis, stay in zip(self.axes, self.kept, strict=True):
            if stay and axis == "experts":
                parts.append(f"own experts over {_list(stay)}, to which tokens travel")
            elif stay and not self.is_embedding:
                parts.append(f"own {_OWN[str(axis)]} over {_list(stay)}")
        if self.is_embedding:
            rows, columns = self.gathered
            own = self.kept[0]
            if rows:
                parts.append(f"rows gathered over {_list(rows)}")
            if own:
                parts.append(f"own rows looked up over {_list(own)}, and summed")
            if self.kept[1] or columns:
                parts.append(f"columns travel to their tokens over {_list(self.layout[1])}")
            if self.tied and over:
                parts.append(f"as the head, gathered over {_list(_flat(self.layout))} by chunks")
        elif self.is_head and over:
            parts.append(f"gathered over {_list(over)}, a chunk of the vocabulary at a time")
        elif over:
            parts.append(f"gathered over {_list(over)}")
        return "; ".join(parts)

    @property
    def scattered(self) -> Axes:
        """Mesh axes over which its gradient is summed and cut at once."""
        return _flat(self.layout if self.tied else self.gathered)

    @property
    def gradient(self) -> str:
        """What happens to its gradient, in words."""
        parts = []
        if self.scattered:
            parts.append(f"scattered over {_list(self.scattered)}")
        if self.added:
            parts.append(f"added over {_list(self.added)}")
        return "; ".join(parts) or "stays"

    @property
    def numbers(self) -> int:
        """Stored on one device, of all its copies."""
        return math.prod(self.local_shape) * self.copies


_OWN = {"heads": "heads", "mlp": "hidden units", "vocab": "tokens of the vocabulary"}


def _list(axes: Sequence[str]) -> str:
    return ", ".join(axes)


def _flat(layout: Layout) -> Axes:
    return tuple(a for over in layout for a in over)


def tensors(config: Config, rules: AxisRules, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Every parameter of a configuration by its dotted path.

    Args:
        config: of the model.
        rules: where each logical axis goes.
        sizes: devices along each mesh axis.

    Raises:
        InputError: for a dimension that does not divide, naming the weight and the devices.
    """
    found = {}
    for name, (variable, layout) in layouts_of(config, rules, sizes).items():
        axes = variable.get_metadata()["axes"]
        kept = tuple(
            tuple(a for a in over if a in rules.kept(axis))
            for axis, over in zip(axes, layout, strict=True)
        )
        tied = name == "embed_VD" and config.model.tie_embeddings
        if name == "embed_VD":  # a look-up: columns stay (`sharding.island.lookup`)
            kept = kept[0], layout[1]
        used = _flat(layout)
        found[name] = Tensor(
            name=name,
            axes=axes,
            shape=variable.shape,
            layout=layout,
            kept=kept,
            added=tuple(a for a in rules.token_axes if sizes.get(a, 1) > 1 and a not in used),
            dtype=jnp.dtype(variable.dtype),
            sizes=tuple(sizes.items()),
            tied=tied,
        )
    return found


def layout_table(config: Config, rules: AxisRules, sizes: Mapping[str, int]) -> list[Tensor]:
    """One row a tensor; those that only numbers in their paths tell apart share one.

    Raises:
        InputError: for a dimension that does not divide, naming the weight and the devices.
    """
    rows: dict[Tensor, int] = {}
    for tensor in tensors(config, rules, sizes).values():
        name = ".".join(part for part in tensor.name.split(".") if not part.isdecimal())
        row = dataclasses.replace(tensor, name=name)
        rows[row] = rows.get(row, 0) + 1
    return [dataclasses.replace(row, copies=copies) for row, copies in rows.items()]


@dataclasses.dataclass(frozen=True)
class Activation:
    """What lies where in between.

    Attributes:
        name: what it is.
        shape: its dimensions' letters.
        layout: mesh axes of each dimension.
    """

    name: str
    shape: str
    layout: Layout

    @property
    def stored(self) -> str:
        """In words."""
        cut = [
            f"{letter} over {_list(over)}"
            for letter, over in zip(self.shape, self.layout, strict=True)
            if over
        ]
        return ", ".join(cut) or "whole"


def activations(config: Config, rules: AxisRules, sizes: Mapping[str, int]) -> list[Activation]:
    """Where the arrays of a forward pass without a cache lie."""

    def of(axis):
        return tuple(a for a in rules.of(axis) if sizes.get(a, 1) > 1)

    batch, seq, heads = of("batch"), of("seq"), of("act_heads")
    queries = tuple(a for a in seq if a not in heads)  # what heads cut, they bring together
    experts = of("experts")
    blocks = [block for stack in config.model.stacks for block in stack.blocks]
    found = [
        Activation("tokens, targets, segments", "BT", (batch, seq)),
        Activation("hidden states between layers", "BTD", (batch, seq, ())),
    ]
    if any(isinstance(block.attention, MlaConfig) for block in blocks):
        found += [
            Activation("query latents at use", "BTQ", (batch, queries, ())),
            Activation("key/value latents at use", "BSZ", (batch, (), ())),
        ]
    found += [
        Activation("queries by head", "BTNA", (batch, queries, heads, ())),
        Activation("keys by head", "BSNA", (batch, (), heads, ())),
    ]
    if any(isinstance(block.ffn, MoeConfig) for block in blocks):
        rows = tuple(dict.fromkeys((*batch, *seq)))
        name = "rows at the experts" + (f", exchanged over {_list(experts)}" if experts else "")
        found.append(Activation(name, "UD", (rows, ())))
    vocab = tuple(a for a in of("vocab") if a not in rules.token_axes)
    found.append(Activation("logits, by chunks", "BTV", (batch, seq, vocab)))
    return found


def state_bytes(row: Tensor, config: Config) -> int:
    """Bytes a device for a parameter, its two moments, and its moving average where there is one.

    Gradients, float32, are as many numbers again while a step runs.
    """
    moments = 2 * jnp.dtype(config.train.optimizer.moment_dtype).itemsize
    average = 0 if config.train.ema_decay is None else 4
    return row.numbers * (row.dtype.itemsize + moments + average)


# ---- the page -----------------------------------------------------------------------------------

BEGIN, END = "<!-- made by experiments/layout.py -->", "<!-- end of what is made -->"


def page_tables(config: Config, sizes: Mapping[str, int] | None = None) -> str:
    """The tables of docs/sharding.md: what each preset does with each tensor and activation.

    Args:
        config: of the model.
        sizes: devices along each axis; None takes two along each.
    """
    sizes = TWO_EACH if sizes is None else sizes
    names = list(PRESETS)
    cells: dict[tuple[str, ...], list[str]] = {}
    columns = [layout_table(config, rules, sizes) for rules in PRESETS.values()]
    for rows in zip(*columns, strict=True):
        axes = ", ".join(axis or "–" for axis in rows[0].axes if axis != "layers")
        told = tuple(_cell(row) for row in rows)
        cells.setdefault((axes, *told), []).append(_short(rows[0].name))
    lines = [
        f"| tensor | logical axes | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for (axes, *told), tensor_names in cells.items():
        tensor_list = ", ".join(f"`{name}`" for name in dict.fromkeys(tensor_names))
        lines.append(f"| {tensor_list} | {axes} | {' | '.join(told)} |")
    lines += [
        "",
        f"| activation | dims | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    lists = [activations(config, rules, sizes) for rules in PRESETS.values()]
    for parts in zip(*lists, strict=True):
        name = parts[0].name
        told = []
        for part in parts:
            extra = part.name.removeprefix(name)
            told.append(part.stored + (f"; {extra.removeprefix(', ')}" if extra else ""))
        lines.append(f"| {name} | {', '.join(parts[0].shape)} | {' | '.join(told)} |")
    return "\n".join(lines)


def with_tables(page: str, tables: str) -> str:
    """A page with what stands between its markers made anew.

    Raises:
        InputError: if it has not both markers, once each.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise InputError(f"the page needs the lines {BEGIN!r} and {END!r}, once each")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}"


def _cell(row: Tensor) -> str:
    if not any(row.layout):
        return "whole"
    use = row.use
    if len(row.scattered) == len(_flat(row.layout)):  # all that was just named
        use = use.replace(f"gathered over {_list(row.scattered)}", "gathered")
    return f"{row.stored}: {use}"


def _short(name: str) -> str:
    """Without the stack, so that the same weight of different stacks is one."""
    for prefix in ("attention.", "ffn.", "block."):
        head, found, tail = name.partition(prefix)
        if found and head.startswith(("stacks.", "mtp_modules.")):
            return _short(found + tail) if prefix == "block." else found + tail
    for prefix in ("stacks.", "block."):
        if name.startswith(prefix):
            return name.rpartition(".")[2]
    return name
