"""The face: `init`, `load_pretrained`, `logits`, `generate`, and what they refuse."""

import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax.errors import InputError
from dsjax.overrides import override
from dsjax.plan.count import parameter_counts
from dsjax.presets import nano
from dsjax.train.stages import stages
from sharding.rules import AxisRules

TOKENS = np.random.default_rng(0).integers(0, 512, (2, 24))


@pytest.fixture(scope="module")
def lm():
    return dsjax.init("nano", seed=0)


@pytest.fixture(scope="module")
def trained(nano_run):
    return dsjax.load_pretrained(nano_run.workdir)


def refused(function, *arguments, **settings):
    with pytest.raises(InputError) as caught:
        function(*arguments, **settings)
    return str(caught.value)


# ------------------------------------------------------------------------------------------- init


def test_init_makes_what_was_counted(lm):
    counts = parameter_counts(nano())
    assert sum(leaf.size for leaf in jax.tree.leaves(lm.params)) == counts.total + counts.mtp
    assert repr(lm) == f"LanguageModel({counts.total + counts.mtp:,} parameters, vocabulary 512)"
    assert lm.config == nano()
    assert {name: bias.shape for name, bias in lm.bias.items()} == {"moe": (2, 8), "mtp": (1, 8)}
    chex.assert_tree_all_finite(lm.params)


def test_init_is_decided_by_its_seed(lm):
    again, other = dsjax.init(nano(), seed=0), dsjax.init("nano", seed=1)
    chex.assert_trees_all_equal(again.params, lm.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(other.params, lm.params)
    assert not np.array_equal(other.params["embed_VD"], lm.params["embed_VD"])
    # The lot is drawn anew for every layer and expert.
    w_LEDF = lm.params["stacks"]["moe"][0]["ffn"]["w_in_ED2F"]
    assert len(np.unique(np.asarray(w_LEDF)[..., 0, 0])) == w_LEDF.shape[0] * w_LEDF.shape[1]


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70, True])
def test_a_seed_out_of_range_is_refused(lm, seed):
    assert "it must be a whole number in [0, 2**32)" in refused(dsjax.init, "nano", seed=seed)
    assert "seed is" in refused(lm.generate_tokens, [[1]], max_tokens=1, seed=seed)


def test_init_refuses_an_unknown_preset():
    assert refused(dsjax.init, "nanoo") == "unknown preset 'nanoo'; did you mean 'nano'?"


# ----------------------------------------------------------------------------------------- logits


def test_logits_of_a_sequence_are_those_of_its_row(lm):
    logits_BTV = lm.logits(TOKENS)
    chex.assert_shape(logits_BTV, (2, 24, 512))
    assert logits_BTV.dtype == jnp.float32
    chex.assert_tree_all_finite(logits_BTV)
    for row, logits_TV in zip(TOKENS, logits_BTV, strict=True):
        chex.assert_trees_all_close(lm.logits(row), logits_TV, atol=1e-5)
        chex.assert_trees_all_close(lm.logits(row.tolist()), logits_TV, atol=1e-5)
    chex.assert_shape(lm.logits(TOKENS[:1]), (1, 24, 512))


def test_a_token_changes_no_logits_before_it(lm):
    changed = TOKENS.copy()
    changed[:, 12] = (changed[:, 12] + 1) % 512
    before, after = lm.logits(TOKENS), lm.logits(changed)
    chex.assert_trees_all_close(before[:, :12], after[:, :12], atol=1e-6)
    assert not np.allclose(before[:, 12], after[:, 12], atol=1e-3)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (np.array([1, 512]), "token 512 is outside the vocabulary of 512"),
        (np.array([[1], [-1]]), "token -1 is outside the vocabulary of 512"),
        (np.array([2**63], np.uint64), "outside the vocabulary"),
        ([2**70], "tokens must be integers, not object"),
        (np.array([1.0, 2.0]), "tokens must be integers, not float64"),
        (np.array([True]), "tokens must be integers, not bool"),
        (np.array(["a"]), "tokens must be integers, not <U1"),
        ([], "tokens must be of shape [T] or [B, T], not [0]"),
        (np.zeros((2, 0), int), "not [2, 0]"),
        (np.array(3), "not []"),
        (np.zeros((1, 2, 3), int), "not [1, 2, 3]"),
        (np.zeros(4097, int), "4097 positions; the model has 4096 (model.max_positions)"),
        (np.zeros((2, 4097), int), "4097 positions"),
    ],
)
def test_logits_refuse_what_are_no_tokens(lm, tokens, expected):
    assert expected in refused(lm.logits, tokens)


# --------------------------------------------------------------------------------------- generate


def test_a_model_without_a_tokenizer_generates_tokens_alone(lm):
    assert "no tokenizer; use generate_tokens" in refused(lm.generate, "text")
    prompts = [[1, 2, 3], [4]]
    result = lm.generate_tokens(prompts, max_tokens=5, temperature=1.0, seed=3)
    chex.assert_shape(result.tokens_BG, (2, 5))
    chex.assert_shape(result.log_probs_BG, (2, 5))
    assert result.tokens_BG.min() >= 0
    assert result.tokens_BG.max() < 512
    assert result.length_B.tolist() == [5, 5]  # nothing stops it
    assert not result.stopped_B.any()
    assert (result.log_probs_BG < 0).all()
    again = lm.generate_tokens(prompts, max_tokens=5, temperature=1.0, seed=3)
    chex.assert_trees_all_equal(again.tokens_BG, result.tokens_BG)
    other = lm.generate_tokens(prompts, max_tokens=5, temperature=1.0, seed=4)
    assert not np.array_equal(other.tokens_BG, result.tokens_BG)


def test_the_best_token_is_the_one_of_the_best_logit(lm):
    prompt = TOKENS[0, :7].tolist()
    result = lm.generate_tokens([prompt], max_tokens=3)
    assert result.tokens_BG[0, 0] == int(lm.logits(prompt)[-1].argmax())


def test_a_stop_token_ends_a_sequence(lm):
    first = int(lm.generate_tokens([[1, 2, 3]], max_tokens=4).tokens_BG[0, 0])
    result = lm.generate_tokens([[1, 2, 3]], max_tokens=4, stop_ids=[first])
    assert result.length_B.tolist() == [1]
    assert result.stopped_B.tolist() == [True]


@pytest.mark.parametrize(
    ("prompts", "settings", "expected"),
    [
        ([], {}, "every prompt needs at least one token"),
        ([[1], []], {}, "every prompt needs at least one token"),
        ([[1], [512]], {}, "token 512 is outside the vocabulary"),
        ([[-1]], {}, "token -1 is outside the vocabulary"),
        ([[1]], {"max_tokens": 0}, "max_tokens is 0"),
        ([[1]], {"max_tokens": True}, "max_tokens is True"),
        ([[1] * 10], {"max_tokens": 4087}, "4097 positions; the model has 4096"),
        ([[1]], {"temperature": -0.1}, "temperature is -0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_p": 1.5}, "top_p is 1.5"),
        ([[1]], {"top_p": float("nan")}, "top_p is nan"),
    ],
)
def test_generation_refuses_what_it_cannot_use(lm, prompts, settings, expected):
    assert expected in refused(lm.generate_tokens, prompts, **settings)


def test_a_trained_model_continues_text(trained):
    text = trained.generate("aei ", max_tokens=8, temperature=1.0, seed=5)
    assert isinstance(text, str)
    assert text
    assert text == trained.generate("aei ", max_tokens=8, temperature=1.0, seed=5)
    # Special tokens typed by a person stay text.
    ids = trained.tokenizer.encode("<|eos|>")
    assert trained.tokenizer.eos_id not in ids
    assert trained.generate("<|eos|>", max_tokens=2)
    assert refused(trained.generate, "") == "the prompt is empty"


# --------------------------------------------------------------------------------- load_pretrained


def test_a_run_is_loaded_with_its_configuration(trained, nano_run):
    assert stages(trained.config)[-1].last_step == 6
    assert trained.tokenizer.vocab_size <= trained.config.model.vocab_size
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(trained.params))
    chex.assert_trees_all_equal_shapes_and_dtypes(trained.params, dsjax.init("nano").params)
    again = dsjax.load_pretrained(pathlib.Path(nano_run.workdir), step=6)
    chex.assert_trees_all_equal(again.params, trained.params)
    chex.assert_trees_all_equal(again.bias, trained.bias)
    assert any(np.abs(bias).max() > 0 for bias in trained.bias.values())


def test_an_older_step_can_be_loaded(trained, nano_run):
    older = dsjax.load_pretrained(nano_run.workdir, step=3)
    assert not np.array_equal(older.params["embed_VD"], trained.params["embed_VD"])
    assert "has no step 5; it has 3, 6" in refused(dsjax.load_pretrained, nano_run.workdir, step=5)


def test_weights_can_be_kept_in_bfloat16(trained, nano_run):
    half = dsjax.load_pretrained(nano_run.workdir, dtype="bfloat16")
    assert half.config.precision.compute_dtype == "bfloat16"
    dtypes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(half.params):
        dtypes[jax.tree_util.keystr(path[-1:], simple=True)] = leaf.dtype
    assert dtypes.pop("w_router_DE") == jnp.float32
    assert {dtypes.pop(name) for name in list(dtypes) if "norm" in name} == {jnp.dtype("float32")}
    assert set(dtypes.values()) == {jnp.dtype("bfloat16")}
    chex.assert_trees_all_equal(half.bias, trained.bias)  # float32 still
    ids = TOKENS[:, :16]
    full_BTV, half_BTV = trained.logits(ids), half.logits(ids)
    assert half_BTV.dtype == jnp.float32
    # 8 bits of mantissa through a dozen contractions; a router may choose another expert.
    error = np.linalg.norm(half_BTV - full_BTV) / np.linalg.norm(full_BTV)
    assert 0 < error < 0.1
    same = dsjax.load_pretrained(nano_run.workdir, dtype="float32")
    chex.assert_trees_all_equal(same.params, trained.params)
    message = refused(dsjax.load_pretrained, nano_run.workdir, dtype="float16")
    assert message == "precision.compute_dtype must be one of float32, bfloat16, not 'float16'" + (
        "; did you mean 'bfloat16'?"
    )


def test_a_run_can_be_loaded_with_overrides(trained, nano_run):
    without = dsjax.load_pretrained(nano_run.workdir, overrides=["model.mtp=null"])
    assert "mtp_modules" not in without.params
    chex.assert_trees_all_close(without.logits(TOKENS), trained.logits(TOKENS), atol=1e-5)

    def error(assignment):
        return refused(dsjax.load_pretrained, nano_run.workdir, overrides=[assignment])

    assert "embed_VD has shape (512, 32), expected (512, 64)" in error("model.embed_dim=64")
    assert "has no params.stacks.dense" in error(
        "model.stacks.dense.blocks.0.attention.q_latent_dim=null"
    )
    assert "unknown key 'model.width'" in error("model.width=3")


def test_what_is_no_run_is_refused(nano_run, tmp_path):
    assert refused(dsjax.load_pretrained, tmp_path) == (
        f"{tmp_path} holds neither dsjax.json (a run) nor config.json"
    )
    (tmp_path / "config.json").write_text("{}")
    assert "config.json: model_type is None" in refused(dsjax.load_pretrained, tmp_path)
    shutil.copy(pathlib.Path(nano_run.workdir) / "dsjax.json", tmp_path)
    assert refused(dsjax.load_pretrained, tmp_path) == f"{tmp_path} holds no checkpoint"


def test_a_model_with_other_rules_keeps_its_arrays(lm):
    other = lm.with_rules(AxisRules())
    assert all(
        a is b for a, b in zip(*map(jax.tree.leaves, (lm.params, other.params)), strict=True)
    )
    longer = override(nano(), "model.max_positions=16384")
    assert longer.model.max_positions == 16384
