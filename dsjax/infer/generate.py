"""Generation of a batch: one prefill, then one token a step over the cache.

Knows nothing about text or training. B sequences, T prompt positions, G new positions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dsjax.config import InferConfig
from dsjax.infer.sampler import Sampling, row_keys, sample
from dsjax.meshes import blueprint_rules, mesh_of
from dsjax.model.cache import (
    PAGE_SIZE,
    Cache,
    Entries,
    advance,
    contiguous_table,
    empty_entries,
    page_axes,
)
from dsjax.model.transformer import Transformer, merge
from dsjax.precision import Quantized
from sharding import island
from sharding.spread import Spread

Routing = dict[str, jax.Array]  # {stack: uint16 [L, B, T, K]}


@dataclasses.dataclass(frozen=True)
class Generation:
    """Of a batch.

    Attributes:
        tokens_BG: int32 new tokens; after a sequence's end they mean nothing.
        log_probs_BG: float32 log probability of each, after temperature and truncation.
        length_B: int32 new tokens of each sequence, its stop token included.
        stopped_B: whether a stop token ended it (else its budget did).
    """

    tokens_BG: np.ndarray
    log_probs_BG: np.ndarray
    length_B: np.ndarray
    stopped_B: np.ndarray


def prepare(
    params: dict, bias: dict, dtype: jnp.dtype, *, recipe: str = "plain"
) -> tuple[dict, dict]:
    """Casts weights for decoding, once a weight version; those of that dtype are shared.

    The router's weight stays float32; norms, and weights in FP8, keep what they are kept in. So do
    all matrices of a recipe that rounds them from float32 masters.
    """

    def cast(path, leaf):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if isinstance(leaf, Quantized) or "router" in name or "norm" in name:
            return leaf
        if recipe == "fp8" and name.startswith("w_"):
            return leaf
        return leaf.astype(dtype)

    def whole(leaf):
        return isinstance(leaf, Quantized)

    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=whole), bias


def generate(
    graphdef: nnx.GraphDef,
    params: dict,
    bias: dict,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...] = (),
    allowed: int,
    seed: int,
    infer: InferConfig | None = None,
) -> Generation:
    """Continues a batch of prompts.

    Prompt lengths and budgets are rounded up to whole pages of 64, so a handful of programs serves
    every call of a batch size.

    Args:
        graphdef: the model's blueprint.
        params: its weights.
        bias: its balancing biases.
        prompts: token ids, at least one each.
        max_tokens: the budget of new tokens.
        sampling: how tokens are drawn.
        stop_ids: tokens that end a sequence.
        allowed: ids from here on are never drawn.
        seed: of the draws; the same seed and batch give the same tokens.
        infer: how the cache is kept and filled; None for the defaults.

    Raises:
        ValueError: for an empty prompt or budget, or an FP8 cache of a model without latents.
    """
    if max_tokens < 1 or not prompts or not all(prompts):
        raise ValueError("generation needs a prompt of one token and a budget of one")
    rules = blueprint_rules(graphdef)
    spread, asked = Spread(mesh_of(params), rules), len(prompts)
    prompts = prompts + prompts[-1:] * (-asked % spread.row_devices())
    width = _whole_pages(max(map(len, prompts)))
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    length_B = np.array([len(prompt) for prompt in prompts], np.int32)
    rows = {"tokens_BT": tokens_BT, "length_B": length_B}
    with spread.mesh_set():
        found = run(
            graphdef,
            params,
            bias,
            *spread(rows, len(prompts), whole=True).values(),
            jax.random.key(seed),
            np.float32(sampling.temperature),
            np.float32(sampling.top_p),
            np.asarray(stop_ids or (-1,), np.int32),  # of no element XLA:CPU dies inside an island
            np.int32(max_tokens),
            budget=_whole_pages(max_tokens),
            allowed=allowed,
            infer=infer or InferConfig(),
        )
    tokens, log_probs, count, stopped = (np.asarray(x)[:asked] for x in found)
    return Generation(tokens[:, :max_tokens], log_probs[:, :max_tokens], count, stopped)


def _whole_pages(positions: int) -> int:
    return -(-positions // PAGE_SIZE) * PAGE_SIZE


@functools.partial(jax.jit, static_argnames=("graphdef", "budget", "allowed", "infer"))
def run(
    graphdef: nnx.GraphDef,
    params: dict,
    bias: dict,
    tokens_BT: Int[Array, "B T"],
    length_B: Int[Array, " B"],
    key: PRNGKeyArray,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    stop_ids: Int[Array, " _"],
    max_tokens: Int[Array, ""],
    *,
    budget: int,
    allowed: int,
    infer: InferConfig,
) -> tuple[Int[Array, "B G"], Float[Array, "B G"], Int[Array, " B"], Bool[Array, " B"]]:
    """The program of `generate`: prefill, then a loop that ends when every sequence has.

    Returns:
        (tokens_BG, log_probs_BG, length_B, stopped_B) with G = budget.
    """
    rules = blueprint_rules(graphdef)

    def local(*arrays):
        return _run(graphdef, rules, budget, allowed, infer, *arrays)

    by_row = P(rules.of("batch") or None)
    arrays = params, bias, tokens_BT, length_B, key, temperature, top_p, stop_ids, max_tokens
    return island.run(local, by_row, *arrays)


def _run(
    graphdef,
    rules,
    budget,
    allowed,
    infer,
    params,
    bias,
    tokens_BT,
    length_B,
    key,
    temperature,
    top_p,
    stop_ids,
    max_tokens,
):
    """`run` of the sequences of one device."""
    # Once a call, not once a token: weights kept in another dtype are cast here.
    precision = merge(graphdef, params, bias).precision
    params, bias = prepare(params, bias, precision.compute_dtype, recipe=precision.recipe)
    model = merge(graphdef, params, bias)
    batch, width = tokens_BT.shape
    parts = island.count(page_axes(model.config, rules))
    table_BX = contiguous_table(batch, width + budget, parts)
    dtype = model.precision.compute_dtype
    entries = empty_entries(model.config, table_BX.size, dtype, infer.cache)
    first_row = island.place(rules.of("batch")) * batch

    def draw(logits_BV, number):
        key_B = row_keys(jax.random.fold_in(key, number), batch, first_row)
        return sample(logits_BV, key_B, temperature=temperature, top_p=top_p, allowed=allowed)

    def left(done_B):  # over all devices: they take their steps together
        return island.sum_tokens(jnp.sum(~done_B, dtype=jnp.int32), rules)

    chunk = infer.prefill_chunk
    hidden_BD, entries, _ = prefill(model, tokens_BT, length_B, entries, table_BX, chunk=chunk)
    logits_BV = model.logits(hidden_BD[:, None])[:, 0]
    token_B, log_B = draw(logits_BV, 0)

    def unfinished(loop):
        step, *_, running = loop
        return (step < max_tokens) & (running > 0)

    def step(loop):
        i, token_B, log_B, tokens_BG, log_probs_BG, entries, count_B, done_B, _ = loop
        tokens_BG = tokens_BG.at[:, i].set(token_B)
        log_probs_BG = log_probs_BG.at[:, i].set(log_B)
        count_B = count_B + ~done_B
        done_B = done_B | (token_B[:, None] == stop_ids).any(axis=1)
        logits_BV, entries, _ = decode(model, token_B, length_B + i, ~done_B, entries, table_BX)
        token_B, log_B = draw(logits_BV, i + 1)
        running = left(done_B)
        return i + 1, token_B, log_B, tokens_BG, log_probs_BG, entries, count_B, done_B, running

    tokens_BG = jnp.zeros((batch, budget), jnp.int32)
    log_probs_BG = jnp.zeros((batch, budget), jnp.float32)
    nothing_B = jnp.zeros((batch,), jnp.int32)
    done_B = nothing_B > 0
    start = (0, token_B, log_B, tokens_BG, log_probs_BG, entries, nothing_B, done_B, left(done_B))
    *_, tokens_BG, log_probs_BG, _, count_B, done_B, _ = jax.lax.while_loop(unfinished, step, start)
    return tokens_BG, log_probs_BG, count_B, done_B


def prefill(
    model: Transformer,
    tokens_BT: Int[Array, "B T"],
    length_B: Int[Array, " B"],
    entries: dict[str, Entries],
    table_BX: Int[Array, "B X"],
    *,
    chunk: int | None = None,
) -> tuple[Float[Array, "B D"], dict[str, Entries], Routing]:
    """Runs prompts, padded on the right, into an empty cache.

    Args:
        model: the model.
        tokens_BT: int32 prompts.
        length_B: int32 tokens of each; one of none writes nothing, and its hidden state means
            nothing.
        entries: the cache's arrays.
        table_BX: their pages.
        chunk: positions that run at a time; None for all. Later ones attend to the cache, in the
            form that takes fewer operations; where it is in FP8, to what was rounded.

    Returns:
        (hidden_BD of each prompt's last token, the cache's arrays, the experts of each position).
    """
    batch, width = tokens_BT.shape
    if chunk is None or chunk >= width:
        return _piece(model, tokens_BT, 0, length_B, entries, table_BX, fresh=True)
    tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, -width % chunk)))

    def piece(i, carry):
        hidden_BD, entries, routing = carry
        part_BT = jax.lax.dynamic_slice_in_dim(tokens_BT, i * chunk, chunk, axis=1)
        found_BD, entries, routed = _piece(
            model, part_BT, i * chunk, length_B, entries, table_BX, fresh=False
        )
        ends_here = (length_B - 1) // chunk == i
        hidden_BD = jnp.where(ends_here[:, None], found_BD, hidden_BD)
        return hidden_BD, entries, joined(routing, routed, i)

    def joined(routing, routed, i):
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, i * chunk, axis=2),
            routing,
            routed,
        )

    first_BT, pieces = tokens_BT[:, :chunk], tokens_BT.shape[1] // chunk
    hidden_BD, entries, routed = _piece(model, first_BT, 0, length_B, entries, table_BX, fresh=True)
    # Of an unread result XLA drops what a loop carries.
    routing = {
        key: jnp.zeros((part.shape[0], batch, tokens_BT.shape[1], part.shape[3]), part.dtype)
        for key, part in routed.items()
    }
    start = hidden_BD, entries, joined(routing, routed, 0)
    hidden_BD, entries, routing = jax.lax.fori_loop(1, pieces, piece, start)
    return hidden_BD, entries, {key: whole[:, :, :width] for key, whole in routing.items()}


def _piece(model, tokens_BT, first, length_B, entries, table_BX, *, fresh):
    """`prefill` of the positions from `first` on.

    Hidden states of prompts that end elsewhere mean nothing.
    """
    width, axes = tokens_BT.shape[1], page_axes(model.config, model.rules)
    cached_B = jnp.minimum(length_B, first)
    new_B = jnp.clip(length_B - first, 0, width)
    pages, positions_BT = advance(table_BX, cached_B, new_B, width, axes)
    pages = dataclasses.replace(pages, first_row=jnp.asarray(first, jnp.int32))
    output = model(
        tokens_BT,
        positions_BT=positions_BT,
        segments_BT=(positions_BT >= 0).astype(jnp.int32),
        cache=Cache(entries, pages, fresh=fresh),
    )
    assert output.cache is not None  # it was given one
    last_B11 = jnp.clip(length_B - 1 - first, 0, width - 1)[:, None, None]
    hidden_BD = jnp.take_along_axis(output.hidden_BTD, last_B11, axis=1)[:, 0]
    return hidden_BD, output.cache.entries, output.aux.routing


def decode(
    model: Transformer,
    token_B: Int[Array, " B"],
    cached_B: Int[Array, " B"],
    running_B: Bool[Array, " B"],
    entries: dict[str, Entries],
    table_BX: Int[Array, "B X"],
) -> tuple[Float[Array, "B V"], dict[str, Entries], Routing]:
    """Runs one new token of each running sequence.

    Args:
        model: the model.
        token_B: int32 tokens to run.
        cached_B: int32 positions cached before.
        running_B: bool; a finished sequence writes nothing and reaches no expert.
        entries: the cache's arrays.
        table_BX: their pages.

    Returns:
        (logits_BV of the next token, the cache's arrays, the experts of each token).
    """
    axes = page_axes(model.config, model.rules)
    pages, positions_B1 = advance(table_BX, cached_B, running_B.astype(jnp.int32), 1, axes)
    output = model(
        token_B[:, None],
        positions_BT=positions_B1,
        segments_BT=running_B[:, None].astype(jnp.int32),
        cache=Cache(entries, pages),
    )
    assert output.cache is not None  # it was given one
    return model.logits(output.hidden_BTD)[:, 0], output.cache.entries, output.aux.routing
