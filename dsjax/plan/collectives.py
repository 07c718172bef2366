"""What moves between devices in a micro-batch's forward and backward pass: counted, and predicted.

`collectives` walks a traced program. `predicted` says the same from shapes and the layout of every
tensor, for meshes that nobody has; a test compares the two. What a compiler makes of it (it may
merge equal ones) is not here.

B sequences and T positions of a device, U = B * T tokens, D width, Q query latent, Z cached width,
E experts, K experts a token, J groups, or devices that a token goes to, V vocabulary, L layers.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.config import BlockConfig, Config, GqaConfig, MlaConfig, MoeConfig
from dsjax.plan.layout import Tensor, tensors
from dsjax.train.vocabulary import CHUNK_LOGITS
from pallas_kernels.tiled import TILE, tiles
from sharding.rules import AxisRules

Axes = tuple[str, ...]
Key = tuple[str, Axes, str, tuple[int, ...]]

COPIES = "gradients of copies"
SUMS = ("psum", "pmax")
KINDS = ("all_gather", "reduce_scatter", *SUMS, "all_to_all", "ragged_all_to_all", "ppermute")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One exchange, as often as it happens.

    Attributes:
        kind: of `KINDS`.
        axes: mesh axes.
        dtype: of what moves.
        shape: what each device gives; of a ragged exchange, the smaller of what it may give and
            get: averaged over devices no more can move.
        devices: along the axes together.
        times: in one run of the program; what a `while` of unknown length holds counts once.
        looped: in such a `while`.
        where: in `predicted`, what it is for; in `collectives`, the names of the scopes.
    """

    kind: str
    axes: Axes
    dtype: str
    shape: tuple[int, ...]
    devices: int
    times: int = 1
    looped: bool = False
    where: str = ""

    @property
    def key(self) -> Key:
        """What it is, whatever it is for."""
        return self.kind, self.axes, self.dtype, self.shape

    @property
    def operand_bytes(self) -> int:
        """Of what one device gives, once."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> float:
        """What a device receives in all: the least that the kind can do with (rings reach it)."""
        given, n = self.operand_bytes, self.devices
        match self.kind:
            case "all_gather":
                each = given * (n - 1)
            case "psum" | "pmax":
                each = 2 * given * (n - 1) / n
            case "ppermute":
                each = given
            case _:
                each = given * (n - 1) / n
        return float(each * self.times)


def tally(found: Iterable[Collective]) -> collections.Counter[Key]:
    """How often each happens."""
    counts: collections.Counter[Key] = collections.Counter()
    for one in found:
        counts[one.key] += one.times
    return counts


def bytes_by_kind(found: Iterable[Collective]) -> dict[tuple[str, Axes], tuple[int, float]]:
    """(times, bytes a device receives) of each kind over each set of axes."""
    totals: dict[tuple[str, Axes], tuple[int, float]] = {}
    for one in found:
        times, moved = totals.get((one.kind, one.axes), (0, 0.0))
        totals[one.kind, one.axes] = times + one.times, moved + one.bytes
    return totals


# ---- counted ------------------------------------------------------------------------------------


def collectives(jaxpr: Any, sizes: Mapping[str, int]) -> list[Collective]:
    """Every collective of a traced program, with those of loops as often as they turn.

    Args:
        jaxpr: of `jit(...).trace(...)` or `make_jaxpr`; all that it calls is walked.
        sizes: devices along each mesh axis.
    """
    found: list[Collective] = []
    _walk(getattr(jaxpr, "jaxpr", jaxpr), sizes, 1, False, "", found)
    return found


def inner_jaxprs(equation: Any) -> list[Any]:
    """The programs that an equation runs: bodies, branches, called functions."""
    values = equation.params.values()
    every = [
        v for value in values for v in (value if isinstance(value, tuple | list) else (value,))
    ]
    every = [getattr(value, "jaxpr", value) for value in every]
    return [value for value in every if hasattr(value, "eqns")]


def _walk(jaxpr, sizes, times, looped, where, found):
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        scope = "/".join(filter(None, (where, str(equation.source_info.name_stack))))
        kind = name.removesuffix("_invariant")
        if kind in KINDS:
            over = equation.params.get("axes", equation.params.get("axis_name"))
            over = tuple(over) if isinstance(over, tuple | list) else (over,)
            operands = equation.invars if kind in SUMS else equation.invars[:1]
            if kind == "ragged_all_to_all":  # what is sent, and where to
                operands = [min(equation.invars[:2], key=lambda side: side.aval.shape[0])]
            for operand in operands:
                found.append(
                    Collective(
                        kind=kind,
                        axes=over,
                        dtype=str(operand.aval.dtype),
                        shape=tuple(operand.aval.shape),
                        devices=math.prod(sizes[a] for a in over),
                        times=times,
                        looped=looped,
                        where=scope,
                    )
                )
        turns = times * equation.params["length"] if name == "scan" else times
        for inner in inner_jaxprs(equation):
            _walk(inner, sizes, turns, looped or name == "while", f"{scope}/{name}", found)


# ---- predicted ----------------------------------------------------------------------------------


def predicted(
    config: Config,
    rules: AxisRules,
    sizes: Mapping[str, int],
    *,
    rows: int,
    seq_len: int,
) -> list[Collective]:
    """What moves in `value_and_grad` of one micro-batch, from shapes alone.

    Args:
        config: of the run; its `train.remat` says what the backward pass does again.
        rules: a preset for training, with the exchange of the mesh.
        sizes: devices along each mesh axis.
        rows: of the micro-batch, over all devices.
        seq_len: positions of a row.

    Returns:
        One entry a tensor or activation, pass and shape; `where` says which.

    Raises:
        InputError: for a dimension of a weight that does not divide.
        ValueError: for rules that cut hidden units, which are not for training.
    """
    if any(sizes.get(a, 1) > 1 for a in rules.of("act_mlp")):
        raise ValueError("these rules cut hidden units over devices: they are not for training")
    return _Prediction(config, rules, sizes, rows, seq_len).found


class _Prediction:
    """Walks a configuration as the model does, noting what would move."""

    def __init__(self, config, rules, sizes, rows, seq_len):
        self.config, self.rules, self.sizes = config, rules, sizes
        self.found: list[Collective] = []
        self.tensors = tensors(config, rules, sizes)
        self.compute = config.precision.compute_dtype
        self.fp8 = config.precision.recipe == "fp8"
        self.again = int(config.train.remat != "none")  # the backward pass runs layers again
        # `selective` does so too, but keeps latents, SwiGLU's input, and what crosses to experts.
        self.crosses_again = int(config.train.remat in ("dots", "full"))
        self.seq = self._in_use(rules.of("seq"))
        self.rows = rows // math.prod(sizes.get(a, 1) for a in rules.of("batch"))
        self.length = seq_len // math.prod(sizes[a] for a in self.seq)
        heads = self._in_use(rules.of("act_heads"))
        self.entered = tuple(a for a in heads if a in self.seq)  # cut the sequence elsewhere
        self.left = tuple(a for a in heads if a not in self.seq)
        self.inner = tuple(a for a in self.seq if a != "context")
        self.context = tuple(a for a in self.seq if a == "context")

        model = config.model
        self._lookup("embedding")
        self._row("places", forward=1)
        for stack in model.stacks:
            for i, block in enumerate(stack.blocks):
                self._block(f"stacks.{stack.name}.{i}", block, stack.repeats)
        self._head("head")
        depth = model.mtp.depth if model.mtp else 0
        for k in range(depth):
            name = f"mtp_modules.{k}"
            self._whole_row("MTP: targets and documents", "int32", 3)
            self._whole_row("MTP: weights", "float32", k + 2)
            self._lookup("MTP: embedding")
            self._weight(f"{name}.w_proj_2DD")
            # Its places are found inside what is computed again.
            self._row("MTP: places", forward=1 + self.again)
            self._block(f"{name}.block", model.mtp.block, 1)
            self._head("MTP: head")
        self._sums(depth)

    def _in_use(self, axes) -> Axes:
        return tuple(a for a in axes if self.sizes.get(a, 1) > 1)

    def _count(self, axes) -> int:
        return math.prod(self.sizes.get(a, 1) for a in axes)

    def _add(self, where, kind, axes, dtype, shape, times=1):
        if axes and times:
            self.found.append(
                Collective(
                    kind=kind,
                    axes=tuple(axes),
                    dtype=str(dtype),
                    shape=tuple(shape),
                    devices=self._count(axes),
                    times=times,
                    where=where,
                )
            )

    def _gather(self, where, axes, dtype, shape, times=1):
        self._add(where, "all_gather", axes, dtype, shape, times)

    # ---- weights

    def _weight(self, name, *, layers=1, forward=1, backward=1, dtype=None):
        """Gathers of a weight, dimension by dimension, and its gradient's way back."""
        shape, gathered = self._stored(name)
        dtype, times = dtype or self.compute, (layers * forward, layers * backward)
        self._whole("weights", shape, gathered, dtype, *times, layers)

    def _linear(self, name, *, layers, again, lead=0, in_dims=1, parts=1):
        """`_weight` of a linear layer, which FP8 has travel as such.

        Args:
            name: of the weight.
            layers: that have one.
            again: whether the backward pass needs the layer's output again.
            lead: dimensions before its matrix's.
            in_dims: dimensions that are contracted.
            parts: matrices side by side in the last one.
        """
        if not self.fp8:
            self._weight(name, layers=layers)
            return
        shape, gathered = self._stored(name)
        tensor, first_out = self.tensors[name], lead + in_dims
        whole = math.prod(tensor.shape[tensor.axes[0] == "layers" :][first_out:])
        uneven = parts > 1 and whole // parts % TILE
        row_axes, column_axes = gathered[lead], gathered[first_out]
        inner = (*gathered[:lead], *gathered[lead + 1 : first_out], *gathered[first_out + 1 :])
        backward = layers * (1 + again)
        if any(inner) or (uneven and column_axes):
            # Blocks do not lie together on any device.
            times = layers, backward
            self._whole("weights", shape, gathered, tensor.dtype, *times, layers)
            return
        matrix = [*shape[:lead], math.prod(shape[lead:first_out]), math.prod(shape[first_out:])]
        if uneven:
            matrix[-1] = parts * tiles(matrix[-1] // parts) * TILE
        sides = self._count(row_axes), self._count(column_axes)
        # One more block than there are: the last device's part may touch one that nobody has.
        blocks = [tiles(size * n) + 1 for size, n in zip(matrix[-2:], sides, strict=True)]
        for when, times in (("forward", layers), ("again for the backward pass", backward)):
            where, over = f"weights, {when}", (*row_axes, *column_axes)
            self._add(where, "pmax", over, "int32", (*matrix[:lead], *blocks), times)
            cut = list(matrix)
            for dim, axes, n in zip((lead, lead + 1), (row_axes, column_axes), sides, strict=True):
                self._gather(where, axes, "uint8", cut, times)
                cut[dim] *= n
        self._returned("weights", shape, gathered, layers)

    def _stored(self, name):
        """The shape of what a device has of a layer's weight, and what it is gathered over."""
        tensor: Tensor = self.tensors[name]
        stacked = tensor.axes[0] == "layers"
        return tensor.local_shape[stacked:], tensor.gathered[stacked:]

    def _whole(self, where, shape, gathered, dtype, forward, backward, returned):
        cut = list(shape)
        for dim, axes in enumerate(gathered):
            self._gather(f"{where}, forward", axes, dtype, cut, forward)
            self._gather(f"{where}, again for the backward pass", axes, dtype, cut, backward)
            cut[dim] *= self._count(axes)
        self._returned(where, shape, gathered, returned)

    def _returned(self, where, shape, gathered, times):
        """In float32, whatever the weight travels in."""
        whole = [n * self._count(axes) for n, axes in zip(shape, gathered, strict=True)]
        for dim, axes in reversed(list(enumerate(gathered))):
            self._add(f"{where}: gradients", "reduce_scatter", axes, "float32", whole, times)
            whole[dim] //= self._count(axes)

    def _sums(self, depth):
        """What all devices add up at the end."""
        for name, tensor in self.tensors.items():
            where = f"{COPIES}: {name}"
            self._add(where, "psum", tensor.added, "float32", tensor.local_shape)
        everyone, model = self._in_use(self.rules.token_axes), self.config.model
        for stack in model.stacks:
            for block in stack.blocks:
                if isinstance(block.ffn, MoeConfig):
                    loads = (stack.repeats, block.ffn.num_experts)
                    self._add("loads", "psum", everyone, "int32", loads)
        if depth and isinstance(model.mtp.block.ffn, MoeConfig):
            loads = (depth, model.mtp.block.ffn.num_experts)
            self._add("loads", "psum", everyone, "int32", loads)
        train = self.config.train
        scalars = 3 + bool(depth) + (train.device_balance_loss_weight > 0)
        scalars += train.communication_balance_loss_weight > 0
        self._add("metrics", "psum", everyone, "float32", (), scalars)
        self._add("metrics", "psum", everyone, "int32", ())

    # ---- the vocabulary

    def _lookup(self, where):
        table = self.tensors["embed_VD"]
        rows, columns = table.gathered[0], table.kept[1]
        self._whole(f"{where} table", table.local_shape, (rows, ()), table.dtype, 1, 0, 1)
        b, t, width = self.rows, self.length, table.local_shape[1]
        self._gather(f"{where}: ids", columns, "int32", (b, t))
        n = self._count(columns)
        self._add(f"{where}: columns", "all_to_all", columns, self.compute, (b * n, t, width))
        self._add(
            f"{where}: columns, backward",
            *("all_to_all", columns, self.compute, (b, t, width * n)),
        )

    def _head(self, where):
        """A chunk of every device's columns at a time, and again in the backward pass."""
        tied = self.config.model.tie_embeddings
        head = self.tensors["embed_VD" if tied else "head_DV"]
        layout, shape = head.layout, head.local_shape
        if tied:
            layout, shape = layout[::-1], shape[::-1]
        if not any(layout):
            return
        most = CHUNK_LOGITS // max(1, self.rows * self.length * self._count(layout[1]))
        columns = max(c for c in range(1, min(shape[1], max(1, most)) + 1) if shape[1] % c == 0)
        chunks = shape[1] // columns
        part = (shape[0], columns)
        self._whole(where, part, layout, self.compute, chunks, chunks, chunks)

    # ---- tokens

    def _whole_row(self, where, dtype, times):
        b, t = self.rows, self.length
        self._gather(where, self.inner, dtype, (b, t), times)
        self._gather(where, self.context, dtype, (b, t * self._count(self.inner)), times)

    def _row(self, where, forward):
        if self.seq:
            self._gather(where, self.entered, "int32", (self.rows, self.length), forward)
            self._whole_row(where, "int32", 2 * forward)

    def _latent(self, where, axes, dtype, shape, layers, again):
        """Gathers of an activation along the row; the gradient's way back."""
        self._gather(f"{where}, forward", axes, dtype, shape, layers)
        self._gather(f"{where}, again", axes, dtype, shape, layers * again)
        b, t, *rest = shape
        whole = (b, t * self._count(axes), *rest)
        self._add(f"{where}, backward", "reduce_scatter", axes, dtype, whole, layers)

    def _block(self, name, block: BlockConfig, layers):
        if isinstance(block.attention, GqaConfig):
            self._gqa(f"{name}.attention", block.attention, layers)
        else:
            self._mla(f"{name}.attention", block.attention, layers)
        b, t, d = self.rows, self.length, self.config.model.embed_dim
        cut = (b, t * self._count(self.entered), d)
        where = "attention's output"
        for kind, axes in (("reduce_scatter", self.entered), ("psum", self.left)):
            shape = cut if kind == "reduce_scatter" else (b, t, d)
            self._add(f"{where}, forward", kind, axes, self.compute, shape, layers)
            self._add(f"{where}, again", kind, axes, self.compute, shape, layers * self.again)
        self._gather(f"{where}, backward", self.entered, self.compute, (b, t, d), layers)
        self._add(f"{where}, backward", "psum", self.left, self.compute, (b, t, d), layers)
        if isinstance(block.ffn, MoeConfig):
            self._moe(f"{name}.ffn", block.ffn, layers)
        else:
            self._swiglu(f"{name}.ffn", layers)

    def _swiglu(self, name, layers):
        told = {"layers": layers, "again": self.crosses_again}
        self._linear(f"{name}.w_in_D2F", parts=2, **told)
        self._linear(f"{name}.w_down_FD", layers=layers, again=0)

    def _mla(self, name, config: MlaConfig, layers):
        b, t, d = self.rows, self.length, self.config.model.embed_dim
        # `selective` keeps latents.
        latents = {"layers": layers, "again": self.crosses_again}
        linear = {"layers": layers, "again": self.again}
        if config.q_latent_dim is None:
            query, q = "hidden states over the row", d
            self._linear(f"{name}.w_q_DNA", **linear)
        else:
            query, q = "query latents over the row", config.q_latent_dim
            self._linear(f"{name}.w_dq_DQ", **latents)
            self._linear(f"{name}.w_uq_QNA", **linear)
        self._latent(query, self.entered, self.compute, (b, t, q), layers, self.again)
        self._linear(f"{name}.w_dkvr_DZ", **latents)
        self._linear(f"{name}.w_ukv_CNY", **linear)
        self._linear(f"{name}.w_o_NHD", in_dims=2, **linear)
        z, where = config.cache_dim, "key/value latents over the row"
        self._latent(where, self.inner, self.compute, (b, t, z), layers, self.again)
        t = t * self._count(self.inner)
        self._latent(where, self.context, self.compute, (b, t, z), layers, self.again)

    def _gqa(self, name, config: GqaConfig, layers):
        b, t, d = self.rows, self.length, self.config.model.embed_dim
        self._latent(
            *("hidden states over the row", self.entered, self.compute, (b, t, d)),
            *(layers, self.again),
        )
        for part, in_dims in (("w_q_DNA", 1), ("w_k_DIA", 1), ("w_v_DIH", 1), ("w_o_NHD", 2)):
            self._linear(f"{name}.{part}", layers=layers, again=self.again, in_dims=in_dims)
        if config.qkv_bias:  # added, so no gradient reads them
            for part in ("b_q_NA", "b_k_IA", "b_v_IH"):
                self._weight(f"{name}.{part}", layers=layers, backward=self.again)
        t = t * self._count(self.entered)
        for part, width in (("w_k_DIA", config.head_dim), ("w_v_DIH", config.value_dim)):
            tensor = self.tensors[f"{name}.{part}"]
            heads = tensor.shape[-2] // self._count(tensor.kept[-2])
            shape = (b, t, heads, width)
            where = "keys and values over the row"
            self._latent(where, self.context, self.compute, shape, layers, self.again)

    # ---- experts

    def _moe(self, name, config: MoeConfig, layers):
        self._weight(f"{name}.w_router_DE", layers=layers, dtype="float32")
        told = {"layers": layers, "lead": 1}
        self._linear(f"{name}.w_in_ED2F", again=self.crosses_again, parts=2, **told)
        self._linear(f"{name}.w_down_EFD", again=0, **told)
        if config.num_shared_experts:
            self._swiglu(f"{name}.shared", layers)
        self._dispatch(config, layers)
        self._balance(config, layers)

    def _dispatch(self, config: MoeConfig, layers):
        axes = self._in_use(self.rules.of("experts"))
        n, exchange = self._count(axes), self.rules.exchange.arguments()
        if n == 1:
            return
        tokens, k = self.rows * self.length, config.num_experts_per_token
        d = self.config.model.embed_dim
        devices = min(k, n)
        room = tokens
        if (factor := exchange["buffer_factor"]) is not None:
            room = max(1, min(tokens, math.ceil(factor * (tokens * devices / n))))
        again = self.crosses_again
        kind, side = "all_to_all", n * room
        if exchange["exchange"] == "ragged":
            kind, side = "ragged_all_to_all", min(tokens * devices, n * room)
            self._gather("dispatch: counts", axes, "int32", (n,), layers * (1 + again))

        def add(where, payload, times):
            for dtype, width in payload:
                self._add(where, kind, axes, dtype, (side, width), layers * times)

        wire = self.compute if exchange["codec"].name == "identity" else "bfloat16"
        rows = back = [(wire, d)]
        if self.fp8:  # to the experts in FP8, with the scales of tiles
            rows, back = [("uint8", d), ("float32", tiles(d))], [(self.compute, d)]
        experts, gates = [("int32", k)], [("float32", k)]
        add("dispatch: experts, forward", experts, 1)
        add("dispatch: experts, again", experts, again)
        add("dispatch: gates, forward", gates, 1)
        add("dispatch: gates, again", gates, again)
        add("dispatch: gates, backward", gates, 1)
        add("dispatch: rows, forward", rows, 1)
        add("dispatch: rows, again", rows, again)
        add("dispatch: rows, backward", back, 1)
        add("combine: rows, forward", back, 1)
        add("combine: rows, backward", rows, 1)

    def _balance(self, config: MoeConfig, layers):
        """Sums over rows that several devices share."""
        b, e, j = self.rows, config.num_experts, config.num_groups
        train, again = self.config.train, self.again

        def add(width, times):
            self._add("balance", "psum", self.seq, "float32", (b, width), times)

        # How many tokens a row has is the same in all layers: a stack finds it once, and each layer
        # that is run again.
        add(1, 1 + layers * again)
        add(e, layers * (1 + again))
        add(e, 2 * layers)
        add(j, layers * (1 + again * (train.communication_balance_loss_weight > 0)))


def summary(found: Iterable[Collective]) -> list[tuple[str, int, float]]:
    """(what for, times, bytes) in the order of the program; parts of one thing together."""
    totals: dict[str, tuple[int, float]] = {}
    for one in found:
        what = COPIES if one.where.startswith(COPIES) else one.where
        what = f"{one.kind} over {', '.join(one.axes)}: {what}"
        times, moved = totals.get(what, (0, 0.0))
        totals[what] = times + one.times, moved + one.bytes
    return [(what, times, moved) for what, (times, moved) in totals.items()]


def abstract_mesh(sizes: Mapping[str, int]) -> jax.sharding.AbstractMesh:
    """A mesh of no devices, to trace programs on that no machine here could run."""
    axis_types = (jax.sharding.AxisType.Explicit,) * len(sizes)
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types)
