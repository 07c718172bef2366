"""Meshes change nothing: every preset of rules and many shapes against one device.

The islands run unchecked (`sharding.island.run`), so what is said to be the same on several devices
is compared here, device by device and bit for bit.
"""

import dataclasses
import functools
import itertools
import re
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import dsjax
from dsjax.config import BlockConfig, Config, MeshConfig, OptimizerConfig, constant
from dsjax.errors import InputError
from dsjax.evaluate.acceptance import second_token_acceptance
from dsjax.meshes import check_training, rules_of, spread_of
from dsjax.model.mla import MultiHeadLatentAttention
from dsjax.overrides import override
from dsjax.presets import preset
from dsjax.train.loss import PretrainLoss
from dsjax.train.state import TrainState, abstract_state, blueprint, create
from dsjax.train.step import TrainStep, make_train_step
from sharding.mesh import MeshShape, make_mesh
from sharding.rules import PRESETS, AxisRules, Exchange
from tests.helpers import FLOAT32, FLOAT32_GRADIENT, assert_trees_near, distance, packed_batch

STEPS = 5
ROWS, MICRO, LENGTH, VOCAB = 16, 8, 32, 64
BFLOAT16, BFLOAT16_GRADIENT = 1e-2, 0.15  # relative norms; of these tokens, some change experts
# Once weights differ by rounding, a token between two experts of almost the same score may count
# for the other one, in a balance loss if not in earnest. The first step is compared more strictly.
LATER, MOVED = 1e-3, 1e-2

# ---- what is trained, and how -------------------------------------------------------------------


def v3() -> Config:
    """`nano` without its dense layer, in sizes that divide by 8, with every loss that there is."""
    config = override(
        preset("nano"),
        f"model.vocab_size={VOCAB}",
        f"train.seq_len={LENGTH}",
        f"train.batch_size={ROWS}",
        f"train.micro_batch_size={MICRO}",
        "train.balance_loss_weight=0.01",
        "train.device_balance_loss_weight=0.02",
        "train.communication_balance_loss_weight=0.03",
    )
    block = config.model.stacks[1].blocks[0]
    sizes = {"q_latent_dim": 16, "kv_latent_dim": 16, "nope_dim": 4, "rope_dim": 4, "value_dim": 4}
    attention = dataclasses.replace(block.attention, num_heads=8, **sizes)
    return of_block(config, attention, dataclasses.replace(block.ffn, expert_dim=16))


def of_block(config: Config, attention: Any, ffn: Any) -> Config:
    """With one kind of block everywhere, and rates at which five steps tell."""
    block = BlockConfig(attention=attention, ffn=ffn)
    stack = dataclasses.replace(config.model.stacks[-1], blocks=(block,))
    mtp = config.model.mtp and dataclasses.replace(config.model.mtp, block=block)
    train = dataclasses.replace(
        config.train,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule=constant(1.0)),
        bias_speed=constant(1e-2),
    )
    model = dataclasses.replace(config.model, stacks=(stack,), mtp=mtp)
    return dataclasses.replace(config, model=model, train=train)


def v2_lite() -> Config:
    """Queries straight from the hidden state; softmax scores, no bias, no groups, no MTP."""
    config = override(v3(), "model.mtp=null")
    block = config.model.stacks[0].blocks[0]
    published = preset("deepseek_v2_lite").model.stacks[1].blocks[0].ffn
    ffn = dataclasses.replace(published, num_experts=8, num_experts_per_token=3, expert_dim=16)
    return of_block(config, dataclasses.replace(block.attention, q_latent_dim=None), ffn)


def student() -> Config:
    """Qwen2: grouped queries with biases, fewer key/value heads than devices, a tied head."""
    config = override(
        preset("nano_dense"),
        f"model.vocab_size={VOCAB}",
        "model.stacks.0.repeats=1",
        f"train.seq_len={LENGTH}",
        f"train.batch_size={ROWS}",
        f"train.micro_batch_size={MICRO}",
    )
    block = config.model.stacks[0].blocks[0]
    return of_block(config, block.attention, block.ffn)


# Documents that end within devices' parts, of one token, of whole rows; padding; a row of nothing
# but padding.
LENGTHS = [
    *([20, 12], [32], [5, 9, 18], [10, 10], [1, 31], [], [16, 8], [30]),
    *([7, 7, 7, 7, 4], [3], [31, 1], [12, 20], [2, 2, 28], [32], [15, 17], [24]),
]


def batch_of(lengths=LENGTHS, seed=0):
    return packed_batch(np.random.default_rng(seed), VOCAB, lengths)


def on(config: Config, mesh: MeshConfig) -> Config:
    return dataclasses.replace(config, mesh=mesh)


def one_device(config: Config) -> Config:
    return on(config, MeshConfig())


@functools.lru_cache(maxsize=4)  # what is drawn for one configuration is compiled once
def step_of(config: Config) -> TrainStep:
    check_training(config)
    graphdef, optimizer = blueprint(config, rules_of(config.mesh))
    return make_train_step(
        graphdef,
        PretrainLoss.of(config),
        optimizer,
        bias_speed=config.train.bias_speed,
        spread=spread_of(config.mesh),
    )


@functools.cache
def first_state(config: Config) -> TrainState:
    return jax.device_get(create(config, jax.random.key(0), AxisRules()))


def state_of(config: Config) -> TrainState:
    """The first state, moved: drawing it on every mesh would be a program more."""
    spread = spread_of(config.mesh)
    like = abstract_state(config, spread.rules, spread.mesh)
    # As a run draws it, whatever is computed in or kept of it.
    plain = override(one_device(config), "precision.compute_dtype=float32", "train.remat=none")
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), first_state(plain), like)


class Trained(NamedTuple):
    """What steps on one batch gave; of `grads`, the first."""

    grads: Any
    metrics: list[dict[str, jax.Array]]
    state: TrainState


def train(config: Config, batch: dict, *, micro: int = MICRO, steps: int = STEPS) -> Trained:
    step, seen = step_of(config), []

    def apply(state, sums, progress):
        seen.append(sums["grads"])
        return step.apply(state, sums, progress)

    spied = dataclasses.replace(step, apply=apply)
    state, metrics = state_of(config), []
    for number in range(steps):
        state, told = spied(state, batch, progress=number / steps, micro_batch_size=micro)
        metrics.append(told)
    return Trained(seen[0], metrics, state)


@functools.cache
def reference(config: Config) -> Trained:
    """One device, the whole batch at once."""
    return jax.device_get(train(one_device(config), batch_of(), micro=ROWS))


# ---- what is compared ---------------------------------------------------------------------------


def assert_copies_agree(tree):
    """Every part of which several devices have a copy is the same on each, bit for bit."""
    compared = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts: dict[str, bytes] = {}
        for shard in leaf.addressable_shards:
            bits = np.asarray(shard.data).tobytes()
            first = parts.setdefault(str(shard.index), bits)
            assert bits == first, f"{jax.tree_util.keystr(path)} on {shard.device}"
            compared += 1
        compared -= len(parts)
    return compared


def assert_first_step_equal(got: Trained, wanted: Trained, tolerance=FLOAT32):
    """Every gradient and metric of the first step, where both still have the same weights."""
    assert_trees_near(got.grads, wanted.grads, max(FLOAT32_GRADIENT, tolerance))
    assert set(got.metrics[0]) == set(wanted.metrics[0])
    for name, value in wanted.metrics[0].items():
        mine = np.asarray(got.metrics[0][name])
        if value.dtype == np.int32 or name.startswith("bias/"):
            np.testing.assert_array_equal(mine, value, err_msg=name)
        else:
            assert distance(mine, value) <= tolerance, name
    assert got.metrics[0]["dispatch_overflow"] == 0


def assert_equal_run(config: Config, got: Trained, wanted: Trained):
    """And what the steps after it make of it: how far each weight has moved, and to where."""
    assert_first_step_equal(got, wanted)
    for mine, value in zip(got.metrics, wanted.metrics, strict=True):
        for name in value:
            if name.startswith("loss") or name.endswith("norm"):
                assert distance(mine[name], value[name]) <= LATER, name
    chex.assert_trees_all_equal(jax.device_get(got.state.bias), wanted.state.bias)
    first = first_state(one_device(config)).params
    mine, theirs = (
        jax.tree.map(np.subtract, jax.device_get(params), first)
        for params in (got.state.params, wanted.state.params)
    )
    assert_trees_near(mine, theirs, MOVED)
    assert int(got.state.step) == len(got.metrics)
    assert int(got.state.extra["skipped"]) == 0


def assert_laid_out(config: Config, state: TrainState):
    """What a step returns lies as what it was given: else the next one would be compiled again."""
    spread, step = spread_of(config.mesh), step_of(config)
    like = abstract_state(config, spread.rules, spread.mesh)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    for program in (step.zero, step.accumulate, step.apply):
        assert program._cache_size() == 1


# ---- training -----------------------------------------------------------------------------------


def case(rules: str, remat: str = "none", *, when: str = "slow", **axes: int):
    name = "-".join([rules, *(f"{axis}{size}" for axis, size in axes.items()), remat])
    marks = () if when == "always" else getattr(pytest.mark, when)
    return pytest.param(MeshConfig(rules=rules, **axes), remat, id=name, marks=marks)


MESHES = [
    case("fsdp", data=8, when="nightly"),
    case("fsdp", fsdp=8, when="nightly"),
    case("fsdp", context=8, when="nightly"),
    case("fsdp", data=2, fsdp=2, when="nightly"),
    case("fsdp", fsdp=2, context=4, when="always"),
    case("fsdp", data=2, fsdp=2, context=2, remat="full", when="nightly"),
    case("fsdp_ep", expert=8, when="nightly"),
    case("fsdp_ep", expert=2, remat="full", when="nightly"),
    case("fsdp_ep", fsdp=2, expert=4, when="nightly"),
    case("fsdp_ep", data=2, expert=2, context=2, remat="dots", when="always"),
    case("fsdp_ep_tp", tensor=8, when="nightly"),
    case("fsdp_ep_tp", expert=2, tensor=4, when="nightly"),
    case("fsdp_ep_tp", tensor=2, context=2, when="nightly"),
    case("fsdp_ep_tp", fsdp=2, tensor=2, context=2, remat="dots", when="nightly"),
    case("fsdp_ep_tp", fsdp=2, expert=2, tensor=2, when="always", remat="full"),
]


@pytest.mark.parametrize(("mesh", "remat"), MESHES)
def test_a_mesh_changes_nothing(mesh, remat):
    """V3 with all its losses over packed rows, in two micro-batches.

    Against one device that keeps everything and takes the batch at once.
    """
    config = v3()
    wanted = reference(config)
    assert {"loss_mtp", "loss_balance_device", "loss_balance_communication"} < set(
        wanted.metrics[0]
    )
    assert all(np.ptp(bias_LE) > 0 for bias_LE in wanted.state.bias.values())
    meshed = on(override(config, f"train.remat={remat}"), mesh)
    got = train(meshed, batch_of())
    assert_equal_run(config, got, wanted)
    assert assert_copies_agree(got) > 0
    assert_laid_out(meshed, got.state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "mesh"),
    [
        pytest.param(
            student, MeshConfig(rules="fsdp", fsdp=2, context=2), marks=pytest.mark.nightly
        ),
        (student, MeshConfig(rules="fsdp_ep_tp", fsdp=2, tensor=2, expert=2)),
        pytest.param(
            v2_lite,
            MeshConfig(rules="fsdp_ep_tp", expert=2, tensor=2, context=2),
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["student-fsdp", "student-fsdp_ep_tp", "v2_lite-fsdp_ep_tp"],
)
def test_a_mesh_changes_nothing_for_other_models(make, mesh):
    config = make()
    got = train(on(config, mesh), batch_of())
    assert_equal_run(config, got, reference(config))
    assert assert_copies_agree(got) > 0


@pytest.mark.nightly
def test_a_mesh_rounds_no_more_than_bfloat16_does():
    """Of what both round, each its own sums."""
    config = override(v3(), "precision.compute_dtype=bfloat16")
    exact = reference(v3())
    single = reference(config)
    mesh = MeshConfig(rules="fsdp_ep_tp", fsdp=2, expert=2, tensor=2)
    got = train(on(config, mesh), batch_of(), steps=1)
    assert_copies_agree(got)
    for name in ("loss", "loss_mtp", "loss_balance", "grad_norm"):
        assert distance(got.metrics[0][name], single.metrics[0][name]) <= BFLOAT16, name
    leaves = zip(*map(jax.tree.leaves, (got.grads, single.grads, exact.grads)), strict=True)
    for mine, theirs, wanted in leaves:
        assert distance(mine, theirs) <= BFLOAT16_GRADIENT
        assert distance(mine, wanted) <= 1.5 * distance(theirs, wanted) + BFLOAT16


@pytest.mark.nightly
def test_rows_may_travel_in_bfloat16():
    mesh = MeshConfig(rules="fsdp_ep", expert=4, wire="bfloat16")
    got, wanted = train(on(v3(), mesh), batch_of(), steps=1), reference(v3())
    worst = max(map(distance, jax.tree.leaves(got.grads), jax.tree.leaves(wanted.grads)))
    assert FLOAT32_GRADIENT < worst <= BFLOAT16_GRADIENT
    assert distance(got.metrics[0]["loss"], wanted.metrics[0]["loss"]) <= 1e-3


@pytest.mark.slow
def test_the_same_weights_are_drawn_on_every_mesh():
    config = on(v3(), MeshConfig(rules="fsdp_ep_tp", fsdp=2, expert=2, tensor=2))
    spread = spread_of(config.mesh)
    got = create(config, jax.random.key(0), spread.rules, spread.mesh)
    chex.assert_trees_all_equal(jax.device_get(got), first_state(one_device(config)))
    assert_copies_agree(got)
    like = abstract_state(config, spread.rules, spread.mesh)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(like), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


# ---- meshes and batches drawn at random ---------------------------------------------------------

AXES = {
    "fsdp": ("data", "fsdp", "context"),
    "fsdp_ep": ("data", "fsdp", "expert", "context"),
    "fsdp_ep_tp": ("data", "fsdp", "expert", "tensor", "context"),
}


@st.composite
def meshes(draw):
    """Rules, and 2, 4 or 8 devices shared out over the axes that they lay something over."""
    rules = draw(st.sampled_from(sorted(AXES)))
    sizes = dict.fromkeys(AXES[rules], 1)
    for _ in range(draw(st.integers(1, 3))):
        sizes[draw(st.sampled_from(AXES[rules]))] *= 2
    # A device of context has two chunks, which tensor cuts.
    if 2 * sizes["context"] * sizes.get("tensor", 1) > LENGTH:
        sizes["context"] //= 2
    return MeshConfig(rules=rules, **sizes)


@st.composite
def packings(draw):
    """Rows of documents, and what is left of them padding."""
    rows = []
    for _ in range(ROWS):
        cuts = draw(st.lists(st.integers(0, LENGTH), max_size=4))
        rows.append([b - a for a, b in itertools.pairwise(sorted({0, *cuts}))])
    return rows


def check_drawn(mesh, lengths, seed):
    config, batch = v3(), batch_of(lengths, seed)
    # All padding is narrower, too: the width is a program's.
    batch = {name: np.pad(x, ((0, 0), (0, LENGTH - x.shape[1]))) for name, x in batch.items()}
    wanted = jax.device_get(train(one_device(config), batch, micro=ROWS, steps=1))
    got = train(on(config, mesh), batch, steps=1)
    assert_first_step_equal(got, wanted)
    assert_copies_agree(got)


drawn = given(meshes(), packings(), st.integers(0, 2**32 - 1))


@pytest.mark.nightly
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@drawn
def test_any_mesh_changes_nothing(mesh, lengths, seed):
    check_drawn(mesh, lengths, seed)


# ---- a thousand steps ---------------------------------------------------------------------------


def router_alone() -> Config:
    """One small layer of experts, whose weights do not move: their rates are next to nothing.

    Trained, they would differ by the rounding of their gradients, which sums over devices in
    another order; a token between two experts then goes to the other one, and from there on the
    runs part. The biases count tokens, so without that they are the same.
    """
    config = override(v3(), "model.mtp=null", "model.stacks.0.repeats=1", "model.embed_dim=8")
    config = override(config, "train.optimizer.learning_rate=1e-30", "train.seq_len=16")
    config = override(config, "train.batch_size=8", "train.micro_batch_size=8")
    block = config.model.stacks[0].blocks[0]
    sizes = {"num_heads": 2, "q_latent_dim": None, "kv_latent_dim": 8}
    attention = dataclasses.replace(block.attention, **sizes)
    ffn = dataclasses.replace(block.ffn, expert_dim=4, num_shared_experts=0)
    rate = config.train.optimizer
    config = of_block(config, attention, ffn)
    train = dataclasses.replace(config.train, optimizer=rate, bias_speed=constant(1e-3))
    return dataclasses.replace(config, train=train)


def biases_after(config: Config, steps: int) -> tuple[jax.Array, jax.Array]:
    """The bias at the end, and after every step, over batches that all differ."""
    rng, spread = np.random.default_rng(0), spread_of(config.mesh)
    step, state = step_of(config), state_of(config)
    batch = packed_batch(rng, VOCAB, [[16], [9, 7], [12], [4, 4, 8], [16], [15], [1, 14], [10, 6]])
    totals = step.loss.totals(batch, 0.0)
    # Some tokens come more often than others, so that some experts do.
    often_V = 1.0 / np.arange(1, VOCAB + 1)
    tokens = rng.choice(VOCAB, (steps, *batch["tokens_BT"].shape), p=often_V / often_V.sum())
    micro, sharding = spread(batch, 8), None
    if spread.mesh is not None:
        sharding = NamedSharding(spread.mesh, PartitionSpec(None, *spread.sharding(2).spec))
    tokens_SBT = jax.device_put(tokens.astype(np.int32), sharding)

    @jax.jit  # the programs of a step, a thousand times without the host between them
    def run(state, tokens_SBT, micro):
        def one(state, tokens_BT):
            micro_now = micro | {"tokens_BT": tokens_BT}
            sums = step.zero(state.params, state.bias, micro_now, totals)
            sums = step.accumulate(state.params, state.bias, sums, micro_now, totals)
            state, _ = step.apply(state, sums, np.float32(0.0))
            return state, state.bias["moe"]

        return jax.lax.scan(one, state, tokens_SBT)

    with spread.mesh_set():
        state, bias_SLE = run(state, tokens_SBT, micro)
    return state.bias["moe"], bias_SLE


@pytest.mark.nightly
def test_a_thousand_steps_leave_the_same_biases():
    wanted, history = map(np.asarray, biases_after(router_alone(), 1000))
    assert np.ptp(wanted) > 0.02
    assert len(np.unique(history, axis=0)) > 100
    for devices in (2, 4, 8):
        mesh = MeshConfig(rules="fsdp_ep", fsdp=devices // 2, expert=2)
        got, _ = biases_after(on(router_alone(), mesh), 1000)
        assert np.asarray(got).tobytes() == wanted.tobytes()
        assert_copies_agree(got)


# ---- scoring and generation ---------------------------------------------------------------------


@functools.cache
def language_model() -> dsjax.LanguageModel:
    return dsjax.init(override(v3(), "model.init_std=0.1"), seed=1)


PROMPTS = [np.random.default_rng(n).integers(0, VOCAB, n + 3).tolist() for n in range(5)]


@functools.cache
def scored(place: tuple[str, MeshShape] | None):
    lm = language_model()
    if place is not None:
        lm = lm.with_rules(PRESETS[place[0]], make_mesh(place[1]))
    made = lm.generate_tokens(PROMPTS, max_tokens=12, temperature=0.8, seed=3, stop_ids=(27, 52))
    logits_BTV = np.asarray(lm.logits([prompt[:3] for prompt in PROMPTS]))
    batches = [batch_of(LENGTHS[:8], seed=5)]
    share = second_token_acceptance(lm.graphdef, lm.params, lm.bias, batches)
    return made, logits_BTV, share


@pytest.mark.parametrize(
    "place",
    [
        ("decode", MeshShape(expert=2, tensor=4)),
        pytest.param(("decode", MeshShape(data=2, tensor=2)), marks=pytest.mark.nightly),
        pytest.param(("fsdp", MeshShape(fsdp=4, context=2)), marks=pytest.mark.nightly),
        pytest.param(
            ("fsdp_ep_tp", MeshShape(fsdp=2, expert=2, tensor=2)), marks=pytest.mark.nightly
        ),
    ],
    ids=["decode", "decode-data", "fsdp", "fsdp_ep_tp"],
)
def test_a_mesh_scores_and_generates_the_same(place):
    """Five prompts of different lengths, which no mesh here divides."""
    made, logits_BTV, share = scored(place)
    wanted, wanted_logits_BTV, wanted_share = scored(None)
    assert logits_BTV.shape == wanted_logits_BTV.shape
    assert distance(logits_BTV, wanted_logits_BTV) <= FLOAT32
    assert share == wanted_share > 0
    np.testing.assert_array_equal(made.length_B, wanted.length_B)
    np.testing.assert_array_equal(made.stopped_B, wanted.stopped_B)
    assert 0 < made.stopped_B.sum() < len(PROMPTS)
    for row, length in enumerate(wanted.length_B):
        np.testing.assert_array_equal(made.tokens_BG[row, :length], wanted.tokens_BG[row, :length])
        mine, theirs = made.log_probs_BG[row, :length], wanted.log_probs_BG[row, :length]
        assert distance(mine, theirs) <= FLOAT32


LONG = [np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in (150, 64, 3, 200)]


def said(place: MeshShape | None, *changes: str):
    lm = language_model()
    config = override(lm.config, *changes)
    lm = dsjax.LanguageModel(config, lm.graphdef, lm.params, lm.bias, None)
    if place is not None:
        lm = lm.with_rules(PRESETS["decode"], make_mesh(place))
    return lm.generate_tokens(LONG, max_tokens=70, temperature=0.8, seed=3)


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        (MeshShape(context=2, tensor=2), ()),
        pytest.param(MeshShape(context=4, expert=2), (), marks=pytest.mark.nightly),
        pytest.param(
            MeshShape(tensor=4),
            ("infer.cache=fp8", "infer.prefill_chunk=48"),
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["context-tensor", "context-expert", "tensor-fp8"],
)
def test_a_cache_over_devices_says_the_same(place, changes, monkeypatch):
    """Sequences of no page, one, and several for every device; long pieces are expanded."""
    monkeypatch.setattr(MultiHeadLatentAttention, "_worth_expanding", 40)
    made, wanted = said(place, *changes), said(None, *changes)
    np.testing.assert_array_equal(made.tokens_BG, wanted.tokens_BG)
    assert distance(made.log_probs_BG, wanted.log_probs_BG) <= FLOAT32


@pytest.mark.nightly
def test_keys_and_values_over_devices_say_the_same():
    """Grouped-query attention: heads over `tensor`, pages over `context` alone."""
    one = dsjax.init(student(), seed=1)
    cut = one.with_rules(PRESETS["decode"], make_mesh(MeshShape(context=2, tensor=2)))
    how = {"max_tokens": 70, "temperature": 0.8, "seed": 3}
    made, wanted = (lm.generate_tokens(LONG, **how) for lm in (cut, one))
    np.testing.assert_array_equal(made.tokens_BG, wanted.tokens_BG)
    assert distance(made.log_probs_BG, wanted.log_probs_BG) <= FLOAT32


@pytest.mark.slow
def test_weights_kept_in_fp8_lie_by_whole_experts(tmp_path):
    language_model().save_pretrained(tmp_path / "fp8", dtype="fp8")
    one = dsjax.load_pretrained(tmp_path / "fp8")
    mesh = make_mesh(MeshShape(expert=4))
    cut = dsjax.load_pretrained(tmp_path / "fp8", mesh=mesh, rules=PRESETS["fsdp_ep"])
    with pytest.raises(InputError, match="computed with where experts alone are laid over devices"):
        cut.logits([1, 2])
    with pytest.raises(InputError, match="laid out as they are loaded: load them again"):
        one.with_rules(PRESETS["decode"], mesh)
    lm = dsjax.load_pretrained(tmp_path / "fp8", mesh=mesh, rules=PRESETS["decode"])
    experts = lm.params["stacks"]["moe"][0]["ffn"]["w_in_ED2F"]
    assert experts.q.addressable_shards[0].data.shape[1] == 2
    tokens_BT = batch_of()["tokens_BT"][:3]
    got, wanted = lm.logits(tokens_BT), one.logits(tokens_BT)
    assert distance(got, wanted) <= BFLOAT16


@pytest.mark.nightly
def test_scoring_is_exact_whatever_training_bounds():
    """No stop tokens, an odd vocabulary, and room that training would find too small."""
    config = override(preset("nano"), "model.vocab_size=509")
    rules = dataclasses.replace(PRESETS["fsdp_ep_tp"], exchange=Exchange(buffer_factor=0.25))
    one = dsjax.init(config, seed=0)
    lm = one.with_rules(rules, make_mesh(MeshShape(tensor=2, expert=2)))
    prompts = [[1, 2, 3], [4, 5], [6]]
    assert distance(lm.logits(prompts[0]), one.logits(prompts[0])) <= FLOAT32
    got, wanted = (x.generate_tokens(prompts, max_tokens=3) for x in (lm, one))
    np.testing.assert_array_equal(got.tokens_BG, wanted.tokens_BG)


# ---- room ---------------------------------------------------------------------------------------


def test_a_step_that_loses_tokens_is_not_taken():
    config = on(v3(), MeshConfig(rules="fsdp_ep", expert=4, buffer_factor=0.25))
    before = jax.device_get(state_of(config))
    got = train(config, batch_of(), steps=2)
    assert [int(told["dispatch_overflow"]) > 0 for told in got.metrics] == [True, True]
    for kept in ("params", "bias", "opt"):
        chex.assert_trees_all_equal(jax.device_get(getattr(got.state, kept)), getattr(before, kept))
    assert jax.device_get(got.state.extra) == {"skipped": 2, "skipped_in_a_row": 2}
    assert int(got.state.step) == 2
    assert_copies_agree(got)


# ---- errors -------------------------------------------------------------------------------------


def refused(*changes: str) -> str:
    with pytest.raises(InputError) as caught:
        check_training(override(v3(), *changes))
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["mesh.rules=fsdp", "mesh.fsdp=3"],
            "train.micro_batch_size 8 does not divide over the 3 devices of fsdp=3",
        ),
        (
            ["mesh.rules=fsdp_ep", "mesh.fsdp=2", "mesh.expert=8"],
            "train.micro_batch_size 8 does not divide over the 16 devices of fsdp=2 x expert=8",
        ),
        (
            ["mesh.rules=fsdp", "mesh.data=32", "train.micro_batch_size=null"],
            "train.batch_size 16 does not divide over the 32 devices of data=32",
        ),
        (
            ["mesh.rules=fsdp", "mesh.context=3"],
            "train.seq_len 32 does not divide into the 6 parts of context=3 "
            "(two a device of context)",
        ),
        (
            ["mesh.rules=fsdp_ep_tp", "mesh.tensor=4", "mesh.context=8"],
            "train.seq_len 32 does not divide into the 64 parts of context=8 x tensor=4 "
            "(two a device of context)",
        ),
        (
            ["mesh.rules=fsdp", "mesh.expert=2"],
            "mesh.expert is 2, but the rules 'fsdp' lay nothing over it; fsdp_ep, fsdp_ep_tp would",
        ),
        (
            ["mesh.data=2"],
            "mesh.data is 2, but the rules 'single' lay nothing over it; "
            "fsdp, fsdp_ep, fsdp_ep_tp would",
        ),
        (
            ["mesh.rules=fsdp", "mesh.stage=2"],
            "mesh.stage is 2, but the rules 'fsdp' lay nothing over it",
        ),
        (
            ["mesh.rules=decode", "mesh.tensor=2"],
            "mesh.rules decode lays weights out for generation; "
            "training takes fsdp, fsdp_ep or fsdp_ep_tp",
        ),
    ],
)
def test_a_run_that_does_not_fit_names_both_sizes(changes, message):
    assert refused(*changes) == message


@pytest.mark.parametrize(
    ("changes", "where", "sizes"),
    [
        (
            ["mesh.rules=fsdp_ep", "mesh.expert=3", "train.batch_size=3"],
            r"^mtp_modules\.0\.block\.ffn\.w_(down_EFD|in_ED2F): ",
            "'experts' of 8 does not divide over expert=3",
        ),
        (
            ["mesh.rules=fsdp_ep_tp", "mesh.tensor=3", "train.seq_len=48"],
            r"^mtp_modules\.0\.block\.attention\.w_(o_NHD|uq_QNA|ukv_CNY): ",
            "'heads' of 8 does not divide over tensor=3",
        ),
        (
            ["mesh.rules=fsdp", "mesh.fsdp=3", "train.batch_size=3"],
            r"^embed_VD: ",
            "'embed' of 32 does not divide over fsdp=3",
        ),
    ],
)
def test_a_weight_that_does_not_divide_is_named(changes, where, sizes):
    told = refused("train.micro_batch_size=null", *changes)
    assert re.search(where, told)
    assert sizes in told


def test_fewer_key_heads_than_devices_are_refused():
    config = on(student(), MeshConfig(rules="fsdp_ep_tp", tensor=4))
    with pytest.raises(
        InputError, match=r"[wb]_[kv]_.*: .*'heads' of 2 does not divide over tensor=4"
    ):
        check_training(config)


def test_too_few_devices_are_both_told():
    mesh = MeshConfig(rules="fsdp", fsdp=4, data=4)
    check_training(override(on(v3(), mesh), "train.micro_batch_size=16"))  # that needs no devices
    with pytest.raises(
        InputError, match=r"^mesh \(data=4, fsdp=4\) needs 16 devices; there are 8$"
    ):
        spread_of(mesh)


def test_a_model_that_does_not_fit_a_mesh_is_not_moved():
    with pytest.raises(
        InputError, match=r"w_(in|down)_.*: .*'experts' of 8 does not divide over expert=3"
    ):
        language_model().with_rules(PRESETS["decode"], make_mesh(MeshShape(expert=3)))
