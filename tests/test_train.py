"""Schedules, optimizer, losses, the step in two programs, and runs that stop and go on."""

import collections
import dataclasses
import itertools
import json
import math
import pathlib
import shutil
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsjax.checkpoint import read_params
from dsjax.config import (
    ContextStageConfig,
    OptimizerConfig,
    PhaseConfig,
    ScheduleConfig,
    SourceConfig,
    constant,
)
from dsjax.data import DataError
from dsjax.errors import InputError, RunError
from dsjax.model.router import health
from dsjax.model.transformer import build, split
from dsjax.precision import Precision
from dsjax.presets import preset, v3_bias_speed, v3_learning_rate, v3_mtp_weight
from dsjax.train import loop, vocabulary
from dsjax.train.loss import PretrainLoss
from dsjax.train.metrics import read_metrics
from dsjax.train.optimizer import adamw, decays
from dsjax.train.schedule import value_at
from dsjax.train.state import abstract_state, create, fresh_state
from dsjax.train.step import make_train_step, update_ema
from dsjax.train.vocabulary import cross_entropy
from dsjax.workdir import read_run
from sharding.rules import AxisRules
from tests.helpers import (
    FLOAT32,
    assert_trees_near,
    distance,
    packed_batch,
)
from tests.reference import mtp as reference_mtp
from tests.reference import optimizer as reference

# ---- schedules ----------------------------------------------------------------------------------


def values(schedule, progress):
    return jax.jit(jax.vmap(lambda p: value_at(schedule, p)))(jnp.asarray(progress, jnp.float32))


# Many shares of the run, and both sides of every border (float32 tells 1e-6 apart).
BORDERS = [0.05, reference.CONSTANT_UNTIL, reference.COSINE_UNTIL, reference.MIDDLE_UNTIL]
PROGRESS = np.concatenate(
    [np.linspace(0.0, 1.0, 203), *([border - 1e-6, border + 1e-6] for border in BORDERS)]
)


def test_v3_schedules_against_the_oracle():
    rate = 2.2e-4 * values(v3_learning_rate(warmup=0.05), PROGRESS)
    wanted = [reference.v3_learning_rate(p, warmup=0.05) for p in PROGRESS]
    np.testing.assert_allclose(rate, wanted, rtol=1e-5, atol=1e-10)
    for schedule, oracle in (
        (v3_mtp_weight(), reference.v3_mtp_weight),
        (v3_bias_speed(), reference.v3_bias_speed),
    ):
        wanted = [oracle(p) for p in PROGRESS]
        np.testing.assert_allclose(values(schedule, PROGRESS), wanted, rtol=1e-6)


def test_phases_by_hand():
    phases = (
        PhaseConfig(until=0.25, value=2.0, shape="linear"),
        PhaseConfig(until=0.5, value=-1.0, shape="cosine"),
        PhaseConfig(until=1.0, value=0.5),
    )
    schedule = ScheduleConfig(start=1.0, phases=phases)
    progress = [0.0, 0.125, 0.25, 0.375, 0.4375, 0.5, 0.75, 1.0, 1.5]
    cosine = -1.0 + 3.0 * 0.5 * (1.0 + math.cos(math.pi * 0.75))
    wanted = [1.0, 1.5, 2.0, 0.5, cosine, 0.5, 0.5, 0.5, 0.5]
    np.testing.assert_allclose(values(schedule, progress), wanted, atol=1e-6)
    assert value_at(schedule, 0.3).dtype == jnp.float32
    np.testing.assert_allclose(values(constant(0.3), progress), 0.3, rtol=1e-7)
    rising = ScheduleConfig(start=0.0, phases=(PhaseConfig(until=1.0, value=4.0, shape="linear"),))
    np.testing.assert_allclose(values(rising, [0.25, 1.0, 1.1]), [1.0, 4.0, 4.0])


# ---- optimizer ----------------------------------------------------------------------------------

DECAYED = {"matrix": True, "stacked": True, "scale": False}


def optimizer_case(steps=5):
    """Parameters, and gradients of which some are clipped and some are not."""
    rng = np.random.default_rng(1)
    shapes = {"matrix": (5, 4), "stacked": (3, 4, 2), "scale": (3, 4)}
    params = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    sizes = [10.0, 0.05, 3.0, 0.1, 0.02][:steps]
    grads = [
        {name: size * rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
        for size in sizes
    ]
    return params, grads


def optimize(config, params, grads):
    """Our optimizer over several steps; progress moves with them."""
    optimizer = adamw(config, DECAYED)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads, progress):
        updates, state = optimizer.update(grads, state, params, progress=progress)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    for i, gradient in enumerate(grads):
        params, state = step(params, state, gradient, jnp.float32(i / len(grads)))
    return params, state


@pytest.mark.parametrize("clip_norm", [1.0, 1e9])
def test_adamw_against_the_oracle(clip_norm):
    falling = ScheduleConfig(start=1.0, phases=(PhaseConfig(until=1.0, value=0.1, shape="cosine"),))
    config = OptimizerConfig(learning_rate=0.1, schedule=falling, clip_norm=clip_norm)
    params, grads = optimizer_case()
    got, state = optimize(config, params, grads)
    wanted = params
    first = second = {name: np.zeros(p.shape) for name, p in params.items()}
    for i, gradient in enumerate(grads):
        share = i / len(grads)
        wanted, first, second, _ = reference.adamw_step(
            wanted,
            gradient,
            first,
            second,
            i + 1,
            learning_rate=0.1 * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * share))),
            clip_norm=clip_norm,
            decayed={name for name, decayed in DECAYED.items() if decayed},
        )
    assert_trees_near(got, wanted)
    assert_trees_near(state["mu"], first)
    assert_trees_near(state["nu"], second)
    assert int(state["count"]) == len(grads)


def test_adamw_equals_optax():
    config = OptimizerConfig(learning_rate=0.05)
    params, grads = optimizer_case()
    theirs = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            config.learning_rate,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=DECAYED,
        ),
    )
    wanted = jax.tree.map(jnp.asarray, params)
    state = theirs.init(wanted)
    for gradient in grads:
        updates, state = theirs.update(gradient, state, wanted)
        wanted = optax.apply_updates(wanted, updates)
    assert_trees_near(optimize(config, params, grads)[0], wanted)


def test_moments_in_bfloat16_stay_so_and_near():
    config = OptimizerConfig(learning_rate=0.05)
    short = dataclasses.replace(config, moment_dtype="bfloat16")
    params, grads = optimizer_case()
    wanted, _ = optimize(config, params, grads)
    got, state = optimize(short, params, grads)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {
        jnp.dtype("int32"),
        jnp.dtype("bfloat16"),
    }
    chex.assert_trees_all_equal_dtypes(got, wanted)
    moved = jax.tree.map(lambda a, b: a - b, wanted, params)
    moved_short = jax.tree.map(lambda a, b: a - b, got, params)
    assert_trees_near(moved_short, moved, 0.02)  # bfloat16 keeps 8 bits: 2**-8 a rounding
    assert distance(moved_short["matrix"], moved["matrix"]) > 0.0


@pytest.mark.parametrize("name", ["nano", "deepseek_v2_lite"])
def test_matrices_decay_and_scales_of_norms_do_not(name):
    """Those of a stack have rank 2, like a matrix."""
    model = jax.eval_shape(build(preset(name)), jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(decays(model))
    assert len(leaves) > 20
    for path, decayed in leaves:
        text = jax.tree_util.keystr(path)
        assert decayed == ("norm" not in text), text


# ---- cross entropy ------------------------------------------------------------------------------

FLOAT32_PRECISION = Precision.of(preset("nano").precision)


@pytest.mark.parametrize("chunk_logits", [1, 7 * 11, 16 * 11, 1 << 23])
def test_cross_entropy_in_chunks(rng, monkeypatch, chunk_logits):
    """Value and gradients; 53 tokens make 53, 8 (padded), 4 (padded) chunks and one."""
    monkeypatch.setattr(vocabulary, "CHUNK_LOGITS", chunk_logits)
    tokens, width, vocab = 53, 6, 11
    hidden_UD = jnp.asarray(rng.standard_normal((tokens, width)), jnp.float32)
    head_DV = jnp.asarray(3.0 * rng.standard_normal((width, vocab)), jnp.float32)
    targets_U = jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32)
    weights_U = jnp.asarray(rng.random(tokens) * (rng.random(tokens) < 0.7), jnp.float32)

    def chunked(hidden_UD, head_DV):
        value = cross_entropy(FLOAT32_PRECISION, hidden_UD, head_DV, targets_U, weights_U)
        return jnp.square(value)  # so that the cotangent is not 1

    def plain(hidden_UD, head_DV):
        log_UV = jax.nn.log_softmax(hidden_UD @ head_DV)
        chosen_U = jnp.take_along_axis(log_UV, targets_U[:, None], axis=-1)[:, 0]
        return jnp.square(jnp.sum(weights_U * chosen_U))

    wanted, wanted_grads = jax.value_and_grad(plain, (0, 1))(hidden_UD, head_DV)
    got, grads = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden_UD, head_DV)
    np.testing.assert_allclose(chunked(hidden_UD, head_DV), wanted, rtol=FLOAT32)  # forward alone
    np.testing.assert_allclose(got, wanted, rtol=FLOAT32)
    assert_trees_near(grads, wanted_grads)
    assert not np.asarray(grads[0])[np.asarray(weights_U) == 0].any()


def test_cross_entropy_never_has_all_logits(monkeypatch):
    monkeypatch.setattr(vocabulary, "CHUNK_LOGITS", 1 << 14)
    tokens, width, vocab = 1024, 8, 512
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, width), (width, vocab))]
    arrays += [jax.ShapeDtypeStruct((tokens,), d) for d in (jnp.int32, jnp.float32)]
    of = jax.grad(lambda h, w, *x: cross_entropy(FLOAT32_PRECISION, h, w, *x), (0, 1))
    analysis = jax.jit(of).lower(*arrays).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < tokens * vocab * 4 / 3


def test_cross_entropy_of_huge_logits_is_finite():
    """And a weight of 0 leaves a token out, whatever its target."""
    hidden_UD, head_DV = jnp.array([[1e4], [-1e4], [1.0]]), jnp.array([[5.0, -5.0]])
    targets_U, weights_U = jnp.array([1, 1, 0]), jnp.array([1.0, 1.0, 0.0])
    value, grads = jax.value_and_grad(
        lambda *x: cross_entropy(FLOAT32_PRECISION, *x, targets_U, weights_U), (0, 1)
    )(hidden_UD, head_DV)
    np.testing.assert_allclose(value, 1e5, rtol=1e-6)
    chex.assert_tree_all_finite(grads)


# ---- the step -----------------------------------------------------------------------------------


def base_config():
    """`nano` that learns in few steps; without its dense layer, which takes time to compile.

    The bias stands still at the end of the run, in the midst of a phase of learning rate and MTP
    weight, so that a later progress is a control that runs the same programs. Adam's first step
    divides a gradient by its own size, and so turns rounding errors of a gradient near 0 into whole
    steps; a larger eps does not.
    """
    config = preset("nano")
    speed = (PhaseConfig(until=0.98, value=5e-3), PhaseConfig(until=1.0, value=0.0))
    train = dataclasses.replace(
        config.train,
        batch_size=4,
        optimizer=dataclasses.replace(config.train.optimizer, learning_rate=1e-2, eps=1e-6),
        bias_speed=ScheduleConfig(start=5e-3, phases=speed),
    )
    model = dataclasses.replace(config.model, stacks=config.model.stacks[1:])
    return dataclasses.replace(config, model=model, train=train)


BASE = base_config()
# Progress: full learning rate; and a tenth of it, with and without bias updates.
FAST, BIASED, UNBIASED = 0.3, 0.97, 0.985
UNEVEN = [(20, 3, 41), (64,), (1, 1, 2, 30), (40,)]  # and so many padded positions


@dataclasses.dataclass(frozen=True)
class Counted:
    """A loss that counts how often it is traced."""

    inner: PretrainLoss
    traces: list = dataclasses.field(default_factory=list)

    def totals(self, batch, progress, over_processes=lambda counts: counts):
        return self.inner.totals(batch, progress, over_processes)

    def __call__(self, model, batch, totals):
        self.traces.append(batch["tokens_BT"].shape)
        return self.inner(model, batch, totals)


@dataclasses.dataclass(frozen=True)
class Nano:
    """A step of `nano` and its first state, as NumPy arrays: steps donate theirs."""

    step: object
    first: object
    loss: Counted

    def run(self, batch, *, progress=FAST, micro_batch_size=4, steps=1):
        state, metrics = jax.tree.map(jnp.array, self.first), None
        for _ in range(steps):
            state, metrics = self.step(
                state, batch, progress=progress, micro_batch_size=micro_batch_size
            )
        return jax.device_get((state, metrics))


def make_nano(config, params):
    model = jax.eval_shape(build(config), jax.random.key(0))
    graphdef, _, bias = split(model)
    bias = jax.tree.map(lambda b: np.zeros(b.shape, b.dtype), bias)
    optimizer = adamw(config.train.optimizer, decays(model))
    params = jax.tree.map(jnp.asarray, params)
    bias = jax.tree.map(jnp.asarray, bias)
    first = jax.device_get(fresh_state(config, params, bias, optimizer.init(params)))
    counted = Counted(PretrainLoss.of(config))
    step = make_train_step(
        graphdef,
        counted,
        optimizer,
        bias_speed=config.train.bias_speed,
        ema_decay=config.train.ema_decay,
    )
    return Nano(step, first, counted)


@pytest.fixture(scope="module")
def nano():
    state = create(BASE, jax.random.key(0), AxisRules())
    return make_nano(BASE, jax.device_get(state.params))


@pytest.fixture(scope="module")
def uneven():
    """Rows that differ in documents, padding and weights."""
    batch = packed_batch(np.random.default_rng(5), 512, UNEVEN)
    weights = np.random.default_rng(6).uniform(0.25, 1.0, (4, 64)).astype(np.float32)
    batch["weights_BT"] = batch["weights_BT"] * weights
    return batch


@pytest.fixture(scope="module")
def whole(nano, uneven):
    """A step on the whole batch at once."""
    return nano.run(uneven)


@pytest.mark.parametrize(
    ("micro_batch_size", "remat"),
    [(2, "full"), pytest.param(1, "none", marks=pytest.mark.nightly)],
)
def test_micro_batched_equals_whole(nano, uneven, whole, micro_batch_size, remat):
    if remat != "none":
        train = dataclasses.replace(BASE.train, remat=remat)
        nano = make_nano(dataclasses.replace(BASE, train=train), nano.first.params)
    before = len(nano.loss.traces)
    state, metrics = nano.run(uneven, micro_batch_size=micro_batch_size)
    wanted, wanted_metrics = whole
    assert_trees_near(state.params, wanted.params)
    assert_trees_near(state.opt, wanted.opt)
    chex.assert_trees_all_equal(state.bias, wanted.bias)
    for name, value in metrics.items():
        if name.startswith("load/"):  # with remat, too: nothing is counted twice
            np.testing.assert_array_equal(value, wanted_metrics[name])
        else:
            np.testing.assert_allclose(value, wanted_metrics[name], rtol=FLOAT32, err_msg=name)
    assert len(nano.loss.traces) == before + 1


@pytest.mark.nightly
def test_v2s_balances_are_summed_over_micro_batches(nano, uneven):
    """V2's router and weights: metrics, total and step are those of the whole batch."""

    def like_v2(block):
        ffn = dataclasses.replace(
            block.ffn,
            score="softmax",
            group_score="max",
            normalize_gates=False,
            balance_bias=False,
            balance_counts="selected",
        )
        return dataclasses.replace(block, ffn=ffn)

    (moe,), mtp = BASE.model.stacks, BASE.model.mtp
    moe = dataclasses.replace(moe, blocks=tuple(map(like_v2, moe.blocks)))
    mtp = dataclasses.replace(mtp, block=like_v2(mtp.block))
    weights = {
        "balance_loss_weight": 0.003,
        "device_balance_loss_weight": 0.05,
        "communication_balance_loss_weight": 0.02,
    }
    config = dataclasses.replace(
        BASE,
        model=dataclasses.replace(BASE.model, stacks=(moe,), mtp=mtp),
        train=dataclasses.replace(BASE.train, **weights),
    )
    v2 = make_nano(config, nano.first.params)
    wanted, wanted_metrics = v2.run(uneven)
    state, metrics = v2.run(uneven, micro_batch_size=2)
    assert_trees_near(state.params, wanted.params)
    names = ("loss_balance", "loss_balance_device", "loss_balance_communication")
    total = metrics["loss"] + 0.3 * metrics["loss_mtp"]
    for name, weight in zip(names, weights.values(), strict=True):
        np.testing.assert_allclose(metrics[name], wanted_metrics[name], rtol=FLOAT32, err_msg=name)
        total += weight * metrics[name]
    np.testing.assert_allclose(metrics["loss_total"], wanted_metrics["loss_total"], rtol=FLOAT32)
    np.testing.assert_allclose(metrics["loss_total"], total, rtol=FLOAT32)


def test_loads_count_every_token_once(whole, uneven):
    _, metrics = whole
    per_token = BASE.model.stacks[0].blocks[0].ffn.num_experts_per_token
    real = int((uneven["segments_BT"] != 0).sum())
    np.testing.assert_array_equal(metrics["load/moe"].sum(axis=1), per_token * real)
    # MTP has no use for the last token of a document.
    documents = sum(map(len, UNEVEN))
    np.testing.assert_array_equal(metrics["load/mtp"].sum(axis=1), per_token * (real - documents))


def test_the_bias_follows_the_load_and_not_the_optimizer(nano, whole):
    state, metrics = whole
    for stack, bias_LE in state.bias.items():
        load_LE = metrics[f"load/{stack}"]
        error_LE = load_LE.mean(axis=1, keepdims=True) - load_LE
        np.testing.assert_allclose(bias_LE, 5e-3 * np.sign(error_LE), rtol=1e-6)
        assert bias_LE.any()
        for sign, value_L in health(jnp.asarray(load_LE), jnp.asarray(bias_LE)).items():
            np.testing.assert_allclose(metrics[f"router/{stack}/{sign}"], value_L, rtol=1e-5)
    assert "router_bias" not in json.dumps(jax.tree.map(np.shape, state.opt))
    chex.assert_trees_all_equal_structs(state.opt["mu"], state.params)
    assert set(state.opt) == {"count", "mu", "nu"}
    # Without speed it stays where it is, while the parameters move.
    still, _ = nano.run(whole_batch(1), progress=UNBIASED)
    chex.assert_trees_all_equal(still.bias, nano.first.bias)
    assert distance(still.params["embed_VD"], nano.first.params["embed_VD"]) > 0.0


def whole_batch(seed):
    """Four rows of one document each, tokens as unevenly frequent as words are."""
    batch = packed_batch(np.random.default_rng(seed), 512, [(64,)] * 4)
    rank = np.arange(1, 513)
    tokens = np.random.default_rng(seed).choice(512, (4, 64), p=1 / rank / (1 / rank).sum())
    batch["tokens_BT"] = tokens.astype(np.int32)
    batch["targets_BT"][:, :-1] = tokens[:, 1:]
    return batch


def test_rows_that_do_not_divide_are_refused(nano, uneven):
    with pytest.raises(ValueError, match="4 rows do not divide into micro-batches of 3"):
        nano.run(uneven, micro_batch_size=3)


# ---- multi-token prediction ---------------------------------------------------------------------


def gradients(nano, batch, totals):
    """What `accumulate` sums over one whole batch."""
    state = nano.first
    sums = nano.step.zero(state.params, state.bias, batch, totals)
    return jax.device_get(nano.step.accumulate(state.params, state.bias, sums, batch, totals))


def test_mtp_trains_its_module_and_the_model(nano, uneven):
    totals = nano.loss.totals(uneven, FAST)
    np.testing.assert_allclose(totals.mtp_scale, 0.3)
    with_mtp = gradients(nano, uneven, totals)
    without = gradients(nano, uneven, dataclasses.replace(totals, mtp_scale=np.float32(0.0)))
    assert with_mtp["metrics"]["loss_mtp"] > 1.0
    np.testing.assert_allclose(with_mtp["metrics"]["loss_mtp"], without["metrics"]["loss_mtp"])
    for sums, scale in ((with_mtp, 0.3), (without, 0.0)):
        parts = sums["metrics"]
        total = parts["loss"] + scale * parts["loss_mtp"] + 1e-4 * parts["loss_balance"]
        np.testing.assert_allclose(parts["loss_total"], total, rtol=FLOAT32)
    modules = with_mtp["grads"]["mtp_modules"], without["grads"]["mtp_modules"]
    with_norm, without_norm = (float(optax.tree.norm(grads)) for grads in modules)
    assert without_norm < 1e-2 * with_norm  # what is left is its router's balance
    for name in ("embed_VD", "head_DV"):
        assert distance(with_mtp["grads"][name], without["grads"][name]) > 0.05


def test_mtp_ends_with_the_document(nano, uneven):
    """The tokens of the next document change no loss of the one before; loads aside."""
    first = dict(uneven, weights_BT=uneven["weights_BT"] * (uneven["segments_BT"] == 1))
    other = dict(first)
    for name in ("tokens_BT", "targets_BT"):
        elsewhere = np.roll(uneven["segments_BT"], -1 if name == "targets_BT" else 0, axis=1) != 1
        other[name] = np.where(elsewhere, (first[name] + 100) % 512, first[name])
    totals = nano.loss.totals(first, FAST)
    got, wanted = (gradients(nano, batch, totals)["metrics"] for batch in (other, first))
    for name in ("loss", "loss_mtp"):
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-6)


def test_totals_count_what_is_predicted(uneven):
    """At each depth the weights of the targets themselves; a mean, not a sum, over depths."""
    model = dataclasses.replace(BASE.model, mtp=dataclasses.replace(BASE.model.mtp, depth=3))
    pretrain_loss = PretrainLoss.of(dataclasses.replace(BASE, model=model))
    totals = pretrain_loss.totals(uneven, FAST)
    segments_BT, weights_BT = uneven["segments_BT"], uneven["weights_BT"]
    np.testing.assert_allclose(totals.weight, weights_BT.sum(), rtol=FLOAT32)
    np.testing.assert_array_equal(totals.rows, 4)
    for depth in (1, 2, 3):
        real_BT = reference_mtp.depth_segments(segments_BT, depth) != 0
        wanted = (np.pad(weights_BT, ((0, 0), (0, depth)))[:, depth:] * real_BT).sum()
        np.testing.assert_allclose(totals.mtp_weight[depth - 1], wanted, rtol=FLOAT32)
        np.testing.assert_array_equal(totals.mtp_rows[depth - 1], real_BT.any(axis=1).sum())
    nothing = {name: np.zeros_like(value) for name, value in uneven.items()}
    for value in jax.tree.leaves(pretrain_loss.totals(nothing, 0.0)):
        assert (np.asarray(value) > 0).all()  # they divide


# ---- learning -----------------------------------------------------------------------------------


def test_one_batch_is_learnt_by_heart(nano, uneven):
    weights = (uneven["weights_BT"] > 0).astype(np.float32)
    state, metrics = nano.run(dict(uneven, weights_BT=weights), steps=60)
    assert metrics["loss"] < 0.1
    assert int(state.step) == int(state.opt["count"]) == 60
    chex.assert_tree_all_finite(state.params)


def test_bias_updates_even_the_load(nano):
    """On fresh batches: far below the control, which trains alike but for the bias."""

    def violation(progress):
        state, seen = jax.tree.map(jnp.array, nano.first), []
        for seed in range(40):
            state, metrics = nano.step(
                state, whole_batch(seed), progress=progress, micro_batch_size=4
            )
            seen.append(metrics["router/moe/max_violation"])
        return np.mean(jax.device_get(seen[-10:]))

    assert violation(BIASED) < 0.5 * violation(UNBIASED)


def test_bfloat16_computes_and_float32_remembers(nano):
    train = dataclasses.replace(
        BASE.train, optimizer=dataclasses.replace(BASE.train.optimizer, moment_dtype="bfloat16")
    )
    precision = dataclasses.replace(BASE.precision, compute_dtype="bfloat16")
    config = dataclasses.replace(BASE, train=train, precision=precision)
    nano = make_nano(config, nano.first.params)
    state, metrics = nano.run(whole_batch(0), steps=8)
    chex.assert_tree_all_finite((state, metrics))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.opt["nu"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.bias)} == {"float32"}
    assert metrics["loss"] < 6.0 < math.log(512)
    assert len(nano.loss.traces) == 1


# ---- what is not finite, and what is averaged ----------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_a_step_that_is_not_finite_changes_nothing_but_its_counts(nano, uneven, poison):
    """Then a finite one goes on as if it had not been; 1e30 overflows in the gradient's norm."""
    state = jax.tree.map(jnp.array, nano.first)
    state, _ = nano.step(state, uneven, progress=BIASED, micro_batch_size=4)
    before = jax.device_get(state)
    weights = uneven["weights_BT"].copy()
    weights[1, 3] = poison
    totals = nano.loss.totals(uneven, BIASED)
    with pytest.MonkeyPatch.context() as patch:  # a huge weight alone would divide itself away
        patch.setattr(type(nano.loss), "totals", lambda *_: totals)
        broken = dict(uneven, weights_BT=weights)
        for count in (1, 2):
            state, metrics = nano.step(state, broken, progress=BIASED, micro_batch_size=4)
            finite = np.isfinite([metrics["loss_total"], metrics["grad_norm"]])
            assert not finite.all()
            assert int(metrics["skipped_steps"]) == count
            assert int(state.extra["skipped_in_a_row"]) == count
    after = jax.device_get(state)
    for name in ("params", "bias", "opt"):
        chex.assert_trees_all_equal(getattr(after, name), getattr(before, name))
    assert int(after.step) == 3
    state, metrics = nano.step(state, uneven, progress=BIASED, micro_batch_size=4)
    assert int(state.extra["skipped_in_a_row"]) == 0
    assert int(metrics["skipped_steps"]) == 2
    unbroken = jax.tree.map(jnp.array, before)
    unbroken, _ = nano.step(unbroken, uneven, progress=BIASED, micro_batch_size=4)
    chex.assert_trees_all_equal(state.params, unbroken.params)


def test_the_average_of_the_weights_follows_them(rng):
    """Against the definition; early on over a tenth of the steps, later by the decay."""
    tree = {"a": rng.standard_normal((3, 2)).astype(np.float32), "b": np.float32(1.0)}
    ema = wanted = tree
    for step in range(1, 40):
        params = jax.tree.map(lambda x, step=step: x + np.float32(step), tree)
        ema = update_ema(ema, params, jnp.int32(step), 0.7)
        kept = min(0.7, (1 + step) / (10 + step))
        wanted = jax.tree.map(lambda e, p, k=kept: k * e + (1 - k) * p, wanted, params)
        assert_trees_near(ema, wanted)
    # A constant lag behind a steady drift: decay / (1 - decay) steps of it.
    np.testing.assert_allclose(params["a"] - ema["a"], 0.7 / 0.3, rtol=1e-3)


def test_a_run_keeps_an_average_of_its_own(nano, uneven):
    """In float32, apart from the weights it began with, and not moved by a skipped step."""
    config = dataclasses.replace(BASE, train=dataclasses.replace(BASE.train, ema_decay=0.9))
    averaged = make_nano(config, nano.first.params)
    state, _ = averaged.run(uneven, steps=3)
    plain, _ = nano.run(uneven, steps=3)
    chex.assert_trees_all_equal(state.params, plain.params)
    chex.assert_trees_all_equal_structs(state.extra["ema"], state.params)
    moved = distance(state.extra["ema"]["head_DV"], state.params["head_DV"])
    assert 0 < moved < distance(nano.first.params["head_DV"], state.params["head_DV"])
    batch = dict(uneven, weights_BT=uneven["weights_BT"] * np.nan)
    again = jax.tree.map(jnp.array, state)
    again, _ = averaged.step(again, batch, progress=FAST, micro_batch_size=4)
    chex.assert_trees_all_equal(jax.device_get(again.extra["ema"]), state.extra["ema"])
    assert int(again.extra["skipped"]) == 1


# ---- runs ---------------------------------------------------------------------------------------

STEPS = 20


class Traces(collections.Counter):
    """Counts the functions that jax traces, by name, while it listens."""

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event, seconds, **details):
        if event == "/jax/core/compile/jaxpr_trace_duration":
            self[details.get("fun_name")] += 1


def run_config():
    """Twenty steps of two micro-batches on a little of the standard library, evaluated often."""
    data = dataclasses.replace(
        BASE.data,
        sources=(SourceConfig(path="builtin:python"),),
        max_bytes_per_source=60_000,
        held_out_fraction=0.2,
    )
    train = dataclasses.replace(
        BASE.train,
        total_tokens=STEPS * BASE.train.tokens_per_step,
        micro_batch_size=2,
        remat="full",
        eval_every_steps=4,
        save_every_steps=5,
        max_skipped_steps=3,
    )
    return dataclasses.replace(BASE, data=data, train=train)


def drawing(change):
    """`loop._draw` whose batches go through `change(call, batch)`; calls count from 1."""
    draw, calls = loop._draw, itertools.count(1)

    def drawn(corpus, count):
        return change(next(calls), draw(corpus, count))

    return drawn


def not_finite(numbers):
    """Makes the weights of these batches NaN."""

    def change(call, batch):
        if call in numbers:
            batch["weights_BT"] = batch["weights_BT"] * np.nan
        return batch

    return change


def lost(number):
    """The text is gone from this batch on."""

    def change(call, batch):
        if call >= number:
            raise DataError("tokens/3.bin: cut off at byte 77")
        return batch

    return change


def make_runs(folder):
    """Runs of one configuration that share the programs which the first one traces.

    One unbroken; one stopped at step 7, broken at 14 and resumed; one in which two steps are not
    finite; and one in which every step from the 8th on is not, resumed after it has given up.
    """
    config, told, kept = run_config(), {}, {}
    counted = Counted(PretrainLoss.of(config))
    make = loop.make_train_step
    names = ("unbroken", "broken", "skipping", "hopeless")
    unbroken, broken, skipping, hopeless = (str(folder / name) for name in names)

    def run(workdir, change=None, **settings):
        with pytest.MonkeyPatch.context() as patch:
            if change is not None:
                patch.setattr(loop, "_draw", drawing(change))
            return dataclasses.asdict(loop.pretrain(config, workdir, seed=3, **settings))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.PretrainLoss, "of", lambda config: counted)
        patch.setattr(
            loop, "make_train_step", lambda *x, **y: kept.setdefault("step", make(*x, **y))
        )
        with Traces() as traces:
            told["unbroken"] = run(unbroken)
        told["traces"], told["loss_traces"] = traces, list(counted.traces)
        run(broken, stop_at_step=7)
        with pytest.raises(RunError) as caught:
            run(broken, lost(7))
        told["error"], told["rows"] = str(caught.value), read_metrics(broken)
        told["left"] = sorted(p.name for p in pathlib.Path(broken, "checkpoints").iterdir())
        told["broken"] = run(broken)
        told["skipping"] = run(skipping, not_finite({6, 7}))
        with pytest.raises(RunError) as caught:
            run(hopeless, not_finite(range(8, 99)))
        told["hopeless_error"], told["hopeless_rows"] = str(caught.value), read_metrics(hopeless)
        told["hopeless"] = run(hopeless)
        told["all_loss_traces"] = list(counted.traces)
    return told | {"folders": {name: str(folder / name) for name in names}}


@pytest.fixture(scope="module")
def runs(once):
    return once("runs that stop and go on", make_runs)


def test_a_run_traces_each_program_once(runs):
    """In twenty steps of two micro-batches, with evaluations between."""
    assert runs["loss_traces"] == [[2, 64]]
    assert runs["traces"]["accumulate"] == 1
    assert runs["traces"]["apply"] == 1
    assert runs["traces"]["nats"] == 1
    assert runs["unbroken"]["step"] == STEPS
    assert runs["all_loss_traces"] == runs["loss_traces"]  # nor again with what was restored


TIMES = {
    *("data_wait_s", "goodput", "memory_bytes", "productive_s", "save_s", "share_of_peak"),
    *("tokens_per_s", "wall_s"),
}


def numbers_of(rows):
    """Rows without what depends on the machine."""
    return [{name: v for name, v in row.items() if name not in TIMES} for row in rows]


def test_text_that_is_lost_ends_the_run_and_what_was_saved_stays(runs):
    assert runs["error"] == "tokens/3.bin: cut off at byte 77"
    assert runs["rows"][-1]["step"] == 13
    assert runs["left"] == ["10", "7"]


def test_a_resumed_run_equals_an_unbroken_one(runs):
    """Every number of every row, evaluations too, and the parameters, bit for bit."""
    folders = [runs["folders"][name] for name in ("unbroken", "broken")]
    wanted, rows = (numbers_of(read_metrics(folder)) for folder in folders)
    # Where it was stopped on purpose it was evaluated once more.
    extra = [row for row in rows if row["step"] == 7 and "loss" not in row]
    assert len(extra) == 1
    rows = [row for row in rows if row is not extra[0]]
    # The end of a process is logged in full.
    rows[7] = {name: v for name, v in rows[7].items() if not name.startswith(("load/", "bias/"))}
    assert rows == wanted
    assert [row["step"] for row in wanted] == [0, *range(1, STEPS + 1), STEPS]
    evaluated = [row["step"] for row in wanted if "eval_loss" in row]
    assert evaluated == [0, 4, 8, 12, 16, STEPS]
    for name in ("before", "after"):
        assert runs["broken"][name] == runs["unbroken"][name]
    assert runs["unbroken"]["after"]["eval_loss"] < runs["unbroken"]["before"]["eval_loss"]

    like = loop._as_dict(abstract_state(run_config(), AxisRules()))
    states = [read_params(folder, like) for folder in folders]
    assert [step for _, step in states] == [STEPS, STEPS]
    chex.assert_trees_all_equal(states[0][0], states[1][0])
    kept = pathlib.Path(folders[1], "checkpoints").iterdir()
    assert sorted(path.name for path in kept) == ["15", "20"]


def test_wall_time_of_all_processes_is_counted_and_lost_steps_are_not_productive(runs):
    for name in ("unbroken", "broken", "hopeless"):
        rows = read_metrics(runs["folders"][name])
        walls = [row["wall_s"] for row in rows]
        assert walls == sorted(walls)
        assert 0.0 < rows[-1]["goodput"] < 1.0
        np.testing.assert_allclose(
            rows[-1]["goodput"], rows[-1]["productive_s"] / rows[-1]["wall_s"]
        )
    # The broken run's steps 11 to 13 were taken twice.
    before = runs["rows"][-1]["wall_s"]
    resumed = read_metrics(runs["folders"]["broken"])
    assert next(row["wall_s"] for row in resumed if row["step"] == 11) > before


def test_steps_that_are_not_finite_are_skipped_and_counted(runs):
    rows = [row for row in read_metrics(runs["folders"]["skipping"]) if "loss_total" in row]
    assert [row["skipped_steps"] for row in rows] == [0] * 5 + [1] + [2] * 14
    assert [row["step"] for row in rows if row["loss_total"] is None] == [6, 7]
    assert runs["skipping"]["step"] == STEPS
    wanted = [row for row in read_metrics(runs["folders"]["unbroken"]) if "loss_total" in row]
    assert [row["loss"] for row in rows[:5]] == [row["loss"] for row in wanted[:5]]
    norms = [row["param_norm"] for row in rows]
    assert norms[4] != norms[3]
    assert np.isfinite(norms[7:]).all()
    assert runs["skipping"]["after"]["eval_loss"] < runs["skipping"]["before"]["eval_loss"]


def test_too_many_of_them_in_a_row_end_the_run(runs):
    """The newest checkpoint stays, and the same command goes on from it."""
    assert runs["hopeless_error"].startswith("4 steps in a row are not finite, the last one 11 (")
    assert runs["hopeless_error"].endswith("train.max_skipped_steps is 3")
    assert runs["hopeless_rows"][-1]["skipped_steps"] == 4
    assert runs["hopeless"]["step"] == STEPS
    assert math.isfinite(runs["hopeless"]["after"]["eval_loss"])


# ---- runs of two stages, stopped at their borders -----------------------------------------------


def staged_config(text):
    """Four steps of 64 tokens a row and three of 128, on a folder of text."""
    data = dataclasses.replace(
        BASE.data, sources=(SourceConfig(path=f"{text}/*.txt"),), held_out_fraction=0.2
    )
    stage = ContextStageConfig(seq_len=128, batch_size=2, steps=3, learning_rate=1e-3)
    train = dataclasses.replace(
        BASE.train,
        total_tokens=4 * BASE.train.tokens_per_step,
        context_stages=(stage,),
        eval_every_steps=50,
        save_every_steps=50,
    )
    return dataclasses.replace(BASE, data=data, train=train)


def asking_to_stop(number, by):
    """A signal comes while this batch is drawn."""

    def change(call, batch):
        if call == number:
            signal.raise_signal(by)
        return batch

    return change


def make_staged_runs(folder):
    """Unbroken; stopped in the last step of the first stage, and of the last; the same resumed."""
    text, told = folder / "text", {}
    text.mkdir()
    words = np.random.default_rng(0)
    for i in range(30):
        (text / f"{i:02}.txt").write_text(" ".join(words.choice(list("abcdefgh"), 400)))
    config = staged_config(text)

    def run(name, change=None, **settings):
        with pytest.MonkeyPatch.context() as patch:
            if change is not None:
                patch.setattr(loop, "_draw", drawing(change))
            result = loop.pretrain(config, str(folder / name), seed=2**32 - 1, **settings)
        return dataclasses.asdict(result)

    told["unbroken"] = run("unbroken")
    told["stopped at the border"] = run("stopped", asking_to_stop(4, signal.SIGTERM))
    shutil.copytree(folder / "stopped", folder / "changed")
    told["stopped at the end"] = run("stopped", asking_to_stop(3, signal.SIGINT))
    told["finished"] = run("stopped")
    with open(text / "07.txt", "a") as file:
        file.write("a line more")
    with pytest.raises(InputError) as caught:
        run("changed")
    told["changed"] = str(caught.value)
    return told | {"folder": str(folder)}


@pytest.fixture(scope="module")
def staged_runs(once):
    return once("runs of two stages", make_staged_runs)


@pytest.mark.nightly
def test_a_signal_in_the_last_step_of_a_stage_stops_the_run(staged_runs):
    """It is not swallowed, nor is the next stage begun; and the last one is evaluated later."""
    for name, step, by in (
        ("stopped at the border", 4, "SIGTERM"),
        ("stopped at the end", 7, "SIGINT"),
    ):
        assert staged_runs[name]["stopped_by"] == by
        assert staged_runs[name]["step"] == step
        assert staged_runs[name]["after"] is None
    assert staged_runs["unbroken"]["stopped_by"] is None
    assert staged_runs["finished"]["after"] == staged_runs["unbroken"]["after"]


@pytest.mark.nightly
def test_a_run_stopped_at_its_borders_equals_an_unbroken_one(staged_runs):
    """The evaluation of a stage's end, which the signal kept from being made, too."""
    folder = pathlib.Path(staged_runs["folder"])
    wanted, rows = (numbers_of(read_metrics(folder / name)) for name in ("unbroken", "stopped"))
    assert rows == wanted
    assert [row["step"] for row in wanted if "eval_loss" in row] == [0, 4, 7]
    assert [row["seq_len"] for row in wanted if "seq_len" in row] == [64] * 4 + [128] * 3
    like = loop._as_dict(abstract_state(read_run(folder / "unbroken").config, AxisRules()))
    states = [read_params(folder / name, like)[0] for name in ("unbroken", "stopped")]
    chex.assert_trees_all_equal(*states)


@pytest.mark.nightly
def test_changed_text_is_refused_at_a_stage_border_too(staged_runs):
    text = pathlib.Path(staged_runs["folder"], "text")
    assert staged_runs["changed"] == (
        f"cannot resume the data: the text of '{text}/*.txt' is not what the run was trained on"
    )


@pytest.mark.nightly
def test_a_run_begins_with_the_weights_of_another(staged_runs, tmp_path):
    """It keeps the step that it began with; another model is refused with nothing written."""
    other = pathlib.Path(staged_runs["folder"], "unbroken")
    config = dataclasses.replace(
        staged_config(other.parent / "text"),
        train=dataclasses.replace(BASE.train, total_tokens=BASE.train.tokens_per_step),
    )
    result = loop.pretrain(config, tmp_path / "new", init=other)
    assert result.before["eval_loss"] < staged_runs["unbroken"]["before"]["eval_loss"] - 0.1
    assert read_run(tmp_path / "new").init == f"{other.resolve()}@7"
    again = loop.pretrain(config, tmp_path / "new", init=f"{other}/../unbroken")
    assert again.after == result.after
    with pytest.raises(InputError, match=r"holds another run; init: '.*@7' there, None here"):
        loop.pretrain(config, tmp_path / "new")

    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, embed_dim=48))
    with pytest.raises(InputError, match=r"has shape .*, expected"):
        loop.pretrain(wider, tmp_path / "wider", init=other)
    with pytest.raises(InputError, match="holds no checkpoint"):
        loop.pretrain(config, tmp_path / "nothing", init=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_rows_tell_the_schedules_and_the_health(runs):
    train = run_config().train
    rows = [row for row in read_metrics(runs["folders"]["unbroken"]) if "loss" in row]
    assert len(rows) == STEPS
    for row in rows:
        progress = (row["step"] - 1) / STEPS
        rate = 1e-2 * float(value_at(train.optimizer.schedule, progress))
        np.testing.assert_allclose(row["learning_rate"], rate, rtol=1e-6)
        np.testing.assert_allclose(row["bias_speed"], 5e-3)
        assert row["tokens"] == row["step"] * train.tokens_per_step
        assert np.shape(row["router/moe/max_violation"]) == (2,)
        assert ("load/mtp" in row) == ("bias/moe" in row) == (row["step"] % 10 == 0)
        if "load/mtp" not in row:
            continue
        assert np.shape(row["load/mtp"]) == (1, 8)
        # Two experts a token; an epoch's last row ends in padding, which goes to none.
        first, second = np.sum(row["load/moe"], axis=1)
        assert 1.5 * train.tokens_per_step < first == second <= 2 * train.tokens_per_step
    assert "tokens_per_s" not in rows[0]  # that step compiled
    assert all(0 < row["share_of_peak"] < 1 for row in rows[1:])
    assert all(row["tokens_per_s"] > 0 for row in rows[1:])
