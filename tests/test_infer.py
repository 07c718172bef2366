"""Drawing tokens, and generation against full forwards."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import InferConfig
from dsjax.errors import InputError
from dsjax.infer.generate import decode, generate, prefill, prepare, run
from dsjax.infer.sampler import Sampling, row_keys, sample
from dsjax.model.cache import _write_by_page, contiguous_table, empty_entries, write
from dsjax.model.mla import MultiHeadLatentAttention
from dsjax.model.transformer import build, merge, split
from dsjax.overrides import override
from dsjax.presets import preset

# ---- the sampler --------------------------------------------------------------------------------

DRAWS = 20_000


def draws(logits_V, *, allowed=None, seed=0, **sampling):
    """Many draws from one distribution: tokens and log probabilities."""
    logits_V = jnp.asarray(logits_V, jnp.float32)
    logits_BV = jnp.broadcast_to(logits_V, (DRAWS, logits_V.size))
    return jax.device_get(
        sample(
            logits_BV,
            row_keys(jax.random.key(seed), DRAWS),
            temperature=sampling.get("temperature", 1.0),
            top_p=sampling.get("top_p", 1.0),
            allowed=logits_V.size if allowed is None else allowed,
        )
    )


def assert_drawn_from(tokens, probability_V):
    """Pearson's statistic stays within six standard deviations of its mean, whatever the seed."""
    probability_V = np.asarray(probability_V)
    counts = np.bincount(tokens, minlength=probability_V.size)
    possible = probability_V > 0
    assert counts[~possible].sum() == 0
    expected = DRAWS * probability_V[possible]
    assert expected.min() > 20
    freedom = possible.sum() - 1
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    assert statistic < freedom + 6.0 * np.sqrt(2.0 * freedom) + 1e-9


PROBABILITY = np.array([0.35, 0.05, 0.25, 0.02, 0.2, 0.13])  # no tail of 0.02 is lost


def test_greedy_takes_the_best_and_the_lowest_of_equals(rng):
    logits_BV = jnp.asarray(rng.standard_normal((50, 30)), jnp.float32)
    logits_BV = logits_BV.at[0, [4, 7]].set(9.0)
    key_B = row_keys(jax.random.key(0), 50)
    tokens, log_probs = sample(logits_BV, key_B, temperature=0.0, top_p=0.3, allowed=30)
    np.testing.assert_array_equal(tokens, np.argmax(logits_BV, axis=-1))
    assert int(tokens[0]) == 4
    np.testing.assert_array_equal(log_probs, 0.0)  # it was certain
    assert tokens.dtype == jnp.int32


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_temperature(temperature):
    wanted = PROBABILITY ** (1 / temperature)
    wanted /= wanted.sum()
    tokens, log_probs = draws(np.log(PROBABILITY) + 7.0, temperature=temperature)
    assert_drawn_from(tokens, wanted)
    np.testing.assert_allclose(log_probs, np.log(wanted)[tokens], rtol=1e-5)


def test_temperature_has_its_limits():
    """Near 0 it is greedy; very high, even."""
    tokens, log_probs = draws(np.log(PROBABILITY), temperature=1e-3)
    np.testing.assert_array_equal(tokens, 0)
    np.testing.assert_allclose(log_probs, 0.0, atol=1e-6)
    tokens, _ = draws(np.log(PROBABILITY), temperature=1e6)
    assert_drawn_from(tokens, np.full(6, 1 / 6))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-6, [0]),
        (0.34, [0]),
        (0.36, [0, 2]),
        (0.59, [0, 2]),
        (0.61, [0, 2, 4]),
        (0.92, [0, 2, 4, 5]),
        (0.979, [0, 1, 2, 4, 5]),
        (0.99, range(6)),
        (1.0, range(6)),
    ],
)
def test_top_p_keeps_the_smallest_set_and_renormalises(top_p, kept):
    wanted = np.where(np.isin(np.arange(6), list(kept)), PROBABILITY, 0.0)
    wanted /= wanted.sum()
    tokens, log_probs = draws(np.log(PROBABILITY) - 3.0, top_p=top_p)
    assert_drawn_from(tokens, wanted)
    np.testing.assert_allclose(np.exp(log_probs), wanted[tokens], rtol=1e-5)


def test_temperature_comes_before_top_p():
    """At a high temperature more tokens are needed for the same share."""
    tokens, _ = draws(np.log(PROBABILITY), temperature=5.0, top_p=0.7)
    flat = PROBABILITY**0.2 / (PROBABILITY**0.2).sum()
    kept = np.argsort(-flat)[: 1 + np.searchsorted(np.cumsum(np.sort(flat)[::-1]), 0.7)]
    assert len(kept) == 4
    wanted = np.where(np.isin(np.arange(6), kept), flat, 0.0)
    assert_drawn_from(tokens, wanted / wanted.sum())


def test_draws_reach_every_part_of_a_vocabulary_and_nothing_without_mass():
    """Parts of one size, the last one filled up; most of them empty."""
    probability = np.zeros(103)
    probability[[0, 7, 8, 50, 95, 102]] = PROBABILITY
    with np.errstate(divide="ignore"):
        tokens, log_probs = draws(np.log(probability))
    assert_drawn_from(tokens, probability)
    np.testing.assert_allclose(np.exp(log_probs), probability[tokens], rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [0.8, 1.0])
def test_ids_past_the_allowed_are_never_drawn(temperature, top_p):
    logits_V = np.array([0.0, 1.0, 2.0, 50.0, 60.0])
    tokens, log_probs = draws(logits_V, allowed=3, temperature=temperature, top_p=top_p)
    assert tokens.max() == 2
    if temperature and top_p == 1.0:
        wanted = np.exp(logits_V[:3]) / np.exp(logits_V[:3]).sum()
        assert_drawn_from(tokens, wanted)
        np.testing.assert_allclose(np.exp(log_probs), wanted[tokens], rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -0.1}, {"temperature": np.inf}, {"top_p": 0.0}, {"top_p": 1.1}],
)
def test_sampling_out_of_range_is_refused(settings):
    with pytest.raises(InputError, match="it must"):
        Sampling(**settings)


# ---- generation ---------------------------------------------------------------------------------

ALLOWED = 500  # of 512, as if a tokenizer had fewer tokens than the head has columns
LENGTHS = (1, 63, 64, 65, 100)
NEVER = (-1,)  # a stop token that no model draws, so that all calls share a program


@pytest.fixture(scope="module")
def nano():
    """`nano` without its dense layer, with weights so large that its choices are decided."""
    config = preset("nano")
    model = dataclasses.replace(config.model, stacks=config.model.stacks[1:], mtp=None)
    config = dataclasses.replace(config, model=model)
    graphdef, params, bias = split(jax.jit(build(config))(jax.random.key(0)))
    params = jax.tree.map(lambda w: w * 4.0 if w.ndim > 1 else w, params)
    bias = jax.tree.map(lambda b: b - 0.1 * jax.random.uniform(jax.random.key(2), b.shape), bias)
    return graphdef, params, bias


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(4)
    return [rng.integers(0, ALLOWED, length).tolist() for length in LENGTHS]


def speak(nano, prompts, *, max_tokens=40, stop_ids=NEVER, seed=0, infer=None, **sampling):
    return generate(
        *nano,
        prompts,
        max_tokens=max_tokens,
        sampling=Sampling(**sampling),
        stop_ids=stop_ids,
        allowed=ALLOWED,
        seed=seed,
        infer=infer,
    )


@pytest.fixture(scope="module")
def greedy(nano, prompts):
    return speak(nano, prompts)


@pytest.fixture(scope="module")
def forward(nano):
    """Log probabilities of the allowed tokens at every place of what was said, by one forward."""
    graphdef, params, bias = nano

    @jax.jit
    def log_probs(tokens_BT):
        model = merge(graphdef, params, bias)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        output = model(tokens_BT, positions_BT=positions_BT, segments_BT=jnp.ones_like(tokens_BT))
        return jax.nn.log_softmax(model.logits(output.hidden_BTD)[..., :ALLOWED])

    def of(prompts, new_BG):
        """Rows are padded on the right, which no token before sees."""
        tokens_BT = np.zeros((len(LENGTHS), 160), np.int32)
        for row, prompt, new_G in zip(tokens_BT, prompts, new_BG, strict=True):
            row[: len(prompt)] = prompt
            row[len(prompt) : len(prompt) + len(new_G)] = new_G
        log_BTV = np.asarray(log_probs(tokens_BT))
        return np.stack(
            [
                log_TV[len(prompt) - 1 : len(prompt) - 1 + new_BG.shape[1]]
                for log_TV, prompt in zip(log_BTV, prompts, strict=True)
            ]
        )

    return of


def test_greedy_is_the_argmax_of_full_forwards(greedy, prompts, forward):
    """Each new token is the best after all those before it, so all are, by induction."""
    log_BGV = forward(prompts, greedy.tokens_BG)
    np.testing.assert_array_equal(greedy.tokens_BG, log_BGV.argmax(axis=-1))
    np.testing.assert_array_equal(greedy.log_probs_BG, 0.0)
    assert len(np.unique(greedy.tokens_BG)) > 20  # it says something


def test_log_probs_are_those_of_full_forwards(nano, prompts, forward):
    result = speak(nano, prompts, temperature=1.0, seed=5)
    log_BGV = forward(prompts, result.tokens_BG)
    wanted = np.take_along_axis(log_BGV, result.tokens_BG[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(result.log_probs_BG, wanted, atol=1e-4)
    assert wanted.min() < -1.0  # not all certain
    # The temperature changes them as it says.
    result = speak(nano, prompts, temperature=2.0, seed=5)
    log_BGV = forward(prompts, result.tokens_BG) / 2.0
    log_BGV -= np.log(np.exp(log_BGV).sum(axis=-1, keepdims=True))
    wanted = np.take_along_axis(log_BGV, result.tokens_BG[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(result.log_probs_BG, wanted, atol=1e-4)


def test_ragged_prompts_equal_one_by_one(nano, prompts, greedy):
    for prompt, wanted in zip(prompts, greedy.tokens_BG, strict=True):
        np.testing.assert_array_equal(speak(nano, [prompt]).tokens_BG[0], wanted)


def test_the_budget_is_exact(nano, prompts, greedy):
    np.testing.assert_array_equal(greedy.length_B, 40)
    assert not greedy.stopped_B.any()
    for budget in (1, 7, 64):
        result = speak(nano, prompts, max_tokens=budget)
        assert result.tokens_BG.shape == result.log_probs_BG.shape == (len(LENGTHS), budget)
        np.testing.assert_array_equal(result.length_B, budget)
        np.testing.assert_array_equal(result.tokens_BG[:, :40], greedy.tokens_BG[:, :budget])


def test_a_stop_token_ends_its_sequence_alone(nano, prompts, greedy):
    stop = int(greedy.tokens_BG[2, 9])
    wanted = []
    for tokens_G in greedy.tokens_BG:
        places = np.flatnonzero(tokens_G == stop)
        wanted.append(int(places[0]) + 1 if places.size else 40)
    result = speak(nano, prompts, stop_ids=(stop,))
    np.testing.assert_array_equal(result.length_B, wanted)
    np.testing.assert_array_equal(result.stopped_B, np.array(wanted) < 40)
    assert result.stopped_B.any()
    assert not result.stopped_B.all()
    for got, before, length in zip(result.tokens_BG, greedy.tokens_BG, wanted, strict=True):
        np.testing.assert_array_equal(got[:length], before[:length])
    # At the end of the budget a stop token is a stop, too.
    last = speak(nano, prompts, stop_ids=(stop,), max_tokens=wanted[2])
    assert last.stopped_B[2]


def test_the_seed_decides(nano, prompts):
    first, again, other = (
        speak(nano, prompts, temperature=1.0, top_p=0.95, seed=seed).tokens_BG for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.3


def test_a_handful_of_programs_serves_many_calls(nano, prompts):
    """One program a batch size, number of pages and number of stop tokens."""
    run.clear_cache()
    for seed, length in enumerate((1, 5, 33, 64)):
        for budget in (1, 3, 20):
            speak(nano, [prompts[4][:length]], max_tokens=budget, seed=seed)
        speak(nano, [prompts[4][:length]], temperature=0.5, top_p=0.9, stop_ids=(length,))
    assert run._cache_size() == 1
    speak(nano, [prompts[4][:65]], max_tokens=2)
    speak(nano, [prompts[4][:100]], temperature=1.0, max_tokens=64)
    assert run._cache_size() == 2


@pytest.mark.parametrize(
    ("chunk", "form"),
    [
        pytest.param(64, "absorbed", marks=pytest.mark.nightly),
        (40, "absorbed"),
        (40, "expanded"),
    ],
)
def test_a_prompt_in_pieces_says_what_it_says_whole(
    nano, prompts, greedy, chunk, form, monkeypatch
):
    """Pieces of whole pages and of other lengths, with prompts that end in each of them."""
    from_ = 0 if form == "expanded" else float("inf")
    monkeypatch.setattr(MultiHeadLatentAttention, "_worth_expanding", from_)
    run.clear_cache()
    result = speak(nano, prompts, infer=InferConfig(prefill_chunk=chunk))
    np.testing.assert_array_equal(result.tokens_BG, greedy.tokens_BG)
    drawn = {"temperature": 1.0, "seed": 5}
    result = speak(nano, prompts, infer=InferConfig(prefill_chunk=chunk), **drawn)
    wanted = speak(nano, prompts, **drawn)
    np.testing.assert_array_equal(result.tokens_BG, wanted.tokens_BG)
    np.testing.assert_allclose(result.log_probs_BG, wanted.log_probs_BG, atol=1e-4)
    run.clear_cache()


def test_pieces_do_not_see_what_lies_past_a_length(nano, monkeypatch):
    """Pages that no sequence uses, and what pages in use hold past its length, may be NaN."""
    graphdef, params, bias = nano
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 120), 0, ALLOWED)
    length_B = jnp.array([120, 50], jnp.int32)
    table_BX = contiguous_table(2, 192)

    def last_hidden(from_, fill):
        monkeypatch.setattr(MultiHeadLatentAttention, "_worth_expanding", from_)
        model = merge(graphdef, params, bias)
        entries = empty_entries(model.config, table_BX.size, jnp.float32)
        if fill is not None:
            unused_X = jnp.array([False, False, True, False, True, True])[None, :, None, None]
            entries = jax.tree.map(lambda x: jnp.where(unused_X, fill, x), entries)
        return prefill(model, tokens_BT, length_B, entries, table_BX, chunk=40)[0]

    wanted = last_hidden(float("inf"), None)
    for from_ in (0, float("inf")):
        got = last_hidden(from_, jnp.nan)
        np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("slots", [[[0], [130]], [[-1], [64]], [[7, 8, 63], [-1, -1, 191]]])
def test_an_fp8_cache_is_written_page_by_page_as_at_once(slots):
    slot_BT = jnp.array(slots, jnp.int32)
    key_cache, key_new = jax.random.split(jax.random.key(0))
    narrow = jnp.float8_e4m3fn
    cache = jax.random.normal(key_cache, (3, 3, 64, 16)).astype(narrow)
    new_BTC = jax.random.normal(key_new, (*slot_BT.shape, 16)).astype(narrow)
    got, wanted = (f(cache, jnp.int32(1), new_BTC, slot_BT) for f in (_write_by_page, write))
    np.testing.assert_array_equal(got.astype(np.float32), wanted.astype(np.float32))
    assert (got != cache).any(axis=-1).sum() == (slot_BT >= 0).sum()


def test_a_form_is_chosen_by_its_operations():
    """In V3 from 171 positions: C (P + H) over (2 C + R) - (A + H)."""
    config = preset("deepseek_v3")
    model = jax.eval_shape(build(config), jax.random.key(0))
    attention = model.stacks["moe"][0].attention
    assert attention._worth_expanding == pytest.approx(512 * 256 / (1088 - 320))


def test_an_fp8_cache_is_near(nano, prompts, forward):
    result = speak(nano, prompts, temperature=1.0, infer=InferConfig(cache="fp8"))
    log_BGV = forward(prompts, result.tokens_BG)
    wanted = np.take_along_axis(log_BGV, result.tokens_BG[..., None], axis=-1)[..., 0]
    off = np.abs(result.log_probs_BG - wanted)
    assert 1e-4 < np.median(off) < 0.1


def test_an_fp8_cache_takes_its_656_bytes():
    config = preset("deepseek_v3").model
    entries = jax.eval_shape(lambda: empty_entries(config, 2, jnp.bfloat16, "fp8"))
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(entries))
    assert total == 2 * 64 * 61 * 656


def test_an_fp8_cache_of_keys_and_values_is_refused():
    config = preset("r1_distill_qwen_1_5b").model
    with pytest.raises(InputError, match="an FP8 cache is of latents"):
        empty_entries(config, 2, jnp.bfloat16, "fp8")


def test_a_prefill_chunk_of_nothing_is_refused():
    with pytest.raises(InputError, match="prefill_chunk"):
        override(preset("nano"), "infer.prefill_chunk=0")
    assert override(preset("nano"), "infer.prefill_chunk=512").infer.prefill_chunk == 512


@pytest.mark.parametrize(
    ("prompts", "max_tokens"), [([], 1), ([[]], 1), ([[1], []], 1), ([[1]], 0)]
)
def test_nothing_to_continue_is_refused(nano, prompts, max_tokens):
    with pytest.raises(ValueError, match="a prompt of one token and a budget of one"):
        speak(nano, prompts, max_tokens=max_tokens)


# ---- weights and memory -------------------------------------------------------------------------


def test_prepare_casts_all_but_router_and_norms(nano):
    _, params, bias = nano
    cast, same_bias = prepare(params, bias, jnp.dtype("bfloat16"))
    chex.assert_trees_all_equal_structs(cast, params)
    assert same_bias is bias
    for path, leaf in jax.tree_util.tree_leaves_with_path(cast):
        name = jax.tree_util.keystr(path)
        kept = "router" in name or "norm" in name
        assert leaf.dtype == (jnp.float32 if kept else jnp.bfloat16), name
    for before, after in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(prepare(params, bias, jnp.dtype("float32"))[0]),
        strict=True,
    ):
        assert after.unsafe_buffer_pointer() == before.unsafe_buffer_pointer()  # shared


def test_bfloat16_generates(nano, prompts, forward):
    """Its probabilities lie near the float32 model's."""
    _, params, bias = nano
    config = preset("nano")
    model = dataclasses.replace(config.model, stacks=config.model.stacks[1:], mtp=None)
    precision = dataclasses.replace(config.precision, compute_dtype="bfloat16")
    config = dataclasses.replace(config, model=model, precision=precision)
    graphdef = split(jax.eval_shape(build(config), jax.random.key(0)))[0]
    low = (graphdef, *prepare(params, bias, jnp.dtype("bfloat16")))
    result = speak(low, prompts, temperature=1.0)
    log_BGV = forward(prompts, result.tokens_BG)
    wanted = np.take_along_axis(log_BGV, result.tokens_BG[..., None], axis=-1)[..., 0]
    assert np.median(np.abs(result.log_probs_BG - wanted)) < 0.1


def test_decode_leaves_the_cache_in_place():
    """Temporaries of a step under a fifth of the cache, which is updated where it lies."""
    config = preset("v3_20m")
    model = jax.eval_shape(build(config), jax.random.key(0))
    graphdef, params, bias = split(model)
    batch = 4
    table_BX = jax.eval_shape(lambda: contiguous_table(batch, 4096))
    entries = jax.eval_shape(lambda: empty_entries(config.model, table_BX.size, jnp.float32))
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(entries))
    assert cache_bytes == batch * 4096 * (64 + 16) * 6 * 4

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
