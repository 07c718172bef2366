"""Slots that sequences take and leave while the others go on: two programs, `admit` and `run`.

Knows nothing about queues or text. A slot has pages of the cache for the longest sequence there may
be, so that no array changes its shape; a sequence's tokens depend on its own number and the seed,
not on its slot or its neighbours. On a mesh each device along `batch` has slots of its own, and
numbers of slots are its own, too.

S slots of a device, W of them that take part, P prompts of T positions, G new tokens at most, X
pages of a slot, Y = prompt and new tokens, L layers, K experts a token.
"""

import dataclasses
import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PRNGKeyArray

from dsjax.config import InferConfig, ModelConfig
from dsjax.infer.generate import decode, prefill
from dsjax.infer.sampler import sample
from dsjax.meshes import blueprint_rules
from dsjax.model.cache import (
    PAGE_SIZE,
    Entries,
    KeysValues,
    contiguous_table,
    empty_entries,
    page_axes,
)
from dsjax.model.transformer import merge
from sharding import island
from sharding.rules import AxisRules


@no_type_check  # its leaves may be shapes, shardings or flags
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Sequences in progress. Those of empty slots mean nothing.

    Attributes:
        entries: the cache's arrays.
        table_SX: int32 pages of each slot on its device.
        number_S: uint32 which sequence it is; decides what is drawn.
        token_S: int32 the newest token, which no layer has seen yet.
        cached_S: int32 positions cached.
        count_S: int32 new tokens, the newest one included.
        budget_S: int32 how many there may be.
        running_S: whether there will be more.
        stopped_S: whether a stop token ended it.
        tokens_SG: int32 new tokens.
        log_probs_SG: float32 of each, after temperature and truncation.
        routing: {stack: uint16 [S, Y, L, K]} experts of each position, or empty.
    """

    entries: dict[str, Entries]
    table_SX: Array
    number_S: Array
    token_S: Array
    cached_S: Array
    count_S: Array
    budget_S: Array
    running_S: Array
    stopped_S: Array
    tokens_SG: Array
    log_probs_SG: Array
    routing: dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotSizes:
    """What decides the shapes of the programs.

    Attributes:
        slots: on each device along `batch`.
        max_prompt: tokens of the longest prompt.
        max_tokens: new tokens at most.
        keep_routing: whether experts are kept.
    """

    slots: int
    max_prompt: int
    max_tokens: int
    keep_routing: bool = False

    @property
    def positions(self) -> int:
        """Of the longest sequence."""
        return self.max_prompt + self.max_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """How tokens are drawn; the same for all sequences.

    Attributes:
        allowed: ids from here on never are.
        stop_ids: tokens that end a sequence.
    """

    allowed: int
    stop_ids: tuple[int, ...]


def specs(config: ModelConfig, rules: AxisRules, slots: Slots) -> Slots:
    """How slots lie on a mesh."""
    batch = rules.of("batch")
    by_page = (*batch, *page_axes(config, rules)) or None
    heads = rules.of("act_heads") or None

    def of_entries(entries):
        if isinstance(entries, KeysValues):
            return jax.tree.map(lambda _: P(None, by_page, None, heads), entries)
        return jax.tree.map(lambda _: P(None, by_page), entries)

    by_row = jax.tree.map(lambda _: P(batch or None), dataclasses.replace(slots, entries={}))
    return dataclasses.replace(
        by_row, entries={key: of_entries(entries) for key, entries in slots.entries.items()}
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "sizes", "infer"))
def empty(
    graphdef: nnx.GraphDef, params: Any, bias: Any, *, sizes: SlotSizes, infer: InferConfig
) -> Slots:
    """Slots that nothing is in, on the devices of the weights; all memory that is ever needed.

    Args:
        graphdef: the model's blueprint.
        params: its weights; only where they lie matters.
        bias: its balancing biases.
        sizes: of what is kept.
        infer: how the cache is kept.
    """
    rules = blueprint_rules(graphdef)

    def local(params, bias):
        model = merge(graphdef, params, bias)
        return _empty(model, sizes, infer)

    shapes = jax.eval_shape(local, params, bias)  # outside an island: the fields are what counts
    config = merge(graphdef, params, bias).config
    return island.run(local, specs(config, rules, shapes), params, bias)


def _empty(model, sizes, infer):
    parts = island.count(page_axes(model.config, model.rules))
    table_SX = contiguous_table(sizes.slots, sizes.positions, parts)
    dtype = model.precision.compute_dtype
    zeros_S = jnp.zeros((sizes.slots,), jnp.int32)
    zeros_SG = jnp.zeros((sizes.slots, sizes.max_tokens), jnp.int32)
    routing = {}
    if sizes.keep_routing:
        for stack in model.config.stacks:
            for i, block in enumerate(stack.blocks):
                if chosen := getattr(block.ffn, "num_experts_per_token", 0):
                    shape = sizes.slots, sizes.positions, stack.repeats, chosen
                    routing[stack.key(i)] = jnp.zeros(shape, jnp.uint16)
    return Slots(
        entries=empty_entries(model.config, table_SX.size, dtype, infer.cache),
        table_SX=table_SX,
        number_S=zeros_S.astype(jnp.uint32),
        token_S=zeros_S,
        cached_S=zeros_S,
        count_S=zeros_S,
        budget_S=zeros_S,
        running_S=zeros_S > 0,
        stopped_S=zeros_S > 0,
        tokens_SG=zeros_SG,
        log_probs_SG=zeros_SG.astype(jnp.float32),
        routing=routing,
    )


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "drawing", "infer"),
    donate_argnames="slots",
)
def admit(
    graphdef: nnx.GraphDef,
    params: Any,
    bias: Any,
    slots: Slots,
    newcomers: dict[str, Array],
    key: PRNGKeyArray,
    temperature: Array,
    top_p: Array,
    *,
    drawing: Drawing,
    infer: InferConfig,
) -> Slots:
    """Runs prompts into slots, and draws the first token of each sequence.

    Sequences of one prompt share its prefill: it runs once, and what it cached is copied.

    Args:
        graphdef: the model's blueprint.
        params: its weights, prepared.
        bias: its balancing biases.
        slots: donated.
        newcomers: `prompts_PT` int32, padded on the right; `length_P` int32, 0 for none;
            `home_P` int32, the slot into which each runs; and of each sequence `source_W` int32,
            its prompt; `slot_W` int32, S for none; `number_W` uint32; `budget_W` int32.
        key: of all draws.
        temperature: divides logits; 0 takes the best token.
        top_p: keeps the smallest set of tokens with this probability.
        drawing: how tokens are drawn.
        infer: how prompts are run.
    """
    rules = blueprint_rules(graphdef)

    def local(params, bias, slots, newcomers, *draws):
        return _admit(graphdef, drawing, infer, params, bias, slots, newcomers, *draws)

    config = merge(graphdef, params, bias).config
    arguments = params, bias, slots, newcomers, key, temperature, top_p
    return island.run(local, specs(config, rules, slots), *arguments)


def _admit(graphdef, drawing, infer, params, bias, slots, newcomers, key, temperature, top_p):
    model = merge(graphdef, params, bias)
    prompts_PT, length_P, home_P = (newcomers[n] for n in ("prompts_PT", "length_P", "home_P"))
    source_W, slot_W = newcomers["source_W"], newcomers["slot_W"]
    hidden_PD, entries, routed = prefill(
        *(model, prompts_PT, length_P, slots.entries, slots.table_SX[home_P]),
        chunk=infer.prefill_chunk,
    )
    if len(source_W) > len(home_P):
        pages = -(-prompts_PT.shape[1] // PAGE_SIZE)
        pages = min(pages, slots.table_SX.shape[1])
        # A slot out of range gets a page out of range, which is not written.
        to_WX = slots.table_SX.at[slot_W, :pages].get(mode="fill", fill_value=slots.table_SX.size)
        entries = _copy_pages(entries, slots.table_SX[home_P[source_W], :pages], to_WX)
    logits_WV = model.logits(hidden_PD[source_W][:, None])[:, 0]
    first_W = jnp.zeros(slot_W.shape, jnp.int32)
    key_W = _keys(key, newcomers["number_W"], first_W)
    token_W, log_prob_W = sample(
        *(logits_WV, key_W), temperature=temperature, top_p=top_p, allowed=drawing.allowed
    )
    stopped_W = _is_stop(token_W, drawing)
    routing = dict(slots.routing)
    for name, kept in slots.routing.items():
        routed_WTLK = jnp.moveaxis(routed[name], 0, 2)[source_W]
        routing[name] = kept.at[slot_W, : routed_WTLK.shape[1]].set(routed_WTLK, mode="drop")

    def put(old_S, new_W):
        return old_S.at[slot_W].set(new_W, mode="drop")

    return Slots(
        entries=entries,
        table_SX=slots.table_SX,
        number_S=put(slots.number_S, newcomers["number_W"]),
        token_S=put(slots.token_S, token_W),
        cached_S=put(slots.cached_S, length_P[source_W]),
        count_S=put(slots.count_S, first_W + 1),
        budget_S=put(slots.budget_S, newcomers["budget_W"]),
        running_S=put(slots.running_S, ~stopped_W & (newcomers["budget_W"] > 1)),
        stopped_S=put(slots.stopped_S, stopped_W),
        tokens_SG=slots.tokens_SG.at[slot_W, 0].set(token_W, mode="drop"),
        log_probs_SG=slots.log_probs_SG.at[slot_W, 0].set(log_prob_W, mode="drop"),
        routing=routing,
    )


def _copy_pages(entries: Any, from_WX: Array, to_WX: Array) -> Any:
    def copied(leaf):  # [L, X, ...]
        return leaf.at[:, to_WX.reshape(-1)].set(leaf[:, from_WX.reshape(-1)], mode="drop")

    return jax.tree.map(copied, entries)


@functools.partial(jax.jit, static_argnames=("graphdef", "drawing"), donate_argnames="slots")
def run(
    graphdef: nnx.GraphDef,
    params: Any,
    bias: Any,
    slots: Slots,
    slot_W: Int[Array, " W"],
    leave_at: Int[Array, ""],
    key: PRNGKeyArray,
    temperature: Array,
    top_p: Array,
    *,
    drawing: Drawing,
) -> Slots:
    """Takes steps, a token a running sequence each, until so few are running.

    Args:
        graphdef: the model's blueprint.
        params: its weights, prepared.
        bias: its balancing biases.
        slots: donated.
        slot_W: int32, different slots, all running ones among them.
        leave_at: int32; ends once no device has more of them running.
        key: of all draws.
        temperature: divides logits; 0 takes the best token.
        top_p: keeps the smallest set of tokens with this probability.
        drawing: how tokens are drawn.
    """
    rules = blueprint_rules(graphdef)

    def local(params, bias, slots, slot_W, *rest):
        return _run(graphdef, drawing, params, bias, slots, slot_W, *rest)

    config = merge(graphdef, params, bias).config
    arguments = params, bias, slots, slot_W, leave_at, key, temperature, top_p
    return island.run(local, specs(config, rules, slots), *arguments)


def _run(graphdef, drawing, params, bias, slots, slot_W, leave_at, key, temperature, top_p):
    model = merge(graphdef, params, bias)
    if len(slot_W) == len(slots.token_S):
        slot_W = jnp.arange(len(slot_W))  # known to the compiler
    budget_W, number_W = slots.budget_S[slot_W], slots.number_S[slot_W]
    table_WX, width_W = slots.table_SX[slot_W], jnp.arange(len(slot_W))

    def busiest(running_W):
        return island.max_tokens(jnp.sum(running_W, dtype=jnp.int32), model.rules)

    def unfinished(loop):
        return loop[-1] > leave_at

    def step(loop):
        entries, routing, token_W, cached_W, count_W, running_W, stopped_W, kept, _ = loop
        logits_WV, entries, routed = decode(model, token_W, cached_W, running_W, entries, table_WX)
        if routing:
            at = slot_W, jnp.where(running_W, cached_W, _NOWHERE)
            routing = {
                name: of_S.at[at].set(jnp.moveaxis(routed[name][:, :, 0], 0, 1), mode="drop")
                for name, of_S in routing.items()
            }
        drawn_W, log_prob_W = sample(
            *(logits_WV, _keys(key, number_W, count_W)),
            temperature=temperature,
            top_p=top_p,
            allowed=drawing.allowed,
        )
        tokens_WG, log_probs_WG = kept
        at = width_W, jnp.where(running_W, count_W, _NOWHERE)
        kept = (
            tokens_WG.at[at].set(drawn_W, mode="drop"),
            log_probs_WG.at[at].set(log_prob_W, mode="drop"),
        )
        token_W = jnp.where(running_W, drawn_W, token_W)
        cached_W, count_W = cached_W + running_W, count_W + running_W
        stops_W = running_W & _is_stop(drawn_W, drawing)
        running_W = running_W & ~stops_W & (count_W < budget_W)
        stopped_W = stopped_W | stops_W
        state = token_W, cached_W, count_W, running_W, stopped_W, kept, busiest(running_W)
        return entries, routing, *state

    running_W = slots.running_S[slot_W]
    entries, routing, token_W, cached_W, count_W, running_W, stopped_W, kept, _ = (
        jax.lax.while_loop(
            unfinished,
            step,
            (
                slots.entries,
                slots.routing,
                slots.token_S[slot_W],
                slots.cached_S[slot_W],
                slots.count_S[slot_W],
                running_W,
                slots.stopped_S[slot_W],
                (slots.tokens_SG[slot_W], slots.log_probs_SG[slot_W]),
                busiest(running_W),
            ),
        )
    )
    return dataclasses.replace(
        slots,
        entries=entries,
        routing=routing,
        token_S=slots.token_S.at[slot_W].set(token_W),
        cached_S=slots.cached_S.at[slot_W].set(cached_W),
        count_S=slots.count_S.at[slot_W].set(count_W),
        running_S=slots.running_S.at[slot_W].set(running_W),
        stopped_S=slots.stopped_S.at[slot_W].set(stopped_W),
        tokens_SG=slots.tokens_SG.at[slot_W].set(kept[0]),
        log_probs_SG=slots.log_probs_SG.at[slot_W].set(kept[1]),
    )


_NOWHERE = 2**30  # past every array's end: dropped


def _keys(key, number_W, count_W):
    """A key for each sequence and token."""

    def one(number, count):
        return jax.random.fold_in(jax.random.fold_in(key, number), count)

    return jax.vmap(one)(number_W, count_W)


def _is_stop(token_W, drawing):
    # Of no element XLA:CPU dies inside an island.
    return (token_W[:, None] == jnp.asarray(drawing.stop_ids or (-1,), jnp.int32)).any(axis=1)
