"""Hugging Face tensor names and layouts <-> ours, for DeepSeek, Qwen2 and Llama checkpoints.

The only place that knows their names. A published tensor lies in one place of one of our leaves,
and only its dimensions are split, ordered and joined on the way: nothing is computed, so the same
table carries gradients across as well. Knows nothing about files or devices.

Dimensions as in dsjax/model; L layers of a stack.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from dsjax.config import BlockConfig, GqaConfig, MlaConfig, ModelConfig, MoeConfig
from dsjax.errors import InputError

Path = tuple[str | int, ...]
# What a tensor is published in beside FP8 (V3's checkpoint): FP8 with block scales; BF16; float32.
Kind = Literal["fp8", "bf16", "f32"]

SCALE_SUFFIX = "_scale_inv"
LAYER = "model.layers.{}."


class Layout(NamedTuple):
    """How a published tensor's dimensions become those of a leaf.

    Its rows are split into `rows` and its columns into `cols`, outermost first; each dimension of
    the leaf is a group of these, counted through rows and then columns.
    """

    rows: tuple[int, ...]
    cols: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def published(self) -> tuple[int, ...]:
        """The published shape."""
        rows, cols = math.prod(self.rows), math.prod(self.cols)
        return (rows, cols) if self.cols else (rows,)

    @property
    def leaf(self) -> tuple[int, ...]:
        """The shape of the leaf's part."""
        sizes = self.rows + self.cols
        return tuple(math.prod(sizes[i] for i in group) for group in self.groups)

    @property
    def order(self) -> tuple[int, ...]:
        """The split dimensions in the leaf's order."""
        return tuple(i for group in self.groups for i in group)

    def part(self, rows: int, cols: int) -> "Layout":
        """The same for fewer rows and columns, whole ones of the outermost split dimension.

        Args:
            rows: how many published rows.
            cols: how many published columns.
        """

        def shrunk(sizes: tuple[int, ...], total: int) -> tuple[int, ...]:
            return (total // math.prod(sizes[1:]), *sizes[1:]) if sizes else ()

        return self._replace(rows=shrunk(self.rows, rows), cols=shrunk(self.cols, cols))

    def to_leaf(self, x: Any) -> Any:
        """Published -> the leaf's part; works on NumPy's and JAX's arrays."""
        return x.reshape(self.rows + self.cols).transpose(self.order).reshape(self.leaf)

    def to_published(self, x: Any) -> Any:
        """The inverse of `to_leaf`."""
        sizes, order = self.rows + self.cols, self.order
        back = sorted(range(len(order)), key=order.__getitem__)
        return x.reshape([sizes[i] for i in order]).transpose(back).reshape(self.published)


class Entry(NamedTuple):
    """One published tensor and its place in our parameters.

    Attributes:
        name: as published.
        path: of the leaf; `("router_bias", stack)` for a balancing bias.
        index: in the leaf's leading dimensions (layer, expert).
        layout: of the rest.
        kind: what V3's checkpoint keeps such a tensor in.
        start: where it begins in the leaf's last dimension (gate and up lie in one).
        parts: tensors beside one another in that dimension.
        copy: another entry writes the leaf; this name is published for those that read it.
    """

    name: str
    path: Path
    index: tuple[int, ...]
    layout: Layout
    kind: Kind
    start: int = 0
    parts: int = 1
    copy: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The published shape."""
        return self.layout.published

    @property
    def in_dims(self) -> int:
        """Of a matrix: how many of the leaf's dimensions are columns, which are contracted."""
        return sum(group[0] >= len(self.layout.rows) for group in self.layout.groups)


class _Rule(NamedTuple):
    """An entry below a prefix: the same in every layer."""

    name: str
    path: Path
    layout: Layout
    kind: Kind = "bf16"
    start: int = 0
    parts: int = 1
    index: tuple[int, ...] = ()


def _vector(size: int) -> Layout:
    return Layout((size,), (), ((0,),))


def _transposed(out_dim: int, in_dim: int) -> Layout:
    """[out, in] -> [in, out]."""
    return Layout((out_dim,), (in_dim,), ((1,), (0,)))


def _by_head(heads: int, width: int, in_dim: int) -> Layout:
    """[heads * width, in] -> [in, heads, width]."""
    return Layout((heads, width), (in_dim,), ((2,), (0,), (1,)))


def _by_head_in_halves(heads: int, width: int, in_dim: int) -> Layout:
    """[heads * width, in] -> [in, heads, width], with rotary pairs brought side by side.

    Llama and Qwen2 rotate number i of a head with number i + width / 2; here pairs are 2i, 2i + 1.
    """
    return Layout((heads, 2, width // 2), (in_dim,), ((3,), (0,), (2, 1)))


def _output(heads: int, width: int, out_dim: int) -> Layout:
    """[out, heads * width] -> [heads, width, out]."""
    return Layout((out_dim,), (heads, width), ((1,), (2,), (0,)))


def _mla(config: MlaConfig, d: int) -> Iterator[_Rule]:
    a, n, c, z = "self_attn", config.num_heads, config.kv_latent_dim, config.cache_dim
    y, q = config.nope_dim + config.value_dim, config.q_latent_dim
    yield _Rule(
        f"{a}.kv_a_proj_with_mqa.weight", ("attention", "w_dkvr_DZ"), _transposed(z, d), "fp8"
    )
    yield _Rule(f"{a}.kv_a_layernorm.weight", ("attention", "kv_norm_C"), _vector(c))
    yield _Rule(f"{a}.kv_b_proj.weight", ("attention", "w_ukv_CNY"), _by_head(n, y, c), "fp8")
    out = _output(n, config.value_dim, d)
    yield _Rule(f"{a}.o_proj.weight", ("attention", "w_o_NHD"), out, "fp8")
    heads = _by_head(n, config.head_dim, q or d)
    if q is None:
        yield _Rule(f"{a}.q_proj.weight", ("attention", "w_q_DNA"), heads, "fp8")
        return
    yield _Rule(f"{a}.q_a_proj.weight", ("attention", "w_dq_DQ"), _transposed(q, d), "fp8")
    yield _Rule(f"{a}.q_a_layernorm.weight", ("attention", "q_norm_Q"), _vector(q))
    yield _Rule(f"{a}.q_b_proj.weight", ("attention", "w_uq_QNA"), heads, "fp8")


def _gqa(config: GqaConfig, d: int) -> Iterator[_Rule]:
    a, n, i, h = "self_attn", config.num_heads, config.num_kv_heads, config.head_dim
    halves = {"q": (n, "w_q_DNA", "b_q_NA"), "k": (i, "w_k_DIA", "b_k_IA")}
    for part, (heads, weight, bias) in halves.items():
        layout = _by_head_in_halves(heads, h, d)
        yield _Rule(f"{a}.{part}_proj.weight", ("attention", weight), layout, "fp8")
        if config.qkv_bias:
            layout = Layout((heads, 2, h // 2), (), ((0,), (2, 1)))
            yield _Rule(f"{a}.{part}_proj.bias", ("attention", bias), layout)
    yield _Rule(f"{a}.v_proj.weight", ("attention", "w_v_DIH"), _by_head(i, h, d), "fp8")
    if config.qkv_bias:
        layout = Layout((i, h), (), ((0,), (1,)))
        yield _Rule(f"{a}.v_proj.bias", ("attention", "b_v_IH"), layout)
    yield _Rule(f"{a}.o_proj.weight", ("attention", "w_o_NHD"), _output(n, h, d), "fp8")
    if config.out_bias:
        yield _Rule(f"{a}.o_proj.bias", ("attention", "b_o_D"), _vector(d))


def _gate_up(prefix: str, path: Path, d: int, f: int, index: tuple[int, ...] = ()):
    """Two of [F, D] -> one of [D, 2F], gate first; experts' have an index."""
    for i, part in enumerate(("gate", "up")):
        name = f"{prefix}.{part}_proj.weight"
        yield _Rule(name, path, _transposed(f, d), "fp8", start=i * f, parts=2, index=index)


def _moe(config: MoeConfig, d: int) -> Iterator[_Rule]:
    e, f, shared = config.num_experts, config.expert_dim, config.num_shared_experts
    yield _Rule("mlp.gate.weight", ("ffn", "w_router_DE"), _transposed(e, d))
    for i in range(e):
        prefix = f"mlp.experts.{i}"
        yield from _gate_up(prefix, ("ffn", "w_in_ED2F"), d, f, (i,))
        down = _transposed(d, f)
        name = f"{prefix}.down_proj.weight"
        yield _Rule(name, ("ffn", "w_down_EFD"), down, "fp8", index=(i,))
    if shared:
        prefix, path = "mlp.shared_experts", ("ffn", "shared")
        yield from _gate_up(prefix, (*path, "w_in_D2F"), d, shared * f)
        down = _transposed(d, shared * f)
        yield _Rule(f"{prefix}.down_proj.weight", (*path, "w_down_FD"), down, "fp8")


def _block(block: BlockConfig, d: int) -> Iterator[_Rule]:
    """The rules of one layer; names are below `model.layers.<i>.`."""
    yield _Rule("input_layernorm.weight", ("attention_norm_D",), _vector(d))
    yield _Rule("post_attention_layernorm.weight", ("ffn_norm_D",), _vector(d))
    if isinstance(block.attention, MlaConfig):
        yield from _mla(block.attention, d)
    else:
        yield from _gqa(block.attention, d)
    if isinstance(block.ffn, MoeConfig):
        yield from _moe(block.ffn, d)
        return
    f = block.ffn.hidden_dim
    yield from _gate_up("mlp", ("ffn", "w_in_D2F"), d, f)
    yield _Rule("mlp.down_proj.weight", ("ffn", "w_down_FD"), _transposed(d, f), "fp8")


def _bias(prefix: str, block: BlockConfig, stack: str, layer: int) -> Iterator[Entry]:
    if isinstance(block.ffn, MoeConfig) and block.ffn.balance_bias:
        name = f"{prefix}mlp.gate.e_score_correction_bias"
        path = ("router_bias", stack)
        yield Entry(name, path, (layer,), _vector(block.ffn.num_experts), "f32")


def _placed(prefix: str, rule: _Rule, path: Path, index: tuple[int, ...]) -> Entry:
    return Entry(
        prefix + rule.name,
        path + rule.path,
        index + rule.index,
        rule.layout,
        rule.kind,
        rule.start,
        rule.parts,
    )


def entries(config: ModelConfig) -> list[Entry]:
    """Every published tensor of a model, in the order of its layers, MTP's last."""
    v, d = config.vocab_size, config.embed_dim
    embed = Layout((v,), (d,), ((0,), (1,)))
    head = _transposed(v, d)
    found = [
        Entry("model.embed_tokens.weight", ("embed_VD",), (), embed, "bf16"),
        Entry("model.norm.weight", ("final_norm_D",), (), _vector(d), "bf16"),
    ]
    if not config.tie_embeddings:
        found.append(Entry("lm_head.weight", ("head_DV",), (), head, "bf16"))
    first = 0
    for stack in config.stacks:
        for j, block in enumerate(stack.blocks):
            rules = list(_block(block, d))
            for i in range(stack.repeats):
                prefix = LAYER.format(first + i * len(stack.blocks) + j)
                path: Path = ("stacks", stack.name, j)
                found += [_placed(prefix, rule, path, (i,)) for rule in rules]
                found += _bias(prefix, block, stack.key(j), i)
        first += stack.repeats * len(stack.blocks)
    if config.mtp is None:
        return found
    for i in range(config.mtp.depth):
        prefix, path = LAYER.format(first + i), ("mtp_modules", i)
        found += [
            Entry(f"{prefix}embed_tokens.weight", ("embed_VD",), (), embed, "bf16", copy=True),
            _placed(prefix, _Rule("enorm.weight", ("embedding_norm_D",), _vector(d)), path, ()),
            _placed(prefix, _Rule("hnorm.weight", ("hidden_norm_D",), _vector(d)), path, ()),
            _placed(
                prefix, _Rule("eh_proj.weight", ("w_proj_2DD",), _transposed(d, 2 * d)), path, ()
            ),
        ]
        found += [
            _placed(prefix, rule, (*path, "block"), ()) for rule in _block(config.mtp.block, d)
        ]
        found += _bias(prefix, config.mtp.block, "mtp", i)
        last = _Rule("shared_head.norm.weight", ("final_norm_D",), _vector(d))
        found.append(_placed(prefix, last, path, ()))
        shared = embed if config.tie_embeddings else head
        path = ("embed_VD",) if config.tie_embeddings else ("head_DV",)
        name = f"{prefix}shared_head.head.weight"
        found.append(Entry(name, path, (), shared, "bf16", copy=True))
    return found


def by_leaf(config: ModelConfig) -> dict[Path, list[Entry]]:
    """The entries that write each leaf, copies left out."""
    leaves: dict[Path, list[Entry]] = {}
    for entry in entries(config):
        if not entry.copy:
            leaves.setdefault(entry.path, []).append(entry)
    return leaves


def leaf_shape(group: list[Entry]) -> tuple[int, ...]:
    """The shape of the leaf that these entries fill."""
    lead = tuple(max(numbers) + 1 for numbers in zip(*(e.index for e in group), strict=True))
    *shape, last = group[0].layout.leaf
    return (*lead, *shape, last * group[0].parts)


def from_tensors(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> tuple[dict, dict]:
    """Published tensors in memory -> (params, bias), NumPy arrays in the tensors' dtypes.

    The plain form of `dsjax.interop.load`, for gradients and tests.

    Raises:
        InputError: naming a tensor that is missing.
    """
    tree: dict = {}
    for path, group in by_leaf(config).items():
        leaf = None
        for entry in group:
            if entry.name not in tensors:
                raise InputError(f"missing tensor {entry.name}")
            part = entry.layout.to_leaf(np.asarray(tensors[entry.name]))
            if leaf is None:
                leaf = np.empty(leaf_shape(group), part.dtype)
            leaf[(*entry.index, ..., slice(entry.start, entry.start + part.shape[-1]))] = part
        put(tree, path, leaf)
    return tree, tree.pop("router_bias", {})


def to_tensors(params: Mapping, bias: Mapping, config: ModelConfig) -> dict[str, np.ndarray]:
    """(params, bias) -> published tensors in memory; the inverse of `from_tensors`.

    Gradients have no biases: what `bias` lacks is left out.
    """
    tree = {**params, "router_bias": bias}
    tensors = {}
    for entry in entries(config):
        if entry.path[0] == "router_bias" and entry.path[1] not in bias:
            continue
        leaf, size = np.asarray(get(tree, entry.path)), entry.layout.leaf[-1]
        part = leaf[(*entry.index, ..., slice(entry.start, entry.start + size))]
        tensors[entry.name] = entry.layout.to_published(part)
    return tensors


def put(tree: dict, path: Path, leaf: Any) -> None:
    """Sets a leaf of nested dicts, making them on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def get(tree: Mapping, path: Path) -> Any:
    """The leaf of nested dicts at a path."""
    for key in path:
        tree = tree[key]
    return tree
