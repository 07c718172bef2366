"""Hugging Face tensor names and layouts <-> ours, for DeepSeek checkpoints.

The only place that knows their names. Every rule is linear and loses nothing, so the same tables
carry gradients across as well. Knows nothing about files.

Dimensions as in dsjax/model; L layers of a stack.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from dsjax.config import BlockConfig, MlaConfig, ModelConfig, MoeConfig
from dsjax.errors import InputError


class Rule(NamedTuple):
    """How one of our leaves is made of published tensors, and taken apart into them.

    Attributes:
        path: of the leaf in a block (or in the model).
        names: published names, below the layer's prefix.
        join: published tensors -> leaf.
        cut: leaf -> published tensors.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    join: Callable[..., np.ndarray]
    cut: Callable[[np.ndarray], tuple[np.ndarray, ...]]


def _same(path: tuple[str, ...], name: str) -> Rule:
    return Rule(path, (name,), lambda x: x, lambda x: (x,))


def _transposed(path: tuple[str, ...], name: str) -> Rule:
    return Rule(path, (name,), lambda x: x.T, lambda x: (x.T,))


def _by_head(path: tuple[str, ...], name: str, heads: int) -> Rule:
    """[heads * width, in] <-> [in, heads, width]."""

    def join(w):
        return w.T.reshape(w.shape[1], heads, -1)

    def cut(w):
        return (w.reshape(w.shape[0], -1).T,)

    return Rule(path, (name,), join, cut)


def _gate_up(path: tuple[str, ...], prefix: str) -> Rule:
    """Two of [F, D] <-> one of [D, 2F], gate first."""
    names = (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")

    def cut(w):
        gate, up = np.split(np.asarray(w), 2, axis=1)
        return gate.T, up.T

    return Rule(path, names, lambda gate, up: np.concatenate([gate.T, up.T], axis=1), cut)


def _attention(config: MlaConfig) -> list[Rule]:
    a, n = "self_attn", config.num_heads
    rules = [
        _transposed(("attention", "w_dkvr_DZ"), f"{a}.kv_a_proj_with_mqa.weight"),
        _same(("attention", "kv_norm_C"), f"{a}.kv_a_layernorm.weight"),
        _by_head(("attention", "w_ukv_CNY"), f"{a}.kv_b_proj.weight", n),
        Rule(
            ("attention", "w_o_NHD"),
            (f"{a}.o_proj.weight",),
            lambda w: w.T.reshape(n, -1, w.shape[0]),
            lambda w: (w.reshape(-1, w.shape[2]).T,),
        ),
    ]
    if config.q_latent_dim is None:
        return [*rules, _by_head(("attention", "w_q_DNA"), f"{a}.q_proj.weight", n)]
    return [
        *rules,
        _transposed(("attention", "w_dq_DQ"), f"{a}.q_a_proj.weight"),
        _same(("attention", "q_norm_Q"), f"{a}.q_a_layernorm.weight"),
        _by_head(("attention", "w_uq_QNA"), f"{a}.q_b_proj.weight", n),
    ]


def _experts(config: MoeConfig) -> list[Rule]:
    count = config.num_experts
    prefixes = [f"mlp.experts.{e}" for e in range(count)]
    names_in = [f"{p}.{part}_proj.weight" for p in prefixes for part in ("gate", "up")]

    def join_in(*w):
        gate, up = np.stack(w[0::2]), np.stack(w[1::2])
        return np.concatenate([gate, up], axis=1).transpose(0, 2, 1)

    def cut_in(w):
        gate, up = np.split(np.asarray(w).transpose(0, 2, 1), 2, axis=1)
        return tuple(part for pair in zip(gate, up, strict=True) for part in pair)

    rules = [
        _transposed(("ffn", "w_router_DE"), "mlp.gate.weight"),
        Rule(("ffn", "w_in_ED2F"), tuple(names_in), join_in, cut_in),
        Rule(
            ("ffn", "w_down_EFD"),
            tuple(f"{p}.down_proj.weight" for p in prefixes),
            lambda *w: np.stack(w).transpose(0, 2, 1),
            lambda w: tuple(np.asarray(w).transpose(0, 2, 1)),
        ),
    ]
    if config.num_shared_experts:
        rules += [
            _gate_up(("ffn", "shared", "w_in_D2F"), "mlp.shared_experts"),
            _transposed(("ffn", "shared", "w_down_FD"), "mlp.shared_experts.down_proj.weight"),
        ]
    return rules


def block_rules(block: BlockConfig) -> list[Rule]:
    """The rules of one layer; names are below `model.layers.<i>.`."""
    rules = [
        _same(("attention_norm_D",), "input_layernorm.weight"),
        _same(("ffn_norm_D",), "post_attention_layernorm.weight"),
        *_attention(block.attention),
    ]
    if isinstance(block.ffn, MoeConfig):
        return rules + _experts(block.ffn)
    return [
        *rules,
        _gate_up(("ffn", "w_in_D2F"), "mlp"),
        _transposed(("ffn", "w_down_FD"), "mlp.down_proj.weight"),
    ]


def model_rules() -> list[Rule]:
    """The rules of what stands outside the layers."""
    return [
        _same(("embed_VD",), "model.embed_tokens.weight"),
        _same(("final_norm_D",), "model.norm.weight"),
        _transposed(("head_DV",), "lm_head.weight"),
    ]


BIAS_NAME = "mlp.gate.e_score_correction_bias"


def from_tensors(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> tuple[dict, dict]:
    """Published tensors -> (params, bias), without MTP.

    Raises:
        InputError: naming a tensor that is missing.
    """

    def read(prefix: str, rule: Rule) -> np.ndarray:
        try:
            return rule.join(*(np.asarray(tensors[prefix + name]) for name in rule.names))
        except KeyError as error:
            raise InputError(f"missing tensor {error.args[0]}") from error

    params: dict = {"stacks": {}}
    bias: dict = {}
    for rule in model_rules():
        _put(params, rule.path, read("", rule))
    first = 0
    for stack in config.stacks:
        blocks: dict = {}
        for j, block in enumerate(stack.blocks):
            layers = [first + i * len(stack.blocks) + j for i in range(stack.repeats)]
            for rule in block_rules(block):
                leaves = [read(f"model.layers.{layer}.", rule) for layer in layers]
                _put(blocks.setdefault(j, {}), rule.path, np.stack(leaves))
            if isinstance(block.ffn, MoeConfig) and block.ffn.balance_bias:
                names = [f"model.layers.{layer}.{BIAS_NAME}" for layer in layers]
                bias[stack.key(j)] = np.stack([np.asarray(tensors[name]) for name in names])
        params["stacks"][stack.name] = blocks
        first += stack.repeats * len(stack.blocks)
    return params, bias


def to_tensors(params: Mapping, bias: Mapping, config: ModelConfig) -> dict[str, np.ndarray]:
    """(params, bias) -> published tensors, without MTP; the inverse of `from_tensors`."""
    tensors: dict[str, np.ndarray] = {}

    def write(prefix: str, rule: Rule, leaf) -> None:
        parts = rule.cut(np.asarray(leaf))
        tensors.update({prefix + n: p for n, p in zip(rule.names, parts, strict=True)})

    for rule in model_rules():
        write("", rule, _get(params, rule.path))
    first = 0
    for stack in config.stacks:
        for j, block in enumerate(stack.blocks):
            for i in range(stack.repeats):
                prefix = f"model.layers.{first + i * len(stack.blocks) + j}."
                for rule in block_rules(block):
                    leaf = _get(params, ("stacks", stack.name, j, *rule.path))
                    write(prefix, rule, leaf[i])
                if stack.key(j) in bias:
                    tensors[prefix + BIAS_NAME] = np.asarray(bias[stack.key(j)])[i]
        first += stack.repeats * len(stack.blocks)
    return tensors


def _put(tree: dict, path: tuple, leaf: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _get(tree: Mapping, path: tuple):
    for key in path:
        tree = tree[key]
    return tree
