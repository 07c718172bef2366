"""The model against transformers (golden files), against the NumPy oracle, and against itself."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import BlockConfig, MtpConfig, SwiGluConfig
from dsjax.interop import hf
from dsjax.model import router
from dsjax.model.cache import PAGE_SIZE, Cache, advance, contiguous_table, empty_entries
from dsjax.model.mtp import depth_segments
from dsjax.model.transformer import Transformer, build, merge, split
from dsjax.precision import Precision
from dsjax.presets import preset
from dsjax.train.loss import PretrainLoss
from sharding.rules import AxisRules
from tests import golden_cases
from tests.helpers import (
    FLOAT32,
    FLOAT32_GRADIENT,
    assert_near,
    assert_trees_near,
    distance,
    packed_batch,
)
from tests.reference import mtp as reference_mtp
from tests.reference import router as reference_router
from tests.reference import transformer as reference

FLOAT32_PRECISION = Precision(param_dtype=jnp.dtype("float32"), compute_dtype=jnp.dtype("float32"))


def make(config, remat="none"):
    return Transformer(
        config,
        precision=FLOAT32_PRECISION,
        rules=AxisRules(),
        remat=remat,
        key=jax.random.key(0),
    )


def blueprint(config, remat="none"):
    return split(jax.eval_shape(lambda: make(config, remat)))[0]


def plain(tokens_BT):
    """Positions and segments of unpacked rows."""
    tokens_BT = jnp.asarray(tokens_BT)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return {"positions_BT": positions_BT, "segments_BT": jnp.ones_like(tokens_BT)}


# ---- transformers -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=golden_cases.MODELS)
def golden(request):
    tensors, published = golden_cases.load(request.param)
    config = golden_cases.model_config(published)
    weights = {k.removeprefix("param/"): v for k, v in tensors.items() if k.startswith("param/")}
    params, bias = jax.tree.map(jnp.asarray, hf.from_tensors(weights, config))
    graphdef = blueprint(config)
    tokens_BT = jnp.asarray(tensors["input_ids"])
    weights_BT = jnp.ones(tokens_BT.shape).at[:, -1].set(0.0)

    @jax.jit
    def run(params, bias):
        def loss_of(params):
            model = merge(graphdef, params, bias)
            output = model(tokens_BT, **plain(tokens_BT))
            logits_BTV = model.logits(output.hidden_BTD)
            log_BTV = jax.nn.log_softmax(logits_BTV)
            target_BT = jnp.roll(tokens_BT, -1, axis=1)
            chosen_BT = jnp.take_along_axis(log_BTV, target_BT[..., None], axis=-1)[..., 0]
            return -jnp.sum(chosen_BT * weights_BT) / weights_BT.sum(), (logits_BTV, output)

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    (loss, (logits_BTV, output)), grads = run(params, bias)
    return config, tensors, weights, params, bias, loss, logits_BTV, output, grads


def test_golden_logits_and_loss(golden):
    _, tensors, *_, loss, logits_BTV, output, _ = golden
    assert_near(output.hidden_BTD, tensors["hidden"])
    assert_near(logits_BTV, tensors["logits"])
    np.testing.assert_allclose(loss, tensors["loss"].item(), rtol=FLOAT32)


def test_golden_router_choices(golden):
    """The choice of experts, with negative biases, and the load that follows from it."""
    _, tensors, *_, output, _ = golden
    chosen = np.sort(np.asarray(output.aux.routing["moe"]), axis=-1)
    np.testing.assert_array_equal(chosen, np.sort(tensors["router/indices"], axis=-1))
    experts = output.aux.load["moe"].shape[1]
    for layer, load_E in enumerate(np.asarray(output.aux.load["moe"])):
        np.testing.assert_array_equal(
            load_E, np.bincount(chosen[layer].reshape(-1), minlength=experts)
        )


def test_golden_gradients(golden):
    """Every parameter's gradient, under its published name."""
    config, tensors, *_, grads = golden
    names = hf.to_tensors(grads, {}, config)
    wanted = {k.removeprefix("grad/"): v for k, v in tensors.items() if k.startswith("grad/")}
    assert set(names) == set(wanted)
    for name, gradient in names.items():
        assert distance(gradient, wanted[name]) <= FLOAT32_GRADIENT, name


def test_published_names_round_trip(golden):
    config, _, weights, params, bias, *_ = golden
    back = hf.to_tensors(params, bias, config)
    assert set(back) == set(weights)
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, weights[name])


def test_golden_greedy_continuation():
    """Prefill and cached decode give the tokens that transformers' full forwards gave."""
    tensors, published = golden_cases.load("deepseek_v3")
    config = golden_cases.model_config(published)
    weights = {k.removeprefix("param/"): v for k, v in tensors.items() if k.startswith("param/")}
    params, bias = jax.tree.map(jnp.asarray, hf.from_tensors(weights, config))
    from dsjax.infer.generate import generate
    from dsjax.infer.sampler import Sampling

    result = generate(
        blueprint(config),
        params,
        bias,
        tensors["input_ids"].tolist(),
        max_tokens=8,
        sampling=Sampling(),
        allowed=config.vocab_size,
        seed=0,
    )
    np.testing.assert_array_equal(result.tokens_BG, tensors["continuation"])


# ---- the NumPy oracle ---------------------------------------------------------------------------


def reference_params(config, params, bias):
    """Our parameters in the oracle's layout."""
    arrays = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    bias = jax.tree.map(lambda x: np.asarray(x, np.float64), bias)
    layers = []
    for stack in config.stacks:
        for i in range(stack.repeats):
            for j in range(len(stack.blocks)):
                layer = jax.tree.map(lambda x, i=i: x[i], arrays["stacks"][stack.name][j])
                if stack.key(j) in bias:
                    layer["ffn"]["bias_E"] = bias[stack.key(j)][i]
                layers.append(layer)
    mtp = []
    for k, module in arrays.get("mtp_modules", {}).items():
        if "mtp" in bias:
            module["block"]["ffn"]["bias_E"] = bias["mtp"][k]
        mtp.append(module)
    names = ("embed_VD", "final_norm_D", "head_DV")
    return {**{n: arrays[n] for n in names}, "layers": layers, "mtp": mtp}


@pytest.fixture(scope="module")
def deep():
    """nano with two MTP depths and awkward biases, a packed batch, and the oracle's answer."""
    config = preset("nano")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, mtp=dataclasses.replace(config.model.mtp, depth=2)),
    )
    model = make(config.model)
    graphdef, params, bias = split(model)
    # Larger weights, so that routing is decided; biases of both signs.
    params = jax.tree.map(lambda w: w * 3.0 if w.ndim > 1 else w, params)
    keys = jax.random.split(jax.random.key(1), len(bias))
    bias = {
        name: 0.2 * jax.random.normal(key, b.shape) - 0.3
        for key, (name, b) in zip(keys, bias.items(), strict=True)
    }
    batch = packed_batch(
        np.random.default_rng(5), config.model.vocab_size, [(20, 3, 9), (30,), (1, 1, 2)]
    )
    return config, graphdef, params, bias, batch


def reference_run(config, params, bias, batch):
    block = config.model.stacks[-1].blocks[0]
    shapes = reference_params(config.model, params, bias)
    settings = {
        "attention": block.attention,
        "moe": block.ffn,
        "norm_eps": config.model.norm_eps,
    }
    output = reference.forward(
        shapes,
        batch["tokens_BT"],
        positions_BT=batch["positions_BT"],
        segments_BT=batch["segments_BT"],
        **settings,
    )
    losses = reference.losses(
        shapes,
        output,
        batch["targets_BT"],
        batch["weights_BT"],
        mtp_weight=0.3,
        balance_weights=(
            config.train.balance_loss_weight,
            config.train.device_balance_loss_weight,
            config.train.communication_balance_loss_weight,
        ),
    )
    return output, losses


def test_packed_model_against_the_oracle(deep):
    """Hidden states, loads, MTP of two depths, balance and total loss on packed rows."""
    config, graphdef, params, bias, batch = deep
    wanted, losses = reference_run(config, params, bias, batch)
    model = merge(graphdef, params, bias)
    output = jax.jit(
        lambda batch: model(
            batch["tokens_BT"],
            positions_BT=batch["positions_BT"],
            segments_BT=batch["segments_BT"],
        )
    )(jax.tree.map(jnp.asarray, batch))
    real = batch["segments_BT"] != 0
    assert_near(np.asarray(output.hidden_BTD)[real], wanted.hidden_BTD[real])
    loads = [aux["load_E"] if isinstance(aux, dict) else aux.load_E for aux in wanted.aux if aux]
    np.testing.assert_array_equal(output.aux.load["moe"], np.stack(loads))

    loss = PretrainLoss.of(config)
    totals = loss.totals(batch, 0.0)
    total, aux = jax.jit(lambda: loss(model, jax.tree.map(jnp.asarray, batch), totals))()
    np.testing.assert_allclose(aux.metrics["loss"], losses.main, rtol=FLOAT32)
    np.testing.assert_allclose(totals.mtp_scale * aux.metrics["loss_mtp"], losses.mtp, rtol=FLOAT32)
    np.testing.assert_allclose(
        config.train.balance_loss_weight * aux.metrics["loss_balance"], losses.balance[0], rtol=1e-4
    )
    np.testing.assert_allclose(total, losses.total, rtol=FLOAT32)
    assert set(aux.metrics) == {"loss", "loss_mtp", "loss_balance", "loss_total"}
    assert aux.load["mtp"].shape == (2, 8)
    assert float(aux.metrics["loss_mtp"]) > 0


def v2_config():
    """nano with V2's router and V2's three balance losses; one MTP depth, as nano has."""
    config, v2 = preset("nano"), preset("deepseek_v2")
    routed = v2.model.stacks[-1].blocks[0].ffn
    names = ("score", "group_score", "normalize_gates", "balance_bias", "balance_counts")
    router = {name: getattr(routed, name) for name in names}

    def like_v2(block):
        return dataclasses.replace(block, ffn=dataclasses.replace(block.ffn, **router))

    dense, moe = config.model.stacks
    moe = dataclasses.replace(moe, blocks=tuple(map(like_v2, moe.blocks)))
    mtp = dataclasses.replace(config.model.mtp, block=like_v2(config.model.mtp.block))
    losses = ("balance_loss_weight", "device_balance_loss_weight")
    losses = (*losses, "communication_balance_loss_weight")
    train = {name: getattr(v2.train, name) for name in losses}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, stacks=(dense, moe), mtp=mtp),
        train=dataclasses.replace(config.train, **train),
    )


def test_packed_v2_losses_against_the_oracle():
    """The three balance losses of a whole model, the metrics they give, and what they add."""
    config = v2_config()
    params = jax.tree.map(lambda w: w * 3.0 if w.ndim > 1 else w, split(make(config.model))[1])
    graphdef = blueprint(config.model)
    batch = packed_batch(
        np.random.default_rng(5), config.model.vocab_size, [(20, 3, 9), (30,), (1, 1, 2)]
    )
    _, losses = reference_run(config, params, {}, batch)
    loss = PretrainLoss.of(config)
    totals = loss.totals(batch, 0.0)
    total, aux = jax.jit(
        lambda params: loss(merge(graphdef, params, {}), jax.tree.map(jnp.asarray, batch), totals)
    )(params)
    names = ("loss_balance", "loss_balance_device", "loss_balance_communication")
    assert set(aux.metrics) == {"loss", "loss_mtp", "loss_total", *names}
    alphas = (0.003, 0.05, 0.02)
    for name, alpha, wanted in zip(names, alphas, losses.balance, strict=True):
        np.testing.assert_allclose(alpha * aux.metrics[name], wanted, rtol=FLOAT32, err_msg=name)
    np.testing.assert_allclose(total, losses.total, rtol=FLOAT32)


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.nightly), "full"])
def test_a_balance_without_weight_costs_nothing(remat):
    """What no loss weighs is gone from the compiled step, the scan over layers included."""
    config = v2_config()
    graphdef, params, _ = split(jax.eval_shape(lambda: make(config.model, remat)))
    batch = packed_batch(np.random.default_rng(5), config.model.vocab_size, [(8,)])
    totals = PretrainLoss.of(config).totals(batch, 0.0)

    def compiled(**weights):
        loss = dataclasses.replace(PretrainLoss.of(config), **weights)
        of = jax.grad(lambda params, batch: loss(merge(graphdef, params, {}), batch, totals)[0])
        return jax.jit(of).lower(params, batch).compile().as_text()

    assert "balance/groups" in compiled()
    text = compiled(device_balance_weight=0.0, communication_balance_weight=0.0)
    assert "balance/groups" not in text
    assert "balance/" in text


@pytest.mark.parametrize("depth", [0, 1])
def test_mtp_sees_no_other_document(deep, depth):
    _, _, _, _, batch = deep
    wanted = reference_mtp.depth_segments(batch["segments_BT"], depth + 1)
    np.testing.assert_array_equal(depth_segments(jnp.asarray(batch["segments_BT"]), depth), wanted)


# ---- one forward in many forms ------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano_rows():
    config = preset("nano").model
    graphdef, params, bias = split(make(config))
    params = jax.tree.map(lambda w: w * 3.0 if w.ndim > 1 else w, params)
    bias = jax.tree.map(lambda b: b - 0.1 * jax.random.uniform(jax.random.key(2), b.shape), bias)
    tokens_BT = jax.random.randint(jax.random.key(3), (2, 150), 0, config.vocab_size)
    hidden_BTD = jax.jit(lambda m: m(tokens_BT, **plain(tokens_BT)).hidden_BTD)(
        merge(graphdef, params, bias)
    )
    return config, graphdef, params, bias, tokens_BT, hidden_BTD


@pytest.mark.parametrize(
    "chunks",
    [
        (64, 64, 22),
        (100, 1, 1, 48),
        *(pytest.param(c, marks=pytest.mark.nightly) for c in ((150,), (149, 1), (3, 147))),
    ],
)
def test_cached_equals_whole(nano_rows, chunks):
    """Prefill in any pieces, then decode: the absorbed form over pages in a shuffled order."""
    config, graphdef, params, bias, tokens_BT, hidden_BTD = nano_rows
    model = merge(graphdef, params, bias)
    table_BX = contiguous_table(2, 150)
    table_BX = jax.random.permutation(jax.random.key(4), table_BX.reshape(-1)).reshape(2, -1)
    entries = empty_entries(config, table_BX.size, jnp.float32)

    @jax.jit
    def piece(tokens, entries, cached):
        new_B = jnp.full((2,), tokens.shape[1], jnp.int32)
        pages, positions_BT = advance(table_BX, cached, new_B, tokens.shape[1])
        output = model(
            tokens,
            positions_BT=positions_BT,
            segments_BT=jnp.ones_like(tokens),
            cache=Cache(entries, pages),
        )
        return output.hidden_BTD, output.cache.entries

    start, pieces = 0, []
    for width in chunks:
        cached = jnp.full((2,), start, jnp.int32)
        hidden, entries = piece(tokens_BT[:, start : start + width], entries, cached)
        pieces.append(hidden)
        start += width
    assert_near(jnp.concatenate(pieces, axis=1), hidden_BTD)


def test_fresh_prefill_equals_absorbed(nano_rows):
    config, graphdef, params, bias, tokens_BT, hidden_BTD = nano_rows
    table_BX = contiguous_table(2, 150)
    new_B = jnp.array([150, 97], jnp.int32)
    pages, positions_BT = advance(table_BX, jnp.zeros_like(new_B), new_B, 150)
    assert table_BX.shape == (2, -(-150 // PAGE_SIZE))

    @jax.jit
    def run(fresh):
        del fresh
        model = merge(graphdef, params, bias)
        cache = Cache(empty_entries(config, table_BX.size, jnp.float32), pages, fresh=True)
        segments_BT = (positions_BT >= 0).astype(jnp.int32)
        return model(tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT, cache=cache)

    output = run(True)
    assert_near(output.hidden_BTD[0], hidden_BTD[0])
    assert_near(output.hidden_BTD[1, :97], hidden_BTD[1, :97])
    # the short row wrote nothing past its length
    pages_of_row = np.asarray(output.cache.entries["moe"])[0, np.asarray(table_BX[1])]
    written = np.abs(pages_of_row.reshape(-1, pages_of_row.shape[-1])).sum(axis=-1) > 0
    np.testing.assert_array_equal(written, np.arange(written.size) < 97)


@pytest.mark.parametrize("remat", ["dots", pytest.param("full", marks=pytest.mark.nightly)])
def test_remat_changes_nothing(nano_rows, remat):
    """Same loss, same gradients, and loads that are counted once."""
    config, graphdef, params, bias, tokens_BT, _ = nano_rows

    def run(graphdef):
        @jax.jit
        def of(params):
            output = merge(graphdef, params, bias)(tokens_BT, **plain(tokens_BT))
            return jnp.sum(jnp.sin(output.hidden_BTD)), output.aux.load

        return jax.value_and_grad(of, has_aux=True)(params)

    (value, load), grads = run(graphdef)
    (value_remat, load_remat), grads_remat = run(blueprint(config, remat))
    np.testing.assert_allclose(value_remat, value, rtol=FLOAT32)
    chex.assert_trees_all_equal(load_remat, load)
    assert all(int(x) == 2 * 150 * 2 for x in load["moe"].sum(axis=1))
    assert_trees_near(grads_remat, grads, FLOAT32_GRADIENT)


def test_scan_equals_loop(nano_rows):
    """Two stacks of one repeat are the stack of two repeats."""
    config, _, params, bias, tokens_BT, hidden_BTD = nano_rows
    dense, moe = config.stacks
    stacks = [dense] + [dataclasses.replace(moe, name=f"moe{i}", repeats=1) for i in range(2)]
    unrolled = dataclasses.replace(config, stacks=tuple(stacks))
    split_stacks = {"dense": params["stacks"]["dense"]}
    split_bias = {"mtp": bias["mtp"]}
    for i in range(2):
        layer = jax.tree.map(lambda x, i=i: x[i : i + 1], params["stacks"]["moe"])
        split_stacks[f"moe{i}"] = layer
        split_bias[f"moe{i}"] = bias["moe"][i : i + 1]
    model = merge(blueprint(unrolled), {**params, "stacks": split_stacks}, split_bias)
    assert_near(jax.jit(lambda m: m(tokens_BT, **plain(tokens_BT)).hidden_BTD)(model), hidden_BTD)


def test_pattern_of_blocks_runs_in_order(nano_rows):
    """A stack whose pattern is (dense, experts) repeats the pair; its cache has a name a block."""
    config, *_, tokens_BT, _ = nano_rows
    dense, moe = config.stacks
    pair = dataclasses.replace(moe, name="pair", blocks=(dense.blocks[0], moe.blocks[0]))
    paired = dataclasses.replace(config, stacks=(pair,), mtp=None)
    graphdef, params, bias = split(make(paired))
    # The same four layers as stacks of one each.
    single, layers, biases = [], {}, {}
    for i in range(2):
        for j, block in enumerate(pair.blocks):
            name = f"layer{i}{j}"
            single.append(dataclasses.replace(dense, name=name, blocks=(block,)))
            layers[name] = {
                0: jax.tree.map(lambda x, i=i: x[i : i + 1], params["stacks"]["pair"][j])
            }
            if j == 1:
                biases[name] = bias["pair_1"][i : i + 1]
    flat = dataclasses.replace(paired, stacks=tuple(single))

    @jax.jit
    def hidden(model):
        return model(tokens_BT, **plain(tokens_BT)).hidden_BTD

    wanted = hidden(merge(graphdef, params, bias))
    got = hidden(merge(blueprint(flat), {**params, "stacks": layers}, biases))
    assert_near(got, wanted)
    assert set(empty_entries(paired, 3, jnp.float32)) == {"pair_0", "pair_1"}


def test_packed_equals_unpacked(nano_rows):
    _, graphdef, params, bias, tokens_BT, _ = nano_rows
    lengths = (40, 1, 70, 39)
    segments, positions = [], []
    for number, length in enumerate(lengths, 1):
        segments += [number] * length
        positions += range(length)
    packing = {
        "positions_BT": jnp.array([positions] * 2),
        "segments_BT": jnp.array([segments] * 2),
    }
    model = merge(graphdef, params, bias)
    packed = jax.jit(lambda: model(tokens_BT, **packing).hidden_BTD)()
    alone = jax.jit(lambda tokens: model(tokens, **plain(tokens)).hidden_BTD)
    start = 0
    for length in lengths:
        here = slice(start, start + length)
        assert_near(packed[:, here], alone(tokens_BT[:, here]))
        start += length


def test_routing_replays(nano_rows):
    """Choices of another pass are followed; gates are the current router's."""
    _, graphdef, params, bias, tokens_BT, hidden_BTD = nano_rows
    run = jax.jit(lambda m, routing: m(tokens_BT, **plain(tokens_BT), routing=routing))
    model = merge(graphdef, params, bias)
    routing = run(model, None).aux.routing
    other_bias = jax.tree.map(lambda b: -b[:, ::-1], bias)
    other = merge(graphdef, params, other_bias)
    assert distance(run(other, None).hidden_BTD, hidden_BTD) > 1e-3
    replayed = run(other, routing)
    assert_near(replayed.hidden_BTD, hidden_BTD)
    chex.assert_trees_all_equal(replayed.aux.routing, routing)


def test_cache_is_the_latent_and_nothing_else():
    """Cache bytes a token = (C + R) * layers * item size, whatever the number of heads."""
    for name in ("nano", "tiny", "deepseek_v3"):
        config = preset(name).model
        entries = jax.eval_shape(lambda c=config: empty_entries(c, 1, jnp.bfloat16))
        total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(entries)) / PAGE_SIZE
        attention = config.stacks[0].blocks[0].attention
        assert total == (attention.kv_latent_dim + attention.rope_dim) * config.num_layers * 2


# ---- the router and the traps -------------------------------------------------------------------


def moe_config(**changes):
    config = preset("nano").model.stacks[1].blocks[0].ffn
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_router_against_the_oracle(rng, score):
    config = moe_config(
        num_experts=16,
        num_experts_per_token=3,
        num_groups=4,
        groups_per_token=2,
        score=score,
        group_score="top2_sum" if score == "sigmoid" else "max",
        normalize_gates=score == "sigmoid",
    )
    logits_UE = rng.standard_normal((200, 16)).astype(np.float32)
    bias_E = (rng.standard_normal(16) - 1.0).astype(np.float32)
    sizes = {"num_groups": 4, "groups_per_token": 2, "experts_per_token": 3, "scale": 2.5}
    if score == "sigmoid":
        wanted = reference_router.route_v3(logits_UE, bias_E, **sizes)
    else:
        wanted, bias_E = reference_router.route_v2(logits_UE, **sizes), None
    scores_UE = router.affinities(jnp.asarray(logits_UE), config)
    bias = None if bias_E is None else jnp.asarray(bias_E)
    expert_UK = router.select(scores_UE, bias, config)
    np.testing.assert_array_equal(expert_UK, wanted[1])
    assert_near(router.gates(scores_UE, expert_UK, config), wanted[0])


def test_no_expert_outside_the_kept_groups():
    """With biases so negative that a mask of 0 would win."""
    config = moe_config()
    scores_UE = jax.nn.sigmoid(jax.random.normal(jax.random.key(0), (500, 8)))
    bias_E = jnp.full((8,), -5.0)
    expert_UK = np.asarray(router.select(scores_UE, bias_E, config))
    best = np.asarray(scores_UE).reshape(500, 4, 2).sum(-1)
    kept = np.argsort(-best, axis=-1)[:, :2]
    for token in range(500):
        assert set(expert_UK[token] // 2) <= set(kept[token])


def test_gates_do_not_see_the_bias():
    config = moe_config()
    scores_UE = jax.nn.sigmoid(jax.random.normal(jax.random.key(0), (50, 8)))
    expert_UK = router.select(scores_UE, jnp.linspace(-1, 1, 8), config)
    gates_UK = router.gates(scores_UE, expert_UK, config)
    chosen = np.take_along_axis(np.asarray(scores_UE), np.asarray(expert_UK), axis=1)
    assert_near(gates_UK, chosen / chosen.sum(1, keepdims=True) * 2.5)
    np.testing.assert_allclose(gates_UK.sum(axis=1), 2.5, rtol=1e-6)


def test_bias_gets_no_gradient(nano_rows):
    _, graphdef, params, bias, tokens_BT, _ = nano_rows

    @jax.jit
    @jax.grad
    def gradient(bias):
        output = merge(graphdef, params, bias)(tokens_BT, **plain(tokens_BT))
        return jnp.sum(output.hidden_BTD) + sum(b.expert.sum() for b in output.aux.balance.values())

    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient(bias)))


def test_balance_loss_is_one_for_an_even_router_and_skips_padding(rng):
    """Each of the three; K experts, of at most M groups a token."""
    config = moe_config(
        num_experts=4,
        num_experts_per_token=2,
        num_groups=2,
        groups_per_token=1,
        balance_counts="selected",
    )
    even = np.tile([[0.9, 0.8, 0.1, 0.1], [0.1, 0.1, 0.9, 0.8]], (1, 5, 1)).astype(np.float32)
    chosen = np.tile([[0, 1], [2, 3]], (1, 5, 1)).astype(np.int32)
    real = np.ones((1, 10), bool)
    for counts in ("selected", "best_scores"):
        config = dataclasses.replace(config, balance_counts=counts)
        np.testing.assert_allclose(
            router.balance_loss(jnp.asarray(even), jnp.asarray(chosen), jnp.asarray(real), config),
            np.ones((3, 1)),
            rtol=1e-6,
        )
        garbage = np.concatenate([even, rng.random((1, 7, 4)).astype(np.float32)], axis=1)
        anything = np.concatenate([chosen, np.zeros((1, 7, 2), np.int32)], axis=1)
        padded = np.concatenate([real, np.zeros((1, 7), bool)], axis=1)
        again = router.balance_loss(
            jnp.asarray(garbage), jnp.asarray(anything), jnp.asarray(padded), config
        )
        np.testing.assert_allclose(again, np.ones((3, 1)), rtol=1e-6)
        empty = router.balance_loss(
            jnp.asarray(even), jnp.asarray(chosen), jnp.asarray(~real), config
        )
        np.testing.assert_array_equal(empty, np.zeros((3, 1)))


def balance_case(rng, score, counts):
    """A router, logits of three packed rows of 12 (padding in each, one all padding), biases."""
    config = moe_config(
        num_groups=4,
        groups_per_token=2,
        num_experts_per_token=3,
        score=score,
        group_score="top2_sum" if score == "sigmoid" else "max",
        normalize_gates=score == "sigmoid",
        balance_counts=counts,
    )
    logits_BTE = rng.standard_normal((3, 12, 8))
    segments_BT = np.zeros((3, 12), np.int32)
    segments_BT[0, :10], segments_BT[1, :7], segments_BT[0, 4:10] = 1, 1, 2
    bias_E = jnp.asarray(rng.standard_normal(8), jnp.float32) if score == "sigmoid" else None
    return config, logits_BTE, segments_BT, bias_E


@pytest.mark.parametrize("counts", ["best_scores", "selected"])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_balance_loss_against_the_oracle(rng, score, counts):
    """All three, value and gradient; where f is held, so that the gradient is P's alone."""
    config, logits_BTE, segments_BT, bias_E = balance_case(rng, score, counts)
    sizes = {"num_groups": 4, "groups_per_token": 2, "experts_per_token": 3, "scale": 2.5}
    flat_UE = logits_BTE.reshape(-1, 8)
    if score == "sigmoid":
        _, expert_UK, scores_UE = reference_router.route_v3(flat_UE, bias_E, **sizes)
    else:
        _, expert_UK, scores_UE = reference_router.route_v2(flat_UE, **sizes)
    counted_UK = expert_UK
    if counts == "best_scores":
        counted_UK = np.array([reference_router.top_k(s_E, 3) for s_E in scores_UE])
        assert (np.sort(counted_UK) != np.sort(expert_UK)).any()  # the two modes differ
    counted_BTK = counted_UK.reshape(3, 12, 3)

    def oracle(logits_BTE):
        scores_BTE = 1 / (1 + np.exp(-logits_BTE)) if score == "sigmoid" else np.exp(logits_BTE)
        share_BTE = scores_BTE / scores_BTE.sum(axis=-1, keepdims=True)
        told = reference_router.v2_balance_losses(
            share_BTE, counted_BTK, segments_BT, num_groups=4, groups_per_token=2
        )
        return np.array([told.expert, told.device, told.communication])

    def ours(logits_BTE):
        scores_BTE = router.affinities(logits_BTE, config)
        expert_UK = router.select(scores_BTE.reshape(-1, 8), bias_E, config)
        balance = router.balance_loss(
            scores_BTE, expert_UK.reshape(3, 12, 3), jnp.asarray(segments_BT != 0), config
        )
        return jnp.stack([rows_B.sum() for rows_B in balance]) / 2  # rows that hold a token

    logits = jnp.asarray(logits_BTE, jnp.float32)
    np.testing.assert_allclose(ours(logits), oracle(logits_BTE), rtol=1e-5)
    got = jax.jit(jax.jacrev(ours))(logits)
    step, wanted = 1e-5, np.zeros((3, *logits_BTE.shape))
    for place in np.ndindex(logits_BTE.shape):
        nudge = np.zeros_like(logits_BTE)
        nudge[place] = step
        slope = (oracle(logits_BTE + nudge) - oracle(logits_BTE - nudge)) / (2 * step)
        wanted[(slice(None), *place)] = slope
    for level in range(3):
        assert_near(got[level], wanted[level])
    assert not np.asarray(got)[:, segments_BT == 0].any()


def test_bias_moves_against_the_load():
    bias_LE = jnp.zeros((2, 4))
    load_LE = jnp.array([[10, 0, 3, 3], [4, 4, 4, 4]], jnp.int32)
    moved = router.update_bias(bias_LE, load_LE, 1e-3)
    for row in range(2):
        wanted = reference_router.update_bias(np.zeros(4), np.asarray(load_LE[row]), 1e-3)
        np.testing.assert_allclose(moved[row], wanted, atol=1e-9)


def test_one_expert_takes_all_and_some_take_none():
    """Finite gradients and a bias that pushes back, where one expert gets every token."""
    config = preset("nano")
    graphdef, params, bias = split(make(config.model))
    bias = jax.tree.map(lambda b: b.at[:, 3].set(100.0), bias)
    tokens_BT = jnp.arange(40).reshape(2, 20)

    @jax.jit
    def run(params):
        def of(params):
            output = merge(graphdef, params, bias)(tokens_BT, **plain(tokens_BT))
            return jnp.sum(output.hidden_BTD), output.aux.load

        return jax.value_and_grad(of, has_aux=True)(params)

    (_, load), grads = run(params)
    chex.assert_tree_all_finite(grads)
    np.testing.assert_array_equal(load["moe"][:, 3], 40)
    assert (np.asarray(router.update_bias(bias["moe"], load["moe"], 1e-3))[:, 3] < 100.0).all()


def test_padding_reaches_no_expert(nano_rows):
    _, graphdef, params, bias, tokens_BT, _ = nano_rows
    segments_BT = jnp.ones_like(tokens_BT).at[1, 50:].set(0)
    positions_BT = plain(tokens_BT)["positions_BT"]
    output = jax.jit(lambda m: m(tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT))(
        merge(graphdef, params, bias)
    )
    assert all(int(total) == 200 * 2 for total in output.aux.load["moe"].sum(axis=1))
    chex.assert_tree_all_finite(output.hidden_BTD)


def test_dense_mtp_block_and_no_router():
    """A model without any expert has no load and no bias, and its MTP still works."""
    config = preset("nano").model
    dense = BlockConfig(
        attention=config.stacks[0].blocks[0].attention, ffn=SwiGluConfig(hidden_dim=16)
    )
    config = dataclasses.replace(
        config, stacks=config.stacks[:1], mtp=MtpConfig(depth=1, block=dense)
    )
    model = make(config)
    tokens_BT = jnp.arange(10).reshape(1, 10)
    output = model(tokens_BT, **plain(tokens_BT))
    hidden_BTD, aux = model.mtp(0, output.hidden_BTD, tokens_BT, **plain(tokens_BT))
    assert hidden_BTD.shape == output.hidden_BTD.shape
    assert output.aux.load == {} == aux.load
    assert split(model)[2] == {}


def test_build_follows_the_configuration():
    model = merge(*split(jax.eval_shape(build(preset("small")), jax.random.key(0))))
    assert model.remat == "dots"
    assert model.precision.compute_dtype == jnp.bfloat16
