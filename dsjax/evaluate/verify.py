"""Does a loaded checkpoint compute what was trained? The definition against wrong guesses.

The absolute figures of a checkpoint that nobody has run here are not known, so nothing is compared
with them. Instead one text is scored by the model as it stands, and again under each mistake that
importers make (rotary pairs in halves, a scale left out, two matrices exchanged ...). The model as
it stands has to be clearly better than each: where a mistake was made, undoing it is one of the
guesses, and wins. Knows nothing about files or how a model was loaded.

What a guess costs beside the model: another configuration shares every array and costs a compiled
program; another leaf costs that leaf. None copies the experts of a large model (`SWAP_BYTES`).

B sequences, T positions, U scored tokens, D width, V vocabulary.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Shaped

from dsjax.config import BlockConfig, Config, MlaConfig, ModelConfig, MoeConfig
from dsjax.errors import InputError, nearest
from dsjax.interop.tokenizer import Tokenizer
from dsjax.model.layers import rms_norm
from dsjax.model.mtp import depth_segments
from dsjax.model.transformer import Transformer, build, merge, split
from dsjax.precision import Quantized
from sharding.rules import AxisRules

# A wrong guess must raise the perplexity by this factor. Rounding does not: all weights of `tiny`
# in bfloat16 raise it by 0.02%, in FP8 without scales by 0.4%.
PERPLEXITY_MARGIN = 1.02
# The acceptance must be this many times that under a wrong guess: rounding moves single positions.
ACCEPTANCE_MARGIN = 1.1
# And the mean difference over the tokens must be so many of its standard errors from 0 (as if
# tokens were independent), or a short text would decide by chance: 4 is 1 in 3,000 for ten guesses.
STANDARD_ERRORS = 4.0
# Standard deviation over mean of the final norm's weights, from which on MTP sees whether it was
# applied: on `tiny`, weights spread by 0.04 to 0.3 leave the acceptance as it is, 0.46 costs a
# factor of 1.07, 0.92 one of 1.9.
FINAL_NORM_SPREAD = 0.75
# How much `hnorm` changes what it is given, as the root mean square of a factor's logarithm, from
# which on MTP sees whether it was applied: on `tiny`, 0.2 and 0.5 (its norms' weights scaled
# against one another) cost a factor of 1.06, 0.7 one of 1.2 to 1.3, 1.1 one of 1.6.
HIDDEN_NORM_CHANGE = 0.6
# Published factors of a router's gates beside 1: of V3 and V2.
GATE_SCALES = (2.5, 16.0)
# The most that a guess copies of gate and up projections, smallest leaves first: V3's dense and
# shared ones are 5 GiB of FP8, its routed ones 600.
SWAP_BYTES = 8 * 2**30
LEAST_TOKENS = 64
MAX_TOKENS = 4096  # of a text, unless told
PASS_TOKENS = 4096  # of a forward pass
CHUNK = 256  # positions whose logits are in memory at a time
TOP = 5

Measure = Literal["perplexity", "acceptance"]
Result = Literal["worse", "no clear difference", "better", "not applicable"]
# What `eh_proj` is given, beside the embedding.
MtpInput = Literal["after the final norm", "before the final norm", "without hnorm"]

# The first page of Pride and Prejudice (1813), the Declaration of Independence (1776), and code.
TEXT = '''\
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be \
in want of a wife.

However little known the feelings or views of such a man may be on his first entering a \
neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is \
considered as the rightful property of some one or other of their daughters.

"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is let \
at last?"

Mr. Bennet replied that he had not.

"But it is," returned she; "for Mrs. Long has just been here, and she told me all about it."

Mr. Bennet made no answer.

"Do not you want to know who has taken it?" cried his wife impatiently.

"You want to tell me, and I have no objection to hearing it."

This was invitation enough.

When in the Course of human events, it becomes necessary for one people to dissolve the political \
bands which have connected them with another, and to assume among the powers of the earth, the \
separate and equal station to which the Laws of Nature and of Nature's God entitle them, a decent \
respect to the opinions of mankind requires that they should declare the causes which impel them \
to the separation.

We hold these truths to be self-evident, that all men are created equal, that they are endowed by \
their Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit \
of Happiness.

class Queue:
    """First in, first out."""

    def __init__(self, items=None):
        self._items = list(items) if items is not None else []

    def __len__(self):
        return len(self._items)

    def put(self, item):
        self._items.append(item)

    def get(self):
        if not self._items:
            raise IndexError("the queue is empty")
        return self._items.pop(0)


def greatest_common_divisor(a, b):
    """Returns the largest integer that divides both a and b."""
    while b != 0:
        a, b = b, a % b
    return abs(a)


def binary_search(values, target):
    """Returns the index of target in a sorted list, or -1 if it is not there."""
    low, high = 0, len(values) - 1
    while low <= high:
        middle = (low + high) // 2
        if values[middle] == target:
            return middle
        if values[middle] < target:
            low = middle + 1
        else:
            high = middle - 1
    return -1


if __name__ == "__main__":
    assert greatest_common_divisor(12, 18) == 6
    assert binary_search([1, 3, 5, 7, 9], 7) == 3
    print("all tests passed")
'''

# What a general model says next. Advice: a small model knows few of these.
PROMPTS = (
    ("The capital of France is", " Paris"),
    ("The opposite of hot is", " cold"),
    ("Monday, Tuesday, Wednesday,", " Thursday"),
    ("one, two, three, four,", " five"),
    ("To be, or not to", " be"),
    ("The first president of the United States was George", " Washington"),
    ("Roses are red, violets are", " blue"),
    ("The sun rises in the", " east"),
    ("import numpy as", " np"),
    ("def add(a, b):\n    return a +", " b"),
)


# ---- scoring ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model under test: its definition and arrays, or those under a wrong guess.

    Attributes:
        config: what it is.
        params: nested dicts of weights.
        bias: {stack: [L, E]} balancing biases.
        mtp_input: the hidden state that MTP is given; `hnorm` norms it again, or (the last) not.
            None does not ask MTP: a smaller program.
    """

    config: Config
    params: dict[str, Any]
    bias: dict[str, Any]
    mtp_input: MtpInput | None = "after the final norm"


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of a text, token by token.

    Attributes:
        nats_U: minus the log probability of each token.
        hit_U: whether MTP's second token is the main model's; empty where MTP was not asked.
    """

    nats_U: Float[np.ndarray, " U"]
    hit_U: Bool[np.ndarray, " U2"]

    @property
    def perplexity(self) -> float:
        """The exponential of the mean; infinite where it is no number."""
        mean = float(np.mean(self.nats_U))
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def acceptance(self) -> float | None:
        """Share of MTP's second tokens that are the main model's."""
        return float(np.mean(self.hit_U)) if self.hit_U.size else None


def windows(
    ids: Sequence[int], prefix: Sequence[int], length: int
) -> Iterator[dict[str, Shaped[np.ndarray, "B T"]]]:
    """Cuts a text into rows, and these into batches of one shape.

    Every token is a target once: but the very first, where no prefix stands before it.

    Args:
        ids: of the text.
        prefix: what begins each row (a beginning token), or nothing.
        length: T, the longest row.

    Yields:
        tokens_BT, targets_BT, segments_BT, positions_BT; weights_BT is 1 for targets of the text.
    """
    ids, prefix = list(ids), list(prefix)
    skipped = max(len(prefix) - 1, 0)  # targets within the prefix
    first = 0 if prefix else 1
    step = length - skipped
    rows = []
    for start in range(first, len(ids), step):
        targets = [*prefix[1:], *ids[start : start + step]]
        before = prefix if prefix else ids[start - 1 : start]
        tokens = [*before, *ids[start : start + step]]
        rows.append((tokens[: len(targets)], targets))
    length = min(length, max(len(tokens) for tokens, _ in rows))
    size = min(len(rows), max(1, PASS_TOKENS // length))
    for begin in range(0, len(rows), size):
        names = ("tokens_BT", "targets_BT", "segments_BT", "positions_BT")
        batch: dict[str, np.ndarray] = {n: np.zeros((size, length), np.int32) for n in names}
        batch["weights_BT"] = np.zeros((size, length), np.float32)
        for i, (tokens, targets) in enumerate(rows[begin : begin + size]):
            n = len(tokens)
            batch["tokens_BT"][i, :n], batch["targets_BT"][i, :n] = tokens, targets
            batch["segments_BT"][i, :n], batch["positions_BT"][i, :n] = 1, np.arange(n)
            batch["weights_BT"][i, skipped:n] = 1.0
        yield batch


def blueprint(config: Config, rules: AxisRules) -> nnx.GraphDef:
    """The graphdef of a configuration; makes no array."""
    return split(jax.eval_shape(build(config, rules), jax.random.key(0)))[0]


def score(
    candidate: Candidate, batches: Sequence[Mapping[str, np.ndarray]], rules: AxisRules
) -> Scores:
    """Scores a text.

    Args:
        candidate: the model.
        batches: of `windows`.
        rules: where each logical axis goes.
    """
    graphdef = blueprint(candidate.config, rules)
    nats, hits = [], []
    for batch in batches:
        scored = _scored(
            graphdef, candidate.params, candidate.bias, dict(batch), candidate.mtp_input
        )
        nats_BT, hit_BT, seen_BT = map(np.asarray, scored)
        nats.append(nats_BT[batch["weights_BT"] > 0])
        hits.append(hit_BT[seen_BT])
    nats_U = np.concatenate(nats).astype(np.float64)
    return Scores(np.where(np.isnan(nats_U), np.inf, nats_U), np.concatenate(hits))


@functools.partial(jax.jit, static_argnames=("graphdef", "mtp_input"))
def _scored(graphdef, params, bias, batch, mtp_input):
    """(nats [B, T], whether MTP's second token is the main model's, whether there are both)."""
    final_norm_D = params["final_norm_D"]
    before = mtp_input == "before the final norm"
    if before:  # the same hidden state, its scale taken out and put back for the head
        params = params | {"final_norm_D": jnp.ones_like(final_norm_D)}
    model = merge(graphdef, params, bias)
    segments_BT, positions_BT = batch["segments_BT"], batch["positions_BT"]
    output = model(batch["tokens_BT"], positions_BT=positions_BT, segments_BT=segments_BT)
    hidden_BTD = given_BTD = output.hidden_BTD
    if before:
        hidden_BTD = (hidden_BTD * final_norm_D).astype(hidden_BTD.dtype)
    nats_BT, best_BT = _head(model, hidden_BTD, batch["targets_BT"])
    if mtp_input is None or not len(model.mtp_modules):
        return nats_BT, jnp.zeros_like(best_BT, bool), jnp.zeros_like(best_BT, bool)
    ahead_BT = depth_segments(segments_BT, 0)
    draft = _draft_without_hnorm if mtp_input == "without hnorm" else _draft
    drafted_BTD = draft(model, given_BTD, batch["targets_BT"], positions_BT, ahead_BT)
    _, draft_BT = _head(model, drafted_BTD, batch["targets_BT"])
    hit_BT = draft_BT == jnp.roll(best_BT, -1, axis=1)
    return nats_BT, hit_BT, ahead_BT != 0


def _draft(model: Transformer, hidden_BTD, targets_BT, positions_BT, segments_BT) -> Array:
    """MTP's first depth as it is defined."""
    return model.mtp(0, hidden_BTD, targets_BT, positions_BT=positions_BT, segments_BT=segments_BT)[
        0
    ]


def _draft_without_hnorm(
    model: Transformer, hidden_BTD, targets_BT, positions_BT, segments_BT
) -> Array:
    """The same, but for one norm."""
    module, eps = model.mtp_modules[0], model.config.norm_eps
    embedding_BTD = rms_norm(model.embed(targets_BT), module.embedding_norm_D[...], eps)
    x_BTD = model.precision.linear(
        jnp.concatenate([embedding_BTD, hidden_BTD], axis=-1), module.w_proj_2DD[...], "btk,kd->btd"
    )
    block, bias = module.block, model.router_bias.get("mtp")
    x_BTD, _, _ = block(
        x_BTD,
        where=model.row(positions_BT, segments_BT),
        bias_E=None if bias is None else bias[...][0],
    )
    return rms_norm(x_BTD, module.final_norm_D[...], eps)


def _head(model: Transformer, hidden_BTD: Array, targets_BT: Array) -> tuple[Array, Array]:
    """(nats of the targets, best tokens), `CHUNK` positions at a time."""
    b, t, d = hidden_BTD.shape
    pad = -(b * t) % CHUNK
    hidden_CUD = jnp.pad(hidden_BTD.reshape(-1, d), ((0, pad), (0, 0))).reshape(-1, CHUNK, d)
    targets_CU = jnp.pad(targets_BT.reshape(-1), (0, pad)).reshape(-1, CHUNK)

    def chunk(x):
        hidden_UD, targets_U = x
        log_UV = jax.nn.log_softmax(model.logits(hidden_UD[None])[0])
        nats_U = -jnp.take_along_axis(log_UV, targets_U[:, None], axis=-1)[:, 0]
        return nats_U, log_UV.argmax(axis=-1)

    nats_CU, best_CU = jax.lax.map(chunk, (hidden_CUD, targets_CU))
    return tuple(x.reshape(-1)[: b * t].reshape(b, t) for x in (nats_CU, best_CU))


def unigram_perplexity(ids: Sequence[int], vocab_size: int) -> float:
    """Of a guess that looks at no context, but counts the tokens as it reads (Witten-Bell)."""
    counts: collections.Counter[int] = collections.Counter()
    nats = 0.0
    for seen, token in enumerate(ids):
        kinds = max(len(counts), 1)
        nats -= math.log((counts[token] + kinds / vocab_size) / (seen + kinds))
        counts[token] += 1
    return math.exp(nats / len(ids))


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What a model says after a prompt.

    Attributes:
        prompt: the text.
        expected: what a general model says.
        best: (text of a token, probability), best first.
        found: whether the best token begins what is expected.
    """

    prompt: str
    expected: str
    best: tuple[tuple[str, float], ...]
    found: bool


def continuations(
    candidate: Candidate,
    tokenizer: Tokenizer,
    prefix: Sequence[int],
    rules: AxisRules,
    prompts: Sequence[tuple[str, str]] = PROMPTS,
) -> list[Continuation]:
    """The best tokens after prompts.

    Args:
        candidate: the model.
        tokenizer: its vocabulary.
        prefix: what begins each prompt.
        rules: where each logical axis goes.
        prompts: (prompt, what is expected).
    """
    if not prompts:
        return []
    rows = [[*prefix, *tokenizer.encode(prompt)] for prompt, _ in prompts]
    tokens_BT = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens_BT, rows, strict=True):
        row[: len(ids)] = ids
    ends_B = np.array([len(ids) - 1 for ids in rows], np.int32)
    graphdef = blueprint(candidate.config, rules)
    share_BK, best_BK = _best(graphdef, candidate.params, candidate.bias, tokens_BT, ends_B)
    found = []
    for (prompt, expected), shares, tokens in zip(
        prompts, np.asarray(share_BK), np.asarray(best_BK), strict=True
    ):
        # Rows of the vocabulary that no token uses have no text.
        texts = [
            tokenizer.decode([t]) if t < tokenizer.vocab_size else "" for t in map(int, tokens)
        ]
        begins = texts[0].strip() != "" and expected.startswith(texts[0])
        best = tuple(zip(texts, map(float, shares), strict=True))
        found.append(Continuation(prompt, expected, best, begins))
    return found


@functools.partial(jax.jit, static_argnames="graphdef")
def _best(graphdef, params, bias, tokens_BT, ends_B):
    model = merge(graphdef, params, bias)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    segments_BT = (positions_BT <= ends_B[:, None]).astype(jnp.int32)
    output = model(tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT)
    last_B1D = jnp.take_along_axis(output.hidden_BTD, ends_B[:, None, None], axis=1)
    return jax.lax.top_k(jax.nn.softmax(model.logits(last_B1D)[:, 0]), TOP)


# ---- wrong guesses ------------------------------------------------------------------------------

_MILD = "a right model may lose little by it"
Change = Callable[[Candidate], Candidate]


@dataclasses.dataclass(frozen=True)
class WrongGuess:
    """A mistake of importers, and the model as it would be.

    Attributes:
        name: for flags and reports.
        says: the mistake.
        measure: what should collapse.
        variants: what was guessed -> the model under that guess; the best of them counts.
        why_not: why it cannot matter for this model; then there are no variants.
        decides: False where a right model may be no better, by nature: then the verdict asks only
            that the guess is not clearly better.
        note: why it does not decide.
    """

    name: str
    says: str
    measure: Measure = "perplexity"
    variants: Mapping[str, Change] = dataclasses.field(default_factory=dict)
    why_not: str = ""
    decides: bool = True
    note: str = ""


def wrong_guesses(candidate: Candidate) -> list[WrongGuess]:
    """All of them, those that cannot matter for this model with the reason.

    `rope_pairing` and `scale_grid` come with their inverses, the others are their own, so that a
    model that was imported wrong is right under one of the variants. Costs beside the model, with
    V3's figures: `rope_pairing` copies the projections that make rotary queries and keys (wide, if
    they are FP8: 5 GB), `eh_proj_order` MTP's projection (0.2 GB), `gate_up` at most `SWAP_BYTES`,
    those of scales the scales (0.2 GB); the others copy nothing.
    """
    return [_MAKERS[name](candidate) for name in NAMES]


def _blocks(
    model: ModelConfig, params: dict[str, Any]
) -> Iterator[tuple[tuple[str | int, ...], BlockConfig, dict[str, Any]]]:
    """(path, configuration, leaves) of every block, MTP's last."""
    for stack in model.stacks:
        for i, block in enumerate(stack.blocks):
            yield ("stacks", stack.name, i), block, params["stacks"][stack.name][i]
    if model.mtp is not None:
        for i in range(model.mtp.depth):
            path = ("mtp_modules", i, "block")
            yield path, model.mtp.block, params["mtp_modules"][i]["block"]


def _put(tree: Mapping, path: Sequence[str | int], leaf: Any) -> dict:
    """The same tree with another leaf; everything else is shared."""
    key, *rest = path
    return {**tree, key: _put(tree[key], rest, leaf) if rest else leaf}


def _with_blocks(config: Config, change: Callable[[BlockConfig], BlockConfig]) -> Config:
    model = config.model
    stacks = tuple(
        dataclasses.replace(stack, blocks=tuple(map(change, stack.blocks)))
        for stack in model.stacks
    )
    mtp = model.mtp and dataclasses.replace(model.mtp, block=change(model.mtp.block))
    return dataclasses.replace(config, model=dataclasses.replace(model, stacks=stacks, mtp=mtp))


def _rope_pairing(candidate: Candidate) -> WrongGuess:
    """Pairs (2i, 2i + 1) taken for pairs (i, i + R / 2), or the other way round."""

    def changed(candidate: Candidate, into_halves: bool) -> Candidate:
        dtype = candidate.config.precision.compute_dtype
        params = candidate.params
        for path, block, leaves in _blocks(candidate.config.model, candidate.params):
            attention = block.attention
            starts = {"w_q_DNA": 0, "w_k_DIA": 0, "b_q_NA": 0, "b_k_IA": 0}
            if isinstance(attention, MlaConfig):
                nope, latent = attention.nope_dim, attention.kv_latent_dim
                starts = {"w_q_DNA": nope, "w_uq_QNA": nope, "w_dkvr_DZ": latent}
            for name, start in starts.items():
                if name in leaves["attention"]:
                    leaf = _reordered(leaves["attention"][name], start, into_halves, dtype)
                    params = _put(params, (*path, "attention", name), leaf)
        return dataclasses.replace(candidate, params=params)

    return WrongGuess(
        "rope_pairing",
        "rotary pairs in the other order",
        variants={
            "halves, not brought together": functools.partial(changed, into_halves=False),
            "pairs, but brought together": functools.partial(changed, into_halves=True),
        },
    )


@functools.partial(jax.jit, static_argnames=("start", "into_halves", "dtype"))
def _reordered(w, start: int, into_halves: bool, dtype: str):
    """Rotary numbers (0, R / 2, 1, ...) in the places (0, 1, 2, ...), or the inverse."""
    if isinstance(w, Quantized):
        w = w.dequantize(dtype)
    kept, turned = w[..., :start], w[..., start:]
    half = turned.shape[-1] // 2
    sizes = (half, 2) if into_halves else (2, half)
    turned = turned.reshape(*turned.shape[:-1], *sizes).swapaxes(-1, -2).reshape(turned.shape)
    return jnp.concatenate([kept, turned], axis=-1)


def _mscale(candidate: Candidate) -> WrongGuess:
    """YaRN's mscale squared left out of the softmax scale; put in, where it is not there."""
    says = "YaRN's mscale^2 not in the softmax scale"

    def other(block: BlockConfig) -> BlockConfig:
        yarn = block.attention.rope.yarn
        if yarn is None:
            return block
        # What cos and sin are scaled by, (1 + a mscale) / (1 + a all_dim), stays.
        a = 0.1 * math.log(yarn.factor) if yarn.factor > 1 else 0.0
        if a == 0.0:
            return block
        all_dim = 0.0 if yarn.mscale_all_dim else 1.0
        ratio = (1 + a * yarn.mscale) / (1 + a * yarn.mscale_all_dim)
        mscale = (ratio * (1 + a * all_dim) - 1) / a
        yarn = dataclasses.replace(yarn, mscale=mscale, mscale_all_dim=all_dim)
        rope = dataclasses.replace(block.attention.rope, yarn=yarn)
        return dataclasses.replace(block, attention=dataclasses.replace(block.attention, rope=rope))

    config = candidate.config
    changed = _with_blocks(config, other)
    if changed == config:
        return WrongGuess("mscale", says, why_not="the model has no YaRN")
    present = any(
        block.attention.rope.yarn is not None and block.attention.rope.yarn.mscale_all_dim
        for _, block, _ in _blocks(config.model, candidate.params)
    )
    label = "left out" if present else "put in"
    return WrongGuess(
        "mscale",
        says,
        variants={label: lambda c: dataclasses.replace(c, config=changed, mtp_input=None)},
    )


def _rope_theta(candidate: Candidate) -> WrongGuess:
    """The base of the rotary frequencies ten times larger or smaller."""

    def scaled(factor: float) -> Config:
        def other(block: BlockConfig) -> BlockConfig:
            rope = block.attention.rope
            rope = dataclasses.replace(rope, theta=rope.theta * factor)
            attention = dataclasses.replace(block.attention, rope=rope)
            return dataclasses.replace(block, attention=attention)

        return _with_blocks(candidate.config, other)

    def change(config: Config) -> Change:
        return lambda c: dataclasses.replace(c, config=config, mtp_input=None)

    return WrongGuess(
        "rope_theta",
        "another base of the rotary frequencies",
        variants={"times 10": change(scaled(10.0)), "a tenth": change(scaled(0.1))},
        decides=False,
        note=_MILD,
    )


def _gate_up(candidate: Candidate) -> WrongGuess:
    """The halves of the fused gate and up projections exchanged, within `SWAP_BYTES`."""
    says = "gate and up projections exchanged"
    found = []
    for path, block, leaves in _blocks(candidate.config.model, candidate.params):
        if not isinstance(block.ffn, MoeConfig):
            found.append(((*path, "ffn", "w_in_D2F"), leaves["ffn"]["w_in_D2F"]))
            continue
        found.append(((*path, "ffn", "w_in_ED2F"), leaves["ffn"]["w_in_ED2F"]))
        if block.ffn.num_shared_experts:
            shared = leaves["ffn"]["shared"]["w_in_D2F"]
            found.append(((*path, "ffn", "shared", "w_in_D2F"), shared))
    chosen, total = [], 0
    for path, leaf in sorted(found, key=lambda one: _num_bytes(one[1])):
        total += _num_bytes(leaf)
        if total <= SWAP_BYTES:
            chosen.append((path, leaf))
    if not chosen:
        return WrongGuess("gate_up", says, why_not=f"every leaf is over {SWAP_BYTES:,} bytes")

    def changed(candidate: Candidate) -> Candidate:
        params = candidate.params
        for path, leaf in chosen:
            params = _put(params, path, jax.tree.map(_halves_exchanged, leaf))
        return dataclasses.replace(candidate, params=params)

    label = (
        "everywhere" if len(chosen) == len(found) else f"in {len(chosen)} of {len(found)} leaves"
    )
    return WrongGuess("gate_up", says, variants={label: changed})


def _num_bytes(leaf: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(leaf))


@jax.jit
def _halves_exchanged(x: Array) -> Array:
    return jnp.concatenate(jnp.split(x, 2, axis=-1)[::-1], axis=-1)


def _with_ffn(candidate: Candidate, change: Callable[[MoeConfig], MoeConfig]) -> Candidate:
    def changed(block: BlockConfig) -> BlockConfig:
        if not isinstance(block.ffn, MoeConfig):
            return block
        return dataclasses.replace(block, ffn=change(block.ffn))

    config = _with_blocks(candidate.config, changed)
    return dataclasses.replace(candidate, config=config, mtp_input=None)


def _experts(candidate: Candidate) -> list[MoeConfig]:
    blocks = _blocks(candidate.config.model, candidate.params)
    return [block.ffn for _, block, _ in blocks if isinstance(block.ffn, MoeConfig)]


def _gate_scale(candidate: Candidate) -> WrongGuess:
    """What the gates are multiplied with is another of the published values.

    The norms that follow forgive much of it: `tiny` has 2.5, and loses 3% with 1.
    """
    says = "gates multiplied with another published factor"
    own = {moe.gate_scale for moe in _experts(candidate)}
    if not own:
        return WrongGuess("gate_scale", says, why_not="the model has no experts", decides=False)
    return WrongGuess(
        "gate_scale",
        says,
        variants={
            f"{scale:g}": functools.partial(
                _with_ffn, change=functools.partial(dataclasses.replace, gate_scale=scale)
            )
            for scale in (GATE_SCALES if own == {1.0} else (1.0,))
        },
        decides=False,
        note=_MILD,
    )


def _group_limit(candidate: Candidate) -> WrongGuess:
    """All groups of experts kept. The experts that a token loses by the limit are seldom missed."""
    says = "experts chosen from all groups"
    if not any(moe.groups_per_token < moe.num_groups for moe in _experts(candidate)):
        return WrongGuess("group_limit", says, why_not="no groups of experts", decides=False)

    def unlimited(moe: MoeConfig) -> MoeConfig:
        return dataclasses.replace(moe, groups_per_token=moe.num_groups)

    variants = {"no limit": functools.partial(_with_ffn, change=unlimited)}
    return WrongGuess("group_limit", says, variants=variants, decides=False, note=_MILD)


def _router_bias(candidate: Candidate) -> WrongGuess:
    """Experts chosen by their scores alone; a bias is there to even loads, not to score well."""
    says = "the routers' balancing bias left out"
    if not any(bool(jnp.any(bias != 0)) for bias in candidate.bias.values()):
        return WrongGuess("router_bias", says, why_not="no bias, or all zeros", decides=False)

    def changed(candidate: Candidate) -> Candidate:
        return dataclasses.replace(candidate, bias=jax.tree.map(jnp.zeros_like, candidate.bias))

    variants = {"left out": changed}
    return WrongGuess("router_bias", says, variants=variants, decides=False, note=_MILD)


def _quantized(params: Any) -> list[Quantized]:
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized))
    return [leaf for leaf in leaves if isinstance(leaf, Quantized)]


def _with_scales(candidate: Candidate, change: Callable[[Quantized], Array]) -> Candidate:
    def changed(leaf):
        if not isinstance(leaf, Quantized):
            return leaf
        return dataclasses.replace(leaf, scale=change(leaf))

    params = jax.tree.map(changed, candidate.params, is_leaf=lambda x: isinstance(x, Quantized))
    return dataclasses.replace(candidate, params=params)


_NOT_FP8 = "no weights are kept in FP8"


def _scale_inverse(candidate: Candidate) -> WrongGuess:
    """FP8 numbers divided by their scales: `weight_scale_inv` is what they are multiplied with."""
    says = "FP8 divided by its scales"
    if not _quantized(candidate.params):
        return WrongGuess("scale_inverse", says, why_not=_NOT_FP8)
    variants = {"divided": functools.partial(_with_scales, change=lambda leaf: 1.0 / leaf.scale)}
    return WrongGuess("scale_inverse", says, variants=variants)


def _scale_grid(candidate: Candidate) -> WrongGuess:
    """The grid of block scales [r, c] read as [c, r] and transposed, or the inverse."""
    says = "grids of FP8 scales transposed"
    leaves = _quantized(candidate.params)
    if not leaves:
        return WrongGuess("scale_grid", says, why_not=_NOT_FP8)
    if not any(
        min(leaf.scale.shape[-2], leaf.scale.shape[-1] // leaf.parts) > 1 for leaf in leaves
    ):
        return WrongGuess("scale_grid", says, why_not="no weight has 2 by 2 blocks")

    def transposed(leaf: Quantized, back: bool) -> Array:
        *lead, r, columns = leaf.scale.shape
        scale = leaf.scale.reshape(*lead, r, leaf.parts, columns // leaf.parts)
        scale = jnp.moveaxis(scale, -2, -3)
        if back:
            wide = scale.reshape(*scale.shape[:-2], scale.shape[-1], r).swapaxes(-1, -2)
        else:
            wide = scale.swapaxes(-1, -2).reshape(scale.shape)
        return jnp.moveaxis(wide, -3, -2).reshape(leaf.scale.shape)

    return WrongGuess(
        "scale_grid",
        says,
        variants={
            name: functools.partial(_with_scales, change=functools.partial(transposed, back=back))
            for name, back in (("transposed", False), ("transposed back", True))
        },
    )


_NO_MTP = "the model has no MTP"


def _eh_proj_order(candidate: Candidate) -> WrongGuess:
    """`eh_proj` takes [embedding ; hidden]."""
    says = "eh_proj's halves for the embedding and the hidden state"
    if candidate.config.model.mtp is None:
        return WrongGuess("eh_proj_order", says, "acceptance", why_not=_NO_MTP)

    def changed(candidate: Candidate) -> Candidate:
        params = candidate.params
        for i, module in params["mtp_modules"].items():
            top_DD, bottom_DD = jnp.split(module["w_proj_2DD"], 2)
            leaf = jnp.concatenate([bottom_DD, top_DD])
            params = _put(params, ("mtp_modules", i, "w_proj_2DD"), leaf)
        return dataclasses.replace(candidate, params=params)

    return WrongGuess("eh_proj_order", says, "acceptance", {"exchanged": changed})


def _mtp_norm(candidate: Candidate) -> WrongGuess:
    """MTP given the hidden state from before the final norm.

    MTP norms it again (`hnorm`), and RMSNorm forgets its input's size: the guess differs in nothing
    but the final norm's weights, and is the same function where these are all alike. So it decides
    only from `FINAL_NORM_SPREAD` on.
    """
    says = "MTP given the hidden state before the final norm"
    if candidate.config.model.mtp is None:
        return WrongGuess("mtp_norm", says, "acceptance", why_not=_NO_MTP)

    def changed(candidate: Candidate) -> Candidate:
        return dataclasses.replace(candidate, mtp_input="before the final norm")

    final_norm_D = np.asarray(candidate.params["final_norm_D"], np.float64)
    spread = float(final_norm_D.std() / max(abs(final_norm_D.mean()), 1e-30))
    return WrongGuess(
        "mtp_norm",
        says,
        "acceptance",
        {"before": changed},
        decides=spread >= FINAL_NORM_SPREAD,
        note=f"the final norm's weights spread by {spread:.2f} of their mean",
    )


def _mtp_unnormed(candidate: Candidate) -> WrongGuess:
    """`eh_proj` given the hidden state after the final norm as it is, without `hnorm`.

    After the final norm, whose weights are g, `hnorm`'s h nearly multiplies with h / rms(g): where
    that is 1 (as at first), the guess is the same function. So it decides only from
    `HIDDEN_NORM_CHANGE` on.
    """
    says = "eh_proj given the hidden state without hnorm"
    if candidate.config.model.mtp is None:
        return WrongGuess("mtp_unnormed", says, "acceptance", why_not=_NO_MTP)
    g_D = np.asarray(candidate.params["final_norm_D"], np.float64)
    h_D = np.asarray(candidate.params["mtp_modules"][0]["hidden_norm_D"], np.float64)
    factor_D = h_D / max(np.sqrt(np.mean(g_D**2)), 1e-30)
    change = float(np.sqrt(np.mean(np.log(np.maximum(factor_D, 0.01)) ** 2)))  # a sign is much
    return WrongGuess(
        "mtp_unnormed",
        says,
        "acceptance",
        {"left out": functools.partial(dataclasses.replace, mtp_input="without hnorm")},
        decides=change >= HIDDEN_NORM_CHANGE,
        note=f"hnorm changes what it is given by {change:.2f}, as a logarithm",
    )


_MAKERS = {
    "rope_pairing": _rope_pairing,
    "mscale": _mscale,
    "rope_theta": _rope_theta,
    "gate_up": _gate_up,
    "gate_scale": _gate_scale,
    "group_limit": _group_limit,
    "router_bias": _router_bias,
    "scale_inverse": _scale_inverse,
    "scale_grid": _scale_grid,
    "eh_proj_order": _eh_proj_order,
    "mtp_norm": _mtp_norm,
    "mtp_unnormed": _mtp_unnormed,
}
NAMES = tuple(_MAKERS)


# ---- the verdict --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a wrong guess.

    Attributes:
        name: of the guess.
        says: the mistake.
        measure: what was compared.
        result: of the guess, against the model as it stands.
        decides: whether only "worse" passes; otherwise "better" alone fails.
        variant: the best of the guess's variants, whose figures follow.
        value: its perplexity or acceptance.
        ratio: how many times worse.
        standard_errors: the mean difference over the tokens in its standard errors.
        note: why it is not applicable, or does not decide.
    """

    name: str
    says: str
    measure: Measure
    result: Result
    decides: bool
    variant: str = ""
    value: float | None = None
    ratio: float | None = None
    standard_errors: float | None = None
    note: str = ""

    @property
    def passes(self) -> bool:
        """Whether the verdict can be PASS."""
        if self.decides:
            return self.result in ("worse", "not applicable")
        return self.result != "better"


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        tokens: scored.
        window: the longest row.
        perplexity: of the text, a token.
        bits_per_byte: of the text.
        unigram: the perplexity of a guess that looks at no context.
        uniform: that of a guess that knows nothing.
        acceptance: how often MTP's second token is the main model's; None without MTP.
        begun_with: the tokens that were put before the text.
        outcomes: of all wrong guesses.
        continuations: of the prompts; advice, no part of the verdict.
    """

    tokens: int
    window: int
    perplexity: float
    bits_per_byte: float
    unigram: float
    uniform: float
    acceptance: float | None
    begun_with: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    continuations: tuple[Continuation, ...]

    @property
    def speaks(self) -> bool:
        """Whether the model knows more of the text than how often tokens occur in it."""
        return self.perplexity < self.unigram

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the guesses that do not pass: first those clearly better, the best first."""
        failed = [o for o in self.outcomes if not o.passes]
        failed.sort(key=lambda o: (o.result != "better", o.ratio))
        return tuple(o.name for o in failed)

    @property
    def passed(self) -> bool:
        """The verdict."""
        return self.speaks and self.decided and not self.failed

    @property
    def decided(self) -> bool:
        """Whether any wrong guess could be told from the model."""
        return any(o.result in ("worse", "better") for o in self.outcomes)

    def verdict(self) -> str:
        """PASS or FAIL with the reasons, in one line."""
        if self.passed:
            count = sum(o.result == "worse" for o in self.outcomes)
            return f"PASS: {count} wrong guesses are clearly worse, and none is better"
        reasons = []
        if not self.speaks:
            reasons.append(
                f"the weights do not speak this text: perplexity {self.perplexity:.1f}, "
                f"{self.unigram:.1f} for a guess without context"
            )
        by_name = {o.name: o for o in self.outcomes}
        better = [by_name[n] for n in self.failed if by_name[n].result == "better"]
        even = [n for n in self.failed if by_name[n].result != "better"]
        for o in better:
            reasons.append(
                f"{o.name}: the model is better under a wrong guess ({o.says}: {o.variant}), "
                f"{o.measure} {o.value:.4g}"
            )
        if not self.decided:
            reasons.append("no wrong guess could be told from the model, so nothing was decided")
        if even:
            reasons.append(f"no worse under the wrong guess: {', '.join(even)}")
        return f"FAIL: {'; '.join(reasons)}"

    def to_json(self) -> dict[str, Any]:
        """All figures; those that are not finite as null."""
        content = dataclasses.asdict(self)
        content |= {"passed": self.passed, "verdict": self.verdict(), "failed": self.failed}
        return _finite(content)

    def text(self) -> str:
        """The report, for people."""
        begun = f", each begun with {list(self.begun_with)}" if self.begun_with else ""
        lines = [
            f"{self.tokens:,} tokens in rows of {self.window}{begun}",
            f"perplexity {self.perplexity:.4g} (without context {self.unigram:.4g}, "
            f"uniform {self.uniform:,.0f}); {self.bits_per_byte:.4f} bits a byte",
        ]
        if self.acceptance is not None:
            lines.append(f"second tokens accepted: {self.acceptance:.4f}")
        lines += ["", f"{'wrong guess':<16}{'measure':<12}{'value':>10}{'worse by':>10}  result"]
        for o in self.outcomes:
            if o.value is None or o.ratio is None:
                lines.append(f"{o.name:<16}{o.measure:<32}  {o.result}: {o.note}")
                continue
            note = f" [{o.note}]" if o.note else ""
            lines.append(
                f"{o.name:<16}{o.measure:<12}{o.value:>10.4g} {o.ratio:>9.4g}x  {o.result}"
                f" ({o.standard_errors:+.1f} s.e.): {o.says}, {o.variant}{note}"
            )
        found = sum(c.found for c in self.continuations)
        lines += ["", f"{found} of {len(self.continuations)} prompts as expected (advice)"]
        for c in self.continuations:
            best = ", ".join(f"{text!r} {share:.2f}" for text, share in c.best)
            lines.append(f"  {'+' if c.found else '-'} {c.prompt!r} -> {best}")
        return "\n".join([*lines, "", self.verdict()])


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def verify(
    config: Config,
    params: dict[str, Any],
    bias: dict[str, Any],
    tokenizer: Tokenizer,
    text: str = TEXT,
    *,
    max_tokens: int = MAX_TOKENS,
    window: int | None = None,
    only: Sequence[str] = (),
    prompts: Sequence[tuple[str, str]] = PROMPTS,
    rules: AxisRules = AxisRules(),  # noqa: B008
    on_guess: Callable[[str], None] = lambda name: None,
) -> Report:
    """Scores a text by the model as it stands, and under each wrong guess.

    The text is cut into rows of `train.seq_len`, for a published model at most 4,096 (`window`
    asks for another length). Each begins
    with what the tokenizer puts before a prompt, or with its beginning token if that does better.

    Args:
        config: what the model is.
        params: its weights; FP8 ones may be `Quantized`.
        bias: its balancing biases.
        tokenizer: its vocabulary.
        text: that the model should know how to read.
        max_tokens: how much of the text is scored.
        window: length of a row; needed where the model has learned shorter contexts than its
            configuration says, since beyond them wrong guesses may well be better.
        only: names of wrong guesses; all of them if there is none.
        prompts: (prompt, what is expected); there may be none.
        rules: where each logical axis goes.
        on_guess: told of each guess before it is tried.

    Raises:
        InputError: if the text is too short to tell, the window is not one of the model, or no
            guess is of a name in `only`.
    """
    for name in only:
        if name not in NAMES:
            raise InputError(f"unknown wrong guess '{name}'{nearest(name, NAMES)}")
    window = config.train.seq_len if window is None else window
    if not 2 <= window <= config.model.max_positions:
        most = config.model.max_positions
        raise InputError(f"window is {window}; it must lie in [2, {most}] (model.max_positions)")
    if max_tokens < LEAST_TOKENS:
        raise InputError(f"max_tokens is {max_tokens}; it must be at least {LEAST_TOKENS}")
    ids = tokenizer.encode(text)[:max_tokens]
    if len(ids) <= LEAST_TOKENS:
        raise InputError(f"the text has {len(ids)} tokens; more than {LEAST_TOKENS} are needed")
    if max(ids) >= config.model.vocab_size:
        raise InputError(
            f"the tokenizer gives token {max(ids)}, the model knows {config.model.vocab_size}"
        )
    right = Candidate(config, params, bias)
    prefixes = [tuple(tokenizer.prompt_ids(""))]
    if tokenizer.bos_id is not None and prefixes[0] != (tokenizer.bos_id,):
        prefixes.append((tokenizer.bos_id,))
    tried = []
    for prefix in prefixes:
        batches = list(windows(ids, prefix, window))
        tried.append((score(right, batches, rules), prefix, batches))
    own, prefix, batches = min(tried, key=lambda one: one[0].perplexity)
    outcomes = []
    for guess in wrong_guesses(right):
        if only and guess.name not in only:
            continue
        on_guess(guess.name)
        outcomes.append(_outcome(guess, right, own, batches, rules))
    scored = ids if prefix else ids[1:]
    num_bytes = sum(len(tokenizer.token_bytes(token)) for token in scored)
    return Report(
        tokens=len(scored),
        window=batches[0]["tokens_BT"].shape[1],
        perplexity=own.perplexity,
        bits_per_byte=float(own.nats_U.sum()) / math.log(2) / max(num_bytes, 1),
        unigram=unigram_perplexity(scored, tokenizer.vocab_size),
        uniform=float(tokenizer.vocab_size),
        acceptance=own.acceptance,
        begun_with=prefix,
        outcomes=tuple(outcomes),
        continuations=tuple(continuations(right, tokenizer, prefix, rules, prompts)),
    )


def _outcome(guess: WrongGuess, right: Candidate, own: Scores, batches, rules) -> Outcome:
    """The best variant of a wrong guess against the model as it stands."""
    outcome = Outcome(
        name=guess.name,
        says=guess.says,
        measure=guess.measure,
        result="not applicable",
        decides=guess.decides,
        note=guess.why_not or guess.note,
    )
    best = math.inf
    for variant, change in guess.variants.items():
        wrong = score(change(right), batches, rules)
        if guess.measure == "perplexity":
            value, margin = wrong.perplexity, PERPLEXITY_MARGIN
            ratio = _ratio(value, own.perplexity)
            errors = _standard_errors(wrong.nats_U, own.nats_U)
        else:
            value, margin = wrong.acceptance or 0.0, ACCEPTANCE_MARGIN
            ratio = _ratio(own.acceptance or 0.0, value)
            errors = _standard_errors(own.hit_U.astype(np.float64), wrong.hit_U)
        result: Result = "no clear difference"
        if ratio >= margin and errors >= STANDARD_ERRORS:
            result = "worse"
        elif ratio <= 1 / margin and errors <= -STANDARD_ERRORS:
            result = "better"
        if outcome.value is None or ratio < best:
            best = ratio
            outcome = dataclasses.replace(
                outcome,
                result=result,
                variant=variant,
                value=value,
                ratio=ratio,
                standard_errors=errors,
            )
    return outcome


def _ratio(a: float, b: float) -> float:
    """A / b; 1 where both are 0 or infinite."""
    if a == b:
        return 1.0
    return math.inf if b == 0 else a / b


def _standard_errors(a_U: np.ndarray, b_U: np.ndarray) -> float:
    """The mean of a - b in its standard errors; 0 where both are infinite somewhere."""
    with np.errstate(invalid="ignore"):
        difference_U = a_U - b_U
    mean = float(np.mean(difference_U))
    if math.isnan(mean):
        return 0.0
    if mean == 0 or math.isinf(mean):
        return mean
    error = float(np.std(difference_U)) / math.sqrt(difference_U.size)
    return mean / error if error > 0 else math.copysign(math.inf, mean)
