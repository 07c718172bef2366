"""The GRPO loss: values by hand, gradients, and that it does not depend on how rows are cut."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsjax.config import MeshConfig, RlConfig
from dsjax.errors import InputError
from dsjax.meshes import spread_of
from dsjax.model.transformer import build, merge, split
from dsjax.overrides import override
from dsjax.presets import preset
from dsjax.rl.groups import advantages, all_equal, overlong_penalty
from dsjax.rl.grpo import GrpoLoss, kl_estimate, score, surrogate, token_weights
from dsjax.rl.rows import Sequences, pack, place, unpack
from dsjax.train import vocabulary
from dsjax.train.state import blueprint, create
from dsjax.train.step import make_train_step
from dsjax.train.vocabulary import Draw, sharded_log_probs, whole_log_probs
from tests.helpers import FLOAT32, FLOAT32_GRADIENT, assert_near, assert_trees_near

# ---- groups -------------------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0]])
    np.testing.assert_allclose(
        advantages(rewards), [[0.8660239, -0.8660239, -0.8660239, 0.8660239]], rtol=1e-6
    )
    np.testing.assert_allclose(advantages(rewards, "mean"), [[0.5, -0.5, -0.5, 0.5]])
    two = np.array([[1.0, 0.0], [3.0, 1.0]])  # deviation of all four: sqrt(4.75 / 3)
    np.testing.assert_allclose(
        advantages(two, "batch"), np.array([[0.5, -0.5], [1.0, -1.0]]) / 1.2583057, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["group", "batch", "mean"])
def test_advantages_follow_their_samples_and_forget_constants(rng, kind):
    rewards = rng.random((5, 6))
    wanted = advantages(rewards, kind)
    rows, columns = rng.permutation(5), rng.permutation(6)
    np.testing.assert_allclose(
        advantages(rewards[rows][:, columns], kind), wanted[rows][:, columns], atol=1e-12
    )
    np.testing.assert_allclose(advantages(rewards + 7.0, kind), wanted, atol=1e-9)


@pytest.mark.parametrize("kind", ["group", "batch", "mean"])
def test_a_masked_sample_is_no_part_of_its_group(kind):
    nan = np.nan
    found = advantages(
        np.array([[1.0, nan, 0.0], [nan, nan, 1.0], [nan, nan, nan], [2.0, 2.0, np.inf]]), kind
    )
    assert np.isfinite(found).all()
    assert found[0, 0] == -found[0, 2] > 0
    assert found[0, 1] == 0
    np.testing.assert_array_equal(found[1:], 0)  # one left, none left, all equal
    without = advantages(np.array([[1.0, 0.0]]), "group")
    np.testing.assert_allclose(
        advantages(np.array([[1.0, nan, 0.0]]), "group")[0, [0, 2]], without[0]
    )
    np.testing.assert_array_equal(
        all_equal(np.array([[1.0, nan, 0.0], [nan, nan, 1.0], [nan] * 3, [2.0, 2.0, np.inf]])),
        [False, True, True, True],
    )


def test_overlong_penalty_by_hand():
    lengths = np.array([16_384, 18_432, 20_480, 20_481, 1])
    np.testing.assert_allclose(overlong_penalty(lengths, 20_480, 4096), [0, -0.5, -1, -1, 0])
    np.testing.assert_array_equal(overlong_penalty(lengths, 20_480, 0), 0)


# ---- terms --------------------------------------------------------------------------------------

LOG, OLD = jnp.log(jnp.array([0.5, 0.4])), jnp.log(jnp.array([0.4, 0.5]))

ONE = jnp.ones(2)


def test_surrogate_by_hand():
    ratio = jnp.exp(LOG - OLD)
    np.testing.assert_allclose(ratio, [1.25, 0.8], rtol=1e-6)
    np.testing.assert_allclose(surrogate(ratio, ONE, 0.2, 0.2), [1.2, 0.8], rtol=1e-6)
    np.testing.assert_allclose(surrogate(ratio, -ONE, 0.2, 0.2), [-1.25, -0.8], rtol=1e-6)
    # R1's 10: nothing below 1 - 10 exists, and 11 binds for what is good alone.
    wide = functools.partial(surrogate, clip_low=10.0, clip_high=10.0)
    np.testing.assert_allclose(wide(jnp.array([0.01, 12.0]), ONE), [0.01, 11.0], rtol=1e-6)
    np.testing.assert_allclose(wide(jnp.array([0.01, 12.0]), -ONE), [-0.01, -12.0], rtol=1e-6)


def test_kl_by_hand():
    k3 = kl_estimate(LOG, jnp.log(jnp.array([0.45, 0.45])))
    np.testing.assert_allclose(k3, [0.00536052, 0.00721696], rtol=2e-5)
    np.testing.assert_allclose(jnp.exp(LOG - OLD) * k3, [0.00670064, 0.00577357], rtol=2e-5)


def test_which_divergence_each_estimator_pulls_to():
    """On-policy, in expectation: k1 to none; ratio * k3: KL(pi || ref); k3: KL(ref || pi)."""
    ref = jax.nn.log_softmax(jnp.array([0.3, -0.2, 0.9, 0.0]))
    logits = jnp.array([-0.5, 0.4, 0.1, 1.0])
    policy = jax.nn.log_softmax(logits)

    def expected(estimator):
        def mean(logits):
            log = jax.nn.log_softmax(logits)
            return jnp.sum(jnp.exp(policy) * estimator(log))  # drawn from the policy as it is

        return jax.grad(mean)(logits)

    def forward(logits):
        log = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(log) * (log - ref))

    def backward(logits):
        return jnp.sum(jnp.exp(ref) * (ref - jax.nn.log_softmax(logits)))

    np.testing.assert_allclose(expected(lambda log: log - ref), 0.0, atol=1e-6)
    unbiased = expected(lambda log: jnp.exp(log - policy) * kl_estimate(log, ref))
    np.testing.assert_allclose(unbiased, jax.grad(forward)(logits), atol=1e-6)
    np.testing.assert_allclose(
        expected(lambda log: kl_estimate(log, ref)), jax.grad(backward)(logits), atol=1e-6
    )


@pytest.mark.parametrize(
    ("aggregation", "wanted"), [("grpo", 1.5), ("dapo", 10 / 6), ("dr_grpo", 0.625)]
)
def test_aggregation_by_hand(aggregation, wanted):
    """Token losses 1, 1 and 2, 2, 2, 2; completions have at most 8 tokens."""
    rl = override(
        RlConfig(), "prompts=1", "group_size=2", "mini_batches=1", f"aggregation={aggregation}"
    )
    loss = dataclasses.replace(GrpoLoss.of(rl), max_tokens=8)
    mask = np.array([[0, 1, 1, 0, 1, 1, 1, 1, 0]], bool)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 0]])
    values = np.array([[9.0, 1, 1, 9, 2, 2, 2, 2, 9]])
    weights = token_weights(mask, segments, aggregation)
    total = loss.totals({"weights_BT": weights}, 0.0)
    np.testing.assert_allclose((weights * values).sum() / total.weight, wanted, rtol=1e-6)


# ---- log probabilities --------------------------------------------------------------------------

FLOAT32_PRECISION = merge(*split(build(preset("nano"))(jax.random.key(0)))).precision


@pytest.mark.parametrize("chunk_logits", [1, 7 * 12, 1 << 23])
@pytest.mark.parametrize("draw", [Draw(), Draw(0.7, 9)])
def test_log_probs_in_chunks(rng, monkeypatch, chunk_logits, draw):
    """Values, entropies and gradients, whole and in the form of devices with parts of the head."""
    monkeypatch.setattr(vocabulary, "CHUNK_LOGITS", chunk_logits)
    tokens, width, vocab = 53, 6, 12
    hidden_UD = jnp.asarray(rng.standard_normal((tokens, width)), jnp.float32)
    head_DV = jnp.asarray(3.0 * rng.standard_normal((width, vocab)), jnp.float32)
    targets_U = jnp.asarray(rng.integers(0, 9, tokens), jnp.int32)
    pulled_U = jnp.asarray(rng.standard_normal(tokens), jnp.float32)

    def plain(hidden_UD, head_DV):
        logits_UV = (hidden_UD @ head_DV / draw.temperature)[:, : draw.allowed]
        log_UV = jax.nn.log_softmax(logits_UV)
        entropy_U = -(jnp.exp(log_UV) * log_UV).sum(axis=-1)
        return jnp.take_along_axis(log_UV, targets_U[:, None], axis=-1)[:, 0], entropy_U

    def pulled(function):
        value = jax.jit(lambda h, w: jnp.sum(jnp.square(function(h, w)[0]) * pulled_U))
        return jax.grad(value, (0, 1))(hidden_UD, head_DV)

    forms = (
        lambda h, w: whole_log_probs(FLOAT32_PRECISION, draw, h, w, targets_U),
        lambda h, w: sharded_log_probs(FLOAT32_PRECISION, ((), ()), draw, h, w, targets_U),
    )
    for form in forms:
        assert_trees_near(tuple(form(hidden_UD, head_DV)), plain(hidden_UD, head_DV))
        assert_trees_near(pulled(form), pulled(plain))


# ---- rows ---------------------------------------------------------------------------------------


def some_sequences(rng, n=10, longest=(9, 12), vocab=60, routing=None):
    prompt_N = rng.integers(1, longest[0] + 1, n).astype(np.int32)
    count_N = rng.integers(1, longest[1] + 1, n).astype(np.int32)
    tokens_NY = rng.integers(0, vocab, (n, sum(longest))).astype(np.int32)
    return Sequences(tokens_NY, prompt_N, count_N, routing or {})


def test_rows_hold_every_sequence_once(rng):
    sequences = some_sequences(rng)
    sequences.count_N[3] = 0  # left out
    lengths = sequences.inputs_N.tolist()
    places = place(lengths, 24)
    assert sorted(places) == [n for n in range(10) if n != 3]
    rows = 1 + max(at.row for at in places.values())
    assert rows < 9  # several to a row
    values_NG = rng.random((10, 12)).astype(np.float32)
    batch = pack(
        *(sequences, places),
        row_length=24,
        rows=rows + 1,
        of_completions={"value": values_NG},
        of_sequences={"number": np.arange(10)},
        pad_id=5,
    )
    for n, at in places.items():
        length, prompt, count = lengths[n], int(sequences.prompt_N[n]), int(sequences.count_N[n])
        here = slice(at.start, at.start + length)
        tokens = sequences.tokens_NY[n, : length + 1]
        np.testing.assert_array_equal(batch["tokens_BT"][at.row, here], tokens[:-1])
        np.testing.assert_array_equal(batch["targets_BT"][at.row, here], tokens[1:])
        np.testing.assert_array_equal(batch["positions_BT"][at.row, here], np.arange(length))
        np.testing.assert_array_equal(batch["segments_BT"][at.row, here], at.segment)
        mask = batch["mask_BT"][at.row, here]
        np.testing.assert_array_equal(mask, np.arange(length) >= prompt - 1)
        np.testing.assert_array_equal(batch["value_BT"][at.row, here][mask], values_NG[n, :count])
        np.testing.assert_array_equal(batch["number_BT"][at.row, here][mask], n)
    assert batch["mask_BT"].sum() == sequences.count_N.sum()
    assert not batch["segments_BT"][rows].any()
    assert (batch["tokens_BT"][batch["segments_BT"] == 0] == 5).all()
    back = unpack(batch["value_BT"], sequences, places, 12)
    known = np.arange(12) < sequences.count_N[:, None]
    np.testing.assert_array_equal(back, np.where(known, values_NG, 0))
    with pytest.raises(ValueError, match="a sequence of 25 positions; a row has 24"):
        place([25], 24)


# ---- the loss -----------------------------------------------------------------------------------

VOCAB, WIDTH = 60, 24


def nano():
    config = override(preset("nano"), f"model.vocab_size={VOCAB + 4}", "model.mtp=null")
    block = config.model.stacks[1].blocks[0]
    stack = dataclasses.replace(config.model.stacks[1], repeats=1, blocks=(block,))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, stacks=(stack,)))


CONFIG = nano()


@functools.cache
def model_parts(seed=0):
    return split(build(CONFIG)(jax.random.key(seed)))


def loss_of(**fields):
    base = GrpoLoss.of(override(RlConfig(), "prompts=5", "group_size=2", "mini_batches=1"))
    changed = {"draw": Draw(0.9, VOCAB), "max_tokens": 12, "kl_weight": 0.1} | fields
    return dataclasses.replace(base, **changed)


@pytest.fixture
def sequences(rng):
    return some_sequences(rng, vocab=VOCAB)


@pytest.fixture
def told(rng, sequences):
    """What else is known of each token and sequence: off-policy by some."""
    shape = len(sequences.count_N), 12
    near = -np.log(VOCAB) + 0.3 * rng.standard_normal((3, *shape))
    names = ("log_sample", "log_old", "log_ref")
    return {
        "of_completions": {n: x.astype(np.float32) for n, x in zip(names, near, strict=True)},
        "of_sequences": {"advantages": rng.standard_normal(shape[0]).astype(np.float32)},
    }


def rows_of(sequences, told, aggregation="grpo", *, width=WIDTH, rows=None, packed=True):
    lengths = sequences.inputs_N.tolist()
    places = place(lengths, width) if packed else None
    if places is None:
        one = {n: place([length], width)[0] for n, length in enumerate(lengths) if length}
        places = {n: dataclasses.replace(at, row=i) for i, (n, at) in enumerate(one.items())}
    used = 1 + max(at.row for at in places.values())
    batch = pack(sequences, places, row_length=width, rows=rows or used, pad_id=0, **told)
    mask_BT = batch.pop("mask_BT")
    batch["weights_BT"] = token_weights(mask_BT, batch["segments_BT"], aggregation)
    return batch


@functools.cache
def value_and_grad(loss):
    graphdef, _, bias = model_parts()

    def of_params(params, batch, totals):
        return loss(merge(graphdef, params, bias), batch, totals)

    return jax.jit(jax.value_and_grad(of_params, has_aux=True))


@functools.cache
def scorer():
    graphdef, _, _ = model_parts()
    draw = Draw(0.9, VOCAB)
    return jax.jit(lambda params, bias, batch: score(merge(graphdef, params, bias), batch, draw)[0])


def evaluated(loss, batch, parts=1):
    """Value, metrics and gradient over so many micro-batches."""
    params, totals = model_parts()[1], loss.totals(batch, 0.0)
    rows = len(batch["tokens_BT"]) // parts
    value, gradient, metrics = 0.0, None, {}
    for start in range(0, rows * parts, rows):
        part = {name: x[start : start + rows] for name, x in batch.items()}
        (one, aux), grads = value_and_grad(loss)(params, part, totals)
        value += float(one)
        gradient = grads if gradient is None else jax.tree.map(jnp.add, gradient, grads)
        metrics = {n: metrics.get(n, 0.0) + float(x) for n, x in aux.metrics.items()}
    return value, metrics, gradient


VARIANTS = (
    {"aggregation": "grpo"},
    {"aggregation": "dapo", "clip_high": 0.28, "importance_cap": 1.1},
    {"aggregation": "dr_grpo", "kl": "unbiased", "off_policy_mask": 0.05},
    {"aggregation": "grpo", "ratio": "sequence", "clip_low": 3e-2, "clip_high": 4e-2},
)


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda f: "-".join(map(str, f.values())))
def test_the_loss_is_the_same_however_rows_are_cut(sequences, told, fields):
    loss = loss_of(**fields)
    of = functools.partial(rows_of, sequences, told, loss.aggregation)
    value, metrics, gradient = evaluated(loss, of(packed=False, rows=12))
    assert abs(value) > 1e-3
    for other, parts in ((of(packed=False, rows=12), 4), (of(rows=6), 2)):
        again, other_metrics, other_gradient = evaluated(loss, other, parts)
        assert_near(again, value, FLOAT32)
        for name, wanted in metrics.items():
            np.testing.assert_allclose(other_metrics[name], wanted, rtol=1e-4, atol=1e-6)
        assert_trees_near(other_gradient, gradient, FLOAT32_GRADIENT)


def test_the_loss_by_a_slow_reference(sequences, told):
    """Sequence by sequence and token by token, in float64 from the model's own logits."""
    graphdef, params, bias = model_parts()
    model, loss = merge(graphdef, params, bias), loss_of(importance_cap=1.1)
    total, count = 0.0, len(sequences.count_N)
    for n in range(count):
        length, prompt = int(sequences.inputs_N[n]), int(sequences.prompt_N[n])
        tokens = sequences.tokens_NY[n, : length + 1]
        output = model(
            jnp.asarray(tokens[None, :-1]),
            positions_BT=jnp.arange(length)[None],
            segments_BT=jnp.ones((1, length), jnp.int32),
        )
        logits = np.asarray(model.logits(output.hidden_BTD), np.float64)[0, :, :VOCAB] / 0.9
        logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        sum_n = 0.0
        for g in range(int(sequences.count_N[n])):
            log = logs[prompt - 1 + g, tokens[prompt + g]]
            sample, old, ref = (float(x[n, g]) for x in told["of_completions"].values())
            advantage, ratio = float(told["of_sequences"]["advantages"][n]), np.exp(log - old)
            gain = min(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
            gain *= min(np.exp(old - sample), 1.1)
            sum_n += -gain + 0.1 * (np.exp(ref - log) - (ref - log) - 1.0)
        total += sum_n / sequences.count_N[n] / count
    value, _, _ = evaluated(loss, rows_of(sequences, told, rows=6))
    assert_near(value, total, FLOAT32)


def test_the_gradient_at_ratio_1_is_that_of_reinforce(sequences, told):
    """Old log probabilities those of the policy: every token's log probability times advantage."""
    _, params, bias = model_parts()
    batch = rows_of(sequences, told, rows=6)
    loss = loss_of(kl_weight=0.0)

    def logs(params):
        return scorer()(params, bias, batch)

    batch |= dict.fromkeys(("log_old_BT", "log_sample_BT"), np.asarray(logs(params)))
    _, metrics, gradient = evaluated(loss, batch)
    np.testing.assert_allclose(metrics["ratio_mean"], 1.0, rtol=1e-6)

    def reinforce(params):
        return -jnp.sum(logs(params) * batch["weights_BT"] * batch["advantages_BT"]) / 10.0

    assert_trees_near(gradient, jax.grad(reinforce)(params), FLOAT32_GRADIENT)
    # And by finite differences along itself.
    norm = float(optax.tree.norm(gradient))

    def at(step):
        moved = jax.tree.map(lambda p, g: p + step * g / norm, params, gradient)
        return float(value_and_grad(loss)(moved, batch, loss.totals(batch, 0.0))[0][0])

    np.testing.assert_allclose((at(1e-3) - at(-1e-3)) / 2e-3, norm, rtol=1e-2)


def test_what_is_masked_has_no_gradient_at_all(sequences, told):
    """Not even where its numbers are absurd, and it is in no denominator."""
    loss = loss_of()
    sequences.count_N[[2, 5]] = 0
    value, _, gradient = evaluated(loss, rows_of(sequences, told, packed=False, rows=12))
    batch = rows_of(sequences, told, packed=False, rows=12)
    empty = batch["weights_BT"] == 0
    for name in ("log_sample_BT", "log_old_BT", "log_ref_BT", "advantages_BT"):
        batch[name] = np.where(empty, np.float32(-1e9), batch[name])
    again, metrics, other = evaluated(loss, batch)
    assert again == value
    assert np.isfinite(list(metrics.values())).all()
    jax.tree.map(np.testing.assert_array_equal, other, gradient)
    nothing = batch | {"weights_BT": np.zeros_like(batch["weights_BT"])}
    value, metrics, gradient = evaluated(loss, nothing)  # all truncated, all masked
    assert value == 0.0
    assert np.isfinite(list(metrics.values())).all()
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient))


def test_routing_that_is_replayed_makes_ratios_1(rng, sequences, told):
    """At step 0, with the sampler's choices and a router that has moved in its last bits."""
    graphdef, params, bias = model_parts()
    moved = {
        k: b + jnp.asarray(0.5 * rng.standard_normal(b.shape), b.dtype) for k, b in bias.items()
    }
    batch = rows_of(sequences, told, packed=False)
    where = {name: batch[name] for name in ("tokens_BT", "positions_BT", "segments_BT")}
    model = merge(graphdef, params, bias)
    routing = jax.jit(lambda **rows: model(**rows).aux.routing)(**where)
    replay = {f"routing/{k}": np.moveaxis(np.asarray(r), 0, 2) for k, r in routing.items()}
    wanted = scorer()(params, bias, batch)
    there = batch["segments_BT"] > 0
    again = scorer()(params, moved, batch | replay)
    np.testing.assert_array_equal(again[there], wanted[there])
    without = scorer()(params, moved, batch)
    assert np.abs(without - wanted)[there].max() > 1e-3  # it matters


def test_sequences_that_went_too_far_are_left_out(sequences, told):
    """V3.2, equation 9: of bad ones alone, by the mean of log old - log policy."""
    _, params, bias = model_parts()
    logs = np.asarray(scorer()(params, bias, rows_of(sequences, told, rows=6)))
    batch = rows_of(sequences, told, rows=6)
    batch["log_sample_BT"] = logs + np.float32(0.3)  # every token by 0.3
    loss = loss_of(off_policy_mask=0.2, kl_weight=0.0)
    _, metrics, gradient = evaluated(loss, batch)
    real = batch["weights_BT"] > 0
    bad = (batch["advantages_BT"] < 0)[real].mean()
    np.testing.assert_allclose(metrics["off_policy_share"], bad, rtol=1e-5)
    kept = batch | {"advantages_BT": np.maximum(batch["advantages_BT"], 0.0)}
    assert_trees_near(gradient, evaluated(loss_of(kl_weight=0.0), kept)[2])
    _, metrics, _ = evaluated(loss_of(off_policy_mask=0.4, kl_weight=0.0), batch)
    assert metrics["off_policy_share"] == 0.0


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(rules="fsdp_ep_tp", fsdp=2, expert=2, tensor=2),
        pytest.param(MeshConfig(rules="fsdp", fsdp=2, context=4), marks=pytest.mark.nightly),
    ],
    ids=["fsdp_ep_tp", "context"],
)
def test_a_step_on_a_mesh_is_that_of_one_device(sequences, told, mesh):
    """Sequence sums, too, of sequences that lie over several devices."""
    rl = override(
        RlConfig(prompts=5, group_size=2, mini_batches=1),
        "ratio=sequence",
        "off_policy_mask=0.05",
        "max_completion_tokens=12",
    )
    batch = rows_of(sequences, told, rows=8)

    def stepped(config):
        spread = spread_of(config.mesh)
        graphdef, optimizer = blueprint(config, spread.rules)
        loss = GrpoLoss.of(rl, allowed=VOCAB)
        step = make_train_step(
            *(graphdef, loss, optimizer), bias_speed=config.train.bias_speed, spread=spread
        )
        state = create(config, jax.random.key(0), spread.rules, spread.mesh)
        state, metrics = step(state, batch, progress=0.5, micro_batch_size=8)
        return jax.device_get((state.params, metrics))

    params, metrics = stepped(CONFIG)
    others, other_metrics = stepped(dataclasses.replace(CONFIG, mesh=mesh))
    assert_trees_near(others, params, FLOAT32_GRADIENT)
    for name in ("loss_total", "ratio_max", "logprob_gap_max", "off_policy_share", "entropy", "kl"):
        np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-4, atol=1e-6)
    assert metrics["off_policy_share"] > 0


# ---- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("group_size=1", "group_size is 1; an advantage is relative to a group of at least 2"),
        ("mini_batches=3", "8192 completions do not divide into 3 mini_batches"),
        ("importance_cap=2.0", "needs score_rollouts"),
        ("reference_every_steps=10", "reference_every_steps 10 is no multiple of mini_batches 16"),
        ("overlong_tokens=40000", "overlong_tokens is 40000"),
        ("clip_low=-1", "clip_low is -1.0; it must not be negative"),
        ("row_tokens=100", "row_tokens is 100"),
        ("temperature=0", "temperature is 0.0; it must be positive"),
        ("clip_lo=0.1", "unknown key 'clip_lo'; did you mean 'clip_low'"),
        ("rewards=[]", "rewards is empty"),
    ],
)
def test_what_cannot_be_trained_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        override(RlConfig(), change)
