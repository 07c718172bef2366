"""Dense students: grouped-query attention, tied embeddings, Llama 3's and linear rope.

Against the NumPy oracle, against themselves in other forms, and beside latent attention in one
model.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import (
    BlockConfig,
    GqaConfig,
    Llama3RopeConfig,
    MlaConfig,
    MoeConfig,
    MtpConfig,
    RopeConfig,
    StackConfig,
    SwiGluConfig,
)
from dsjax.infer.generate import decode, generate
from dsjax.infer.sampler import Sampling
from dsjax.model import rope
from dsjax.model.cache import (
    PAGE_SIZE,
    Cache,
    KeysValues,
    advance,
    contiguous_table,
    empty_entries,
)
from dsjax.model.transformer import build, merge, split
from dsjax.plan.count import cache_bytes_per_token
from dsjax.presets import preset
from dsjax.train.flops import train_flops_per_token
from dsjax.train.loss import PretrainLoss
from dsjax.train.optimizer import adamw, decays
from dsjax.train.state import fresh_state
from dsjax.train.step import make_train_step
from tests.helpers import (
    FLOAT32,
    FLOAT32_GRADIENT,
    assert_near,
    assert_trees_near,
    distance,
    packed_batch,
)
from tests.reference import block as reference_block
from tests.reference import layers, mtp
from tests.reference import rope as reference_rope
from tests.reference import transformer as reference

LLAMA3 = Llama3RopeConfig(factor=8.0, original_max_positions=64)


def mixed():
    """Latent and grouped-query attention in turn, with experts, MTP and a tied embedding.

    Two of its three ropes differ in their width alone.
    """
    config = preset("nano")
    mla, experts = config.model.stacks[1].blocks[0].attention, config.model.stacks[1].blocks[0].ffn
    gqa = GqaConfig(num_heads=6, num_kv_heads=2, head_dim=12, rope=mla.rope, out_bias=True)
    llama = GqaConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=RopeConfig(llama3=LLAMA3))
    dense = SwiGluConfig(hidden_dim=40)
    pair = (BlockConfig(attention=mla, ffn=experts), BlockConfig(attention=gqa, ffn=dense))
    model = dataclasses.replace(
        config.model,
        stacks=(
            StackConfig(name="pair", repeats=2, blocks=pair),
            StackConfig(
                name="last", repeats=1, blocks=(BlockConfig(attention=llama, ffn=experts),)
            ),
        ),
        mtp=MtpConfig(depth=1, block=BlockConfig(attention=gqa, ffn=experts)),
        tie_embeddings=True,
    )
    return dataclasses.replace(config, model=model)


def with_remat(config, remat):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, remat=remat))


def blueprint(config):
    return split(jax.eval_shape(build(config), jax.random.key(0)))[0]


def packed(seed, lengths):
    batch = packed_batch(np.random.default_rng(seed), 512, lengths)
    return jax.tree.map(jnp.asarray, batch)


def plain(tokens_BT):
    """Positions and segments of unpacked rows."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return {"positions_BT": positions_BT, "segments_BT": jnp.ones_like(tokens_BT)}


STUDENTS = {"dense": lambda: preset("nano_dense"), "mixed": mixed}
# What both rooms do in the same way is asked of one: `mixed` takes long to compile.
dense_alone = pytest.mark.parametrize("student", ["dense"], indirect=True)


@pytest.fixture(scope="module", params=STUDENTS)
def student(request):
    """A configuration, its parts with larger weights and biases that are not zero, and rows."""
    config = STUDENTS[request.param]()
    graphdef, params, bias = split(jax.jit(build(config))(jax.random.key(0)))

    def awkward(path, w):
        name = jax.tree_util.keystr(path)
        if "'b_" in name:
            return 0.3 * jax.random.normal(jax.random.key(len(name)), w.shape)
        return w if "norm" in name or "embed" in name else 3.0 * w

    params = jax.tree_util.tree_map_with_path(awkward, params)
    bias = jax.tree.map(lambda b: b - 0.1 * jax.random.uniform(jax.random.key(2), b.shape), bias)
    tokens_BT = jax.random.randint(jax.random.key(3), (2, 150), 0, config.model.vocab_size)
    hidden_BTD = jax.jit(lambda m: m(tokens_BT, **plain(tokens_BT)).hidden_BTD)(
        merge(graphdef, params, bias)
    )
    return SimpleNamespace(
        config=config,
        graphdef=graphdef,
        params=params,
        bias=bias,
        tokens_BT=tokens_BT,
        hidden_BTD=hidden_BTD,
    )


# ---- the oracle ---------------------------------------------------------------------------------


def oracle(config, params, bias, batch):
    """The oracle's hidden states and losses; each block with settings of its own."""
    model = config.model
    params, bias = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, bias))
    batch = {name: np.asarray(value) for name, value in batch.items()}
    where = {name: batch[name] for name in ("segments_BT", "positions_BT")}

    def settings(block):
        moe = block.ffn if isinstance(block.ffn, MoeConfig) else None
        return {"attention": block.attention, "moe": moe, "norm_eps": model.norm_eps, **where}

    def biased(weights, key, layer):
        if key in bias:
            weights["ffn"]["bias_E"] = bias[key][layer]
        return weights

    x_BTD, aux = params["embed_VD"][batch["tokens_BT"]], []
    for stack in model.stacks:
        for i in range(stack.repeats):
            for j, block in enumerate(stack.blocks):
                weights = jax.tree.map(lambda x, i=i: x[i], params["stacks"][stack.name][j])
                weights = biased(weights, stack.key(j), i)
                x_BTD, told = reference_block.block(x_BTD, weights, **settings(block))
                aux.append(told)
    hidden_BTD = layers.rms_norm(x_BTD, params["final_norm_D"], model.norm_eps)
    depths = []
    for k, module in params.get("mtp_modules", {}).items():
        depths.append(module | {"block": biased(module["block"], "mtp", k)})
    told = []
    if depths:
        told = mtp.mtp_forward(
            hidden_BTD,
            batch["tokens_BT"],
            depths,
            params["embed_VD"],
            **settings(model.mtp.block),
        )
    output = SimpleNamespace(logits_BTV=hidden_BTD @ reference.head(params), aux=aux, mtp=told)
    losses = reference.losses(
        {name: leaf for name, leaf in params.items() if name in ("embed_VD", "head_DV")},
        output,
        batch["targets_BT"],
        batch["weights_BT"],
        mtp_weight=0.3,
        balance_weights=(config.train.balance_loss_weight, 0.0, 0.0),
    )
    return hidden_BTD, losses


def test_packed_student_against_the_oracle(student):
    """Hidden states and every loss; the head of both predictions is the embedding."""
    config = student.config
    batch = packed(5, [(9, 3, 5), (14,)])
    hidden_BTD, losses = oracle(config, student.params, student.bias, batch)
    model = merge(student.graphdef, student.params, student.bias)
    loss = PretrainLoss.of(config)
    totals = loss.totals(batch, 0.0)

    @jax.jit
    def run(batch):
        where = {name: batch[name] for name in ("segments_BT", "positions_BT")}
        return model(batch["tokens_BT"], **where).hidden_BTD, loss(model, batch, totals)

    got_BTD, (total, aux) = run(batch)
    real = np.asarray(batch["segments_BT"] != 0)
    assert_near(np.asarray(got_BTD)[real], hidden_BTD[real])
    np.testing.assert_allclose(aux.metrics["loss"], losses.main, rtol=FLOAT32)
    np.testing.assert_allclose(total, losses.total, rtol=FLOAT32)
    if config.model.mtp is not None:
        got = totals.mtp_scale * aux.metrics["loss_mtp"]
        np.testing.assert_allclose(got, losses.mtp, rtol=FLOAT32)


def test_gradients_are_the_oracles_slopes():
    """Along a random direction of each parameter, biases and the tied embedding among them."""
    config = preset("nano_dense")
    graphdef, params, _ = split(jax.jit(build(config))(jax.random.key(1)))
    batch = packed(6, [(6, 2)])
    loss = PretrainLoss.of(config)
    totals = loss.totals(batch, 0.0)
    of = jax.jit(jax.grad(lambda params: loss(merge(graphdef, params, {}), batch, totals)[0]))
    rng = np.random.default_rng(7)
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: np.asarray(x, np.float64), params))
    for i, gradient in enumerate(jax.tree.leaves(of(params))):
        way, slope = rng.standard_normal(leaves[i].shape), []
        for step in (-1e-4, 1e-4):
            moved = [*leaves[:i], leaves[i] + step * way, *leaves[i + 1 :]]
            _, losses = oracle(config, jax.tree.unflatten(tree, moved), {}, batch)
            slope.append(losses.total / 2e-4)
        got, wanted = np.vdot(np.asarray(gradient, np.float64), way), slope[1] - slope[0]
        scale = np.linalg.norm(gradient) * np.linalg.norm(way)
        assert abs(got - wanted) <= 1e-4 * scale, (i, got, wanted)


# ---- one forward in many forms ------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(64, 64, 22), (100, 1, 1, 48)])
def test_cached_equals_whole(student, chunks):
    """Prefill in any pieces, then decode, over pages in a shuffled order."""
    model = merge(student.graphdef, student.params, student.bias)
    table_BX = contiguous_table(2, 150)
    table_BX = jax.random.permutation(jax.random.key(4), table_BX.reshape(-1)).reshape(2, -1)
    entries = empty_entries(student.config.model, table_BX.size, jnp.float32)

    @jax.jit
    def piece(tokens, entries, cached):
        new_B = jnp.full((2,), tokens.shape[1], jnp.int32)
        pages, positions_BT = advance(table_BX, cached, new_B, tokens.shape[1])
        segments_BT = jnp.ones_like(tokens)
        cache = Cache(entries, pages)
        output = model(tokens, positions_BT=positions_BT, segments_BT=segments_BT, cache=cache)
        return output.hidden_BTD, output.cache.entries

    start, pieces = 0, []
    for width in chunks:
        tokens_BT = student.tokens_BT[:, start : start + width]
        hidden_BTD, entries = piece(tokens_BT, entries, jnp.full((2,), start, jnp.int32))
        pieces.append(hidden_BTD)
        start += width
    assert_near(jnp.concatenate(pieces, axis=1), student.hidden_BTD)


def test_a_fresh_prefill_writes_its_own_positions(student):
    """And gives what a pass without a cache does."""
    table_BX = contiguous_table(2, 150)
    new_B = jnp.array([150, 97], jnp.int32)
    pages, positions_BT = advance(table_BX, jnp.zeros_like(new_B), new_B, 150)
    segments_BT = (positions_BT >= 0).astype(jnp.int32)
    entries = empty_entries(student.config.model, table_BX.size, jnp.float32)

    @jax.jit
    def run(model):
        cache = Cache(entries, pages, fresh=True)
        where = {"positions_BT": positions_BT, "segments_BT": segments_BT}
        return model(student.tokens_BT, **where, cache=cache)

    output = run(merge(student.graphdef, student.params, student.bias))
    assert_near(output.hidden_BTD[0], student.hidden_BTD[0])
    assert_near(output.hidden_BTD[1, :97], student.hidden_BTD[1, :97])
    for leaf in jax.tree.leaves(output.cache.entries):
        row = np.asarray(leaf)[0, np.asarray(table_BX[1])].reshape(table_BX.shape[1] * 64, -1)
        np.testing.assert_array_equal(np.abs(row).sum(-1) > 0, np.arange(len(row)) < 97)


@dense_alone
def test_packed_equals_unpacked(student):
    lengths = (40, 1, 70, 39)
    packing = {
        "positions_BT": jnp.array([np.concatenate([np.arange(n) for n in lengths])] * 2),
        "segments_BT": jnp.array([np.repeat(np.arange(1, 5), lengths)] * 2),
    }
    model = merge(student.graphdef, student.params, student.bias)
    packed = jax.jit(lambda: model(student.tokens_BT, **packing).hidden_BTD)()
    alone = jax.jit(lambda tokens: model(tokens, **plain(tokens)).hidden_BTD)
    for start, length in ((0, 40), (41, 70)):
        here = slice(start, start + length)
        assert_near(packed[:, here], alone(student.tokens_BT[:, here]))


@dense_alone
def test_remat_changes_nothing(student):
    def gradients(remat):
        graphdef = blueprint(with_remat(student.config, remat))

        def of(params):
            model, tokens_BT = merge(graphdef, params, student.bias), student.tokens_BT
            return jnp.sum(jnp.sin(model(tokens_BT, **plain(tokens_BT)).hidden_BTD))

        return jax.jit(jax.grad(of))(student.params)

    assert_trees_near(gradients("full"), gradients("none"), FLOAT32_GRADIENT)


@dense_alone
def test_generation_takes_the_best_token_of_a_full_pass(student):
    """Two prompts of unequal length; the probabilities of drawn tokens are the full pass's."""
    prompts = [[5, 6, 7, 8, 9], [11, 12]]
    result = generate(
        student.graphdef,
        student.params,
        student.bias,
        prompts,
        max_tokens=6,
        sampling=Sampling(temperature=1.0),
        allowed=student.config.model.vocab_size,
        seed=3,
    )
    model = merge(student.graphdef, student.params, student.bias)
    full = jax.jit(lambda t: jax.nn.log_softmax(model.logits(model(t, **plain(t)).hidden_BTD)))
    for row, prompt in enumerate(prompts):
        tokens = result.tokens_BG[row]
        log_TV = full(jnp.array([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
        wanted = np.take_along_axis(np.asarray(log_TV), tokens[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(result.log_probs_BG[row], wanted, atol=1e-4)


# ---- the cache ----------------------------------------------------------------------------------


def test_keys_and_values_are_cached_by_key_head():
    config = mixed().model
    entries = jax.eval_shape(lambda: empty_entries(config, 3, jnp.bfloat16))
    assert entries["pair_0"].shape == (2, 3, PAGE_SIZE, 16 + 8)
    assert entries["pair_1"].k_LXSIA.shape == (2, 3, PAGE_SIZE, 2, 12)
    assert entries["last"].v_LXSIH.shape == (1, 3, PAGE_SIZE, 1, 8)
    assert isinstance(entries["last"], KeysValues)
    numbers = 2 * (16 + 8) + 2 * (2 * 2 * 12) + 2 * 8
    assert cache_bytes_per_token(config, 2) == 2 * numbers


def test_decode_leaves_keys_and_values_in_place():
    """Temporaries of a step under a fifth of the cache, which is updated where it lies."""
    config = preset("nano_dense")
    attention = GqaConfig(num_heads=8, num_kv_heads=4, head_dim=32, qkv_bias=True)
    block = BlockConfig(attention=attention, ffn=SwiGluConfig(hidden_dim=64))
    stacks = (StackConfig(name="dense", repeats=4, blocks=(block,)),)
    model = dataclasses.replace(config.model, stacks=stacks)
    config = dataclasses.replace(config, model=model)
    graphdef, params, bias = split(jax.eval_shape(build(config), jax.random.key(0)))
    batch = 2
    table_BX = jax.eval_shape(lambda: contiguous_table(batch, 4096))
    entries = jax.eval_shape(lambda: empty_entries(model, table_BX.size, jnp.float32))
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(entries))
    assert cache_bytes == batch * 4096 * cache_bytes_per_token(model, 4)

    def step(params, bias, *arguments):
        return decode(merge(graphdef, params, bias), *arguments)

    int_B = jax.ShapeDtypeStruct((batch,), jnp.int32)
    bool_B = jax.ShapeDtypeStruct((batch,), jnp.bool_)
    lowered = jax.jit(step, donate_argnums=5).lower(
        params, bias, int_B, int_B, bool_B, entries, table_BX
    )
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 5


# ---- tied embeddings ----------------------------------------------------------------------------


def test_a_tied_embedding_gets_the_gradients_of_both_sides():
    """Equals the untied model whose head is the embedding, transposed; gradients add up."""
    tied = preset("nano_dense")
    untied = dataclasses.replace(tied, model=dataclasses.replace(tied.model, tie_embeddings=False))
    graphdef, params, _ = split(jax.jit(build(tied))(jax.random.key(0)))
    assert "head_DV" not in params
    batch = packed(5, [(20, 3, 9), (30,)])

    def run(config, graphdef, params):
        loss = PretrainLoss.of(config)
        totals = loss.totals(batch, 0.0)

        def of(params):
            model = merge(graphdef, params, {})
            return loss(model, batch, totals)[0], model.logits(jnp.ones((1, 2, 32)))

        return jax.jit(jax.value_and_grad(of, has_aux=True))(params)

    (value, logits_BTV), grads = run(tied, graphdef, params)
    apart = {**params, "head_DV": params["embed_VD"].T}
    (wanted, wanted_BTV), both = run(untied, blueprint(untied), apart)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert_near(logits_BTV, wanted_BTV)
    head_DV = both.pop("head_DV")
    for side in (both["embed_VD"], head_DV.T):
        assert distance(grads["embed_VD"], side) > 0.1
    both["embed_VD"] = both["embed_VD"] + head_DV.T
    assert_trees_near(grads, both)


# ---- training -----------------------------------------------------------------------------------


def test_the_loss_of_nano_dense_falls():
    """One batch, twelve steps of two micro-batches; biases learn, too."""
    config = with_remat(preset("nano_dense"), "dots")
    model = build(config)(jax.random.key(0))
    graphdef, params, bias = split(model)
    optimizer = adamw(config.train.optimizer, decays(model))
    loss = PretrainLoss.of(config)
    step = make_train_step(graphdef, loss, optimizer, bias_speed=config.train.bias_speed)
    state = fresh_state(config, params, bias, optimizer.init(params))
    first = jax.device_get(params)
    batch = packed_batch(np.random.default_rng(0), 512, [(40, 24), (64,), (64,), (10, 50)])
    seen = []
    for _ in range(12):
        state, metrics = step(state, batch, progress=0.3, micro_batch_size=2)
        seen.append(float(metrics["loss"]))
    assert seen[0] == pytest.approx(np.log(512), abs=0.5)
    assert seen[-1] < seen[0] - 1.0
    attention = state.params["stacks"]["dense"][0]["attention"]
    assert all(np.asarray(attention[name]).any() for name in ("b_q_NA", "b_k_IA", "b_v_IH"))
    assert distance(state.params["embed_VD"], first["embed_VD"]) > 0


def test_matrices_decay_and_biases_do_not():
    flags = decays(jax.eval_shape(build(mixed()), jax.random.key(0)))
    attention = flags["stacks"]["pair"][1]["attention"]
    assert attention["w_k_DIA"]
    assert not attention["b_o_D"]
    flags = decays(jax.eval_shape(build(preset("nano_dense")), jax.random.key(0)))
    attention = flags["stacks"]["dense"][0]["attention"]
    assert attention["w_q_DNA"]
    assert not any(decay for name, decay in attention.items() if name.startswith("b_"))


def test_the_operations_of_a_students_step_are_counted():
    """Six a weight that a token meets (the tied head is one), and half the positions' scores."""
    config = preset("nano_dense")
    parts = train_flops_per_token(config)
    assert set(parts) == {"attention", "dense_ffn", "head"}
    projections = 32 * (4 + 2 + 2) * 8 + 4 * 8 * 32
    scores = 64 / 2 * 4 * (8 + 8)
    assert parts["attention"] == 6 * 2 * (projections + scores)
    assert parts["dense_ffn"] == 6 * 2 * 3 * 32 * 96
    assert parts["head"] == 6 * 32 * 512


# ---- rope ---------------------------------------------------------------------------------------


def test_llama3s_frequencies_by_hand():
    """Eight dimensions: two pairs turn fast, one is between, one turns less than once in 1,024."""
    llama3 = Llama3RopeConfig(factor=8.0, original_max_positions=1024)
    found = rope.frequencies(8, RopeConfig(llama3=llama3))
    # 1024 * 0.01 / 2 pi = 1.6297 turns; (1.6297 - 1) / (4 - 1) = 0.20992 is kept.
    between = 0.01 * (0.20991554 + (1 - 0.20991554) / 8)
    np.testing.assert_allclose(found, [1.0, 0.1, between, 0.001 / 8], rtol=1e-7)


def test_llama3s_frequencies_are_those_of_the_published_code():
    config = preset("r1_distill_llama_8b").model.stacks[0].blocks[0].attention.rope
    settings = {"factor": 8.0, "original_max_positions": 8192}
    wanted = reference_rope.llama3_frequencies(
        128, 500_000.0, **settings, low_freq_factor=1.0, high_freq_factor=4.0
    )
    np.testing.assert_allclose(rope.frequencies(128, config), wanted, rtol=1e-12)
    plain = reference_rope.rope_frequencies(128, 500_000.0)
    assert {1.0, 0.125} < set(np.round(wanted / plain, 9))


def test_linear_interpolation_divides_every_frequency():
    found = rope.frequencies(8, RopeConfig(linear_factor=4.0))
    np.testing.assert_allclose(found, [0.25, 0.025, 0.0025, 0.00025], rtol=1e-12)
    coder = preset("deepseek_coder_6_7b").model.stacks[0].blocks[0].attention.rope
    stretched = rope.rotation(jnp.array([[4, 400]]), 128, coder)
    plain = rope.rotation(jnp.array([[1, 100]]), 128, RopeConfig(theta=coder.theta))
    assert_trees_near(stretched, plain)


def test_mla_takes_them_as_well():
    """A rope is a rope: latent attention with Llama 3's frequencies, against the oracle."""
    config = preset("nano")
    attention = dataclasses.replace(
        config.model.stacks[0].blocks[0].attention, rope=RopeConfig(llama3=LLAMA3)
    )
    assert isinstance(attention, MlaConfig)
    block = BlockConfig(attention=attention, ffn=SwiGluConfig(hidden_dim=16))
    stacks = (StackConfig(name="dense", repeats=1, blocks=(block,)),)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, stacks=stacks, mtp=None)
    )
    graphdef, params, _ = split(jax.jit(build(config))(jax.random.key(0)))
    batch = packed(5, [(12,)])
    where = {name: batch[name] for name in ("segments_BT", "positions_BT")}
    run = jax.jit(lambda: merge(graphdef, params, {})(batch["tokens_BT"], **where).hidden_BTD)
    assert_near(run(), oracle(config, params, {}, batch)[0])
