"""A checkpoint's verdict: what was trained passes, and each mistake of an importer is named.

The learned model is a small V3 with YaRN (factor 40) and MTP that knows one text by heart.
"""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax.config import (
    BlockConfig,
    MlaConfig,
    ModelConfig,
    MtpConfig,
    RopeConfig,
    StackConfig,
    YarnConfig,
)
from dsjax.errors import InputError
from dsjax.evaluate import verify as module
from dsjax.evaluate.acceptance import second_token_acceptance
from dsjax.evaluate.verify import (
    NAMES,
    TEXT,
    Candidate,
    Scores,
    blueprint,
    score,
    unigram_perplexity,
    verify,
    windows,
    wrong_guesses,
)
from dsjax.interop import hf
from dsjax.interop.tokenizer import Tokenizer
from dsjax.language_model import LanguageModel
from dsjax.overrides import override
from dsjax.precision import Quantized
from dsjax.presets import preset
from dsjax.train.loop import pretrain
from experiments import command, verify_checkpoint
from sharding.rules import AxisRules

RULES = AxisRules()
NOT_FP8 = {"scale_inverse", "scale_grid"}
MILD = {"rope_theta", "gate_scale", "group_limit", "router_bias"}  # a right model may be no better


@pytest.fixture(autouse=True)
def _allocator_left_alone(monkeypatch):
    monkeypatch.setattr(command, "keep_freed_memory", lambda: False)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 400)


@functools.cache
def fresh(name):
    return dsjax.init(name)


def candidate_of(name):
    lm = fresh(name)
    return Candidate(lm.config, lm.params, lm.bias)


# ---- scoring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [[], [900], [900, 901, 902]])
@pytest.mark.parametrize("count", [2, 7, 8, 9, 16, 17, 40])
def test_every_token_is_a_target_once_after_what_stands_before_it(prefix, count):
    ids = list(range(count))
    seen = []
    for batch in windows(ids, prefix, 8):
        assert batch["tokens_BT"].shape[1] <= 8
        real = batch["segments_BT"] != 0
        assert (batch["weights_BT"] <= real).all()
        for tokens, targets, weights, positions in zip(
            *(batch[f"{n}_BT"] for n in ("tokens", "targets", "weights", "positions")), strict=True
        ):
            row = [int(t) for t, w in zip(targets, weights, strict=True) if w]
            seen += row
            n = int(max(np.nonzero(weights)[0], default=-1)) + 1
            assert tokens[:n].tolist() == [*prefix, *range(row[0] - (not prefix), row[-1])]
            assert (tokens[1:n] == targets[: n - 1]).all()
            assert (positions[:n] == np.arange(n)).all()
    assert seen == ids[0 if prefix else 1 :]


def test_a_long_text_is_cut_into_batches_of_one_shape(monkeypatch):
    monkeypatch.setattr(module, "PASS_TOKENS", 16)
    batches = list(windows(list(range(100)), [], 8))
    assert {batch["tokens_BT"].shape for batch in batches} == {(2, 8)}
    assert sum(batch["weights_BT"].sum() for batch in batches) == 99


def test_perplexity_and_acceptance_are_those_of_the_model():
    candidate = candidate_of("nano")
    ids = np.random.default_rng(0).integers(0, 512, 90).tolist()
    batches = list(windows(ids, [], 40))
    got = score(candidate, batches, RULES)
    log_BTV = jax.nn.log_softmax(fresh("nano").logits([ids[:40], ids[40:80]]))
    targets_BT = np.reshape(ids[1:81], (2, 40))
    nats_BT = -np.take_along_axis(np.asarray(log_BTV), targets_BT[..., None], axis=-1)
    np.testing.assert_allclose(got.nats_U[:80], nats_BT.ravel(), rtol=1e-4)
    assert got.nats_U.size == 89
    graphdef = blueprint(candidate.config, RULES)
    wanted = second_token_acceptance(graphdef, candidate.params, candidate.bias, batches)
    assert got.acceptance == pytest.approx(wanted, abs=1e-6)
    assert got.hit_U.size == 39 + 39 + 8


def test_a_guess_without_context_counts_what_it_has_read():
    # 1/4; then (1 + 1/4) / 2; then (0 + 1/4) / 3.
    wanted = (1 / 4 * (1.25 / 2) * (0.25 / 3)) ** (-1 / 3)
    assert unigram_perplexity([2, 2, 3], 4) == pytest.approx(wanted)


def test_a_model_that_gives_no_numbers_has_no_perplexity():
    assert Scores(np.array([1.0, np.inf]), np.zeros(0, bool)).perplexity == math.inf


# ---- the guesses --------------------------------------------------------------------------------


def test_rotary_pairs_are_those_of_llama_and_back(rng):
    """What brings Llama's halves together is what the guess does, and its inverse undoes it."""
    published = rng.standard_normal((3 * 8, 5)).astype(np.float32)
    plain = hf._by_head(3, 8, 5).to_leaf(published)
    together = hf._by_head_in_halves(3, 8, 5).to_leaf(published)
    there = module._reordered(plain, 0, False, "float32")
    np.testing.assert_array_equal(there, together)
    np.testing.assert_array_equal(module._reordered(there, 0, True, "float32"), plain)
    # Only what turns is moved.
    part = np.asarray(module._reordered(plain, 2, False, "float32"))
    np.testing.assert_array_equal(part[..., :2], plain[..., :2])
    np.testing.assert_array_equal(part[..., 2:], plain[..., [2, 5, 3, 6, 4, 7]])


@pytest.mark.parametrize(
    ("name", "applies"),
    [
        ("nano", {"rope_pairing", "gate_up", "gate_scale", "group_limit", "eh_proj_order"}),
        ("nano_dense", {"rope_pairing", "gate_up"}),
        ("tiny_context", {"rope_pairing", "gate_up", "gate_scale", "mscale"}),
    ],
)
def test_what_cannot_matter_is_not_applicable_and_says_why(name, applies):
    guesses = {guess.name: guess for guess in wrong_guesses(candidate_of(name))}
    assert set(guesses) == set(NAMES)
    applies = applies | {"rope_theta"}
    if name == "nano":
        applies |= {"mtp_norm", "mtp_unnormed"}
        assert not guesses["mtp_norm"].decides  # at first its weights are all 1
        assert not guesses["mtp_unnormed"].decides
    for guess in guesses.values():
        assert bool(guess.variants) == (guess.name in applies) != bool(guess.why_not)


@pytest.mark.parametrize("name", ["nano", "nano_dense", "tiny_context"])
def test_a_guess_shares_every_array_that_it_does_not_change(name):
    candidate = candidate_of(name)
    own = {id(x) for x in jax.tree.leaves((candidate.params, candidate.bias))}
    changes = {
        "rope_pairing": ("w_q_DNA", "w_uq_QNA", "w_dkvr_DZ", "w_k_DIA", "b_q_NA", "b_k_IA"),
        "gate_up": ("w_in_D2F", "w_in_ED2F"),
        "eh_proj_order": ("w_proj_2DD",),
    }
    for guess in wrong_guesses(candidate):
        for change in guess.variants.values():
            wrong = change(candidate)
            leaves = jax.tree_util.tree_leaves_with_path((wrong.params, wrong.bias))
            fresh = {str(path[-1].key) for path, leaf in leaves if id(leaf) not in own}
            assert fresh <= set(changes.get(guess.name, ())), guess.name
            assert fresh or wrong.config != candidate.config or guess.measure == "acceptance"


def test_large_leaves_are_not_copied(monkeypatch):
    candidate = candidate_of("nano")
    (guess,) = [g for g in wrong_guesses(candidate) if g.name == "gate_up"]
    assert list(guess.variants) == ["everywhere"]
    experts = candidate.params["stacks"]["moe"][0]["ffn"]["w_in_ED2F"]
    monkeypatch.setattr(module, "SWAP_BYTES", experts.nbytes // 2)
    (guess,) = [g for g in wrong_guesses(candidate) if g.name == "gate_up"]
    ((label, change),) = guess.variants.items()
    assert label == "in 3 of 5 leaves"
    assert change(candidate).params["stacks"]["moe"][0]["ffn"]["w_in_ED2F"] is experts
    monkeypatch.setattr(module, "SWAP_BYTES", 1)
    (guess,) = [g for g in wrong_guesses(candidate) if g.name == "gate_up"]
    assert "bytes" in guess.why_not


def test_scales_read_the_wrong_way_and_back(rng):
    q = jnp.zeros((300, 2 * 140), jnp.float8_e4m3fn)
    scale = jnp.asarray(rng.random((3, 4)), jnp.float32)
    leaf = Quantized(q, scale, 1, 2)
    candidate = dataclasses.replace(candidate_of("nano"), params={"w": leaf})
    guess = module._scale_grid(candidate)
    once = guess.variants["transposed"](candidate)
    for part in range(2):
        own, wrong = (
            np.asarray(x[:, 2 * part : 2 * part + 2]) for x in (scale, once.params["w"].scale)
        )
        np.testing.assert_array_equal(wrong, own.T.reshape(3, 2))
    back = guess.variants["transposed back"](once)
    np.testing.assert_array_equal(back.params["w"].scale, scale)
    assert back.params["w"].q is q


# ---- a verdict ----------------------------------------------------------------------------------


def test_weights_that_do_not_speak_the_text_fail(tokenizer):
    lm = fresh("nano")
    report = verify(lm.config, lm.params, lm.bias, tokenizer, only=["rope_pairing"])
    assert not report.passed
    assert not report.speaks
    assert "the weights do not speak this text" in report.verdict()
    assert report.perplexity == pytest.approx(512, rel=0.2)
    assert [o.name for o in report.outcomes] == ["rope_pairing"]


def test_numbers_that_are_none_fail_and_are_null(tokenizer):
    lm = fresh("nano")
    params = lm.params | {"final_norm_D": lm.params["final_norm_D"] * math.nan}
    report = verify(lm.config, params, lm.bias, tokenizer, only=["rope_pairing"])
    assert not report.passed
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["perplexity"] is None
    assert content["passed"] is False


def test_what_cannot_be_scored_is_refused(tokenizer):
    lm = fresh("nano")
    arguments = lm.config, lm.params, lm.bias, tokenizer
    with pytest.raises(InputError, match="the text has 1 tokens; more than 64 are needed"):
        verify(*arguments, "a")
    with pytest.raises(InputError, match="max_tokens is 3; it must be at least 64"):
        verify(*arguments, max_tokens=3)
    with pytest.raises(InputError, match="window is 1; it must lie in"):
        verify(*arguments, window=1)
    with pytest.raises(InputError, match="unknown wrong guess 'mscal'; did you mean 'mscale'"):
        verify(*arguments, only=["mscal"])


def run(capsys, *arguments):
    code = verify_checkpoint.main(["verify_checkpoint", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--source is needed: a folder of Hugging Face, or of a run"),
        (["--source=missing"], "there is no folder missing"),
        (["--workdir=runs/tiny"], "--workdir is not used here; --source names the folder"),
        (["--source=x", "--preset=tiny"], "--preset is not used here; --source names the folder"),
        (["--source=x", "--text=no.txt"], "cannot read no.txt: No such file or directory"),
        (["--source=x", "--max_tokens=1"], "--max_tokens is 1; it must be at least 64"),
        (["--source=x", "--guess=rope"], "unknown guess 'rope'"),
        (["--source=x", "--json_out=no/x.json"], "--json_out=no/x.json lies in no folder"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"verify_checkpoint: {message}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_tokenizer_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(verify_checkpoint, "load_pretrained", lambda *_, **__: fresh("nano"))
    code, _, err = run(capsys, "--source=x")
    assert code == 2
    assert "x has no tokenizer.json; a text cannot be scored" in err


def test_text_that_is_none_is_refused(tmp_path, capsys):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    code, _, err = run(capsys, "--source=x", f"--text={tmp_path / 'x.txt'}")
    assert code == 2
    assert "it is not UTF-8" in err


def test_the_script_fails_a_run_of_six_steps(nano_run, tmp_path, capsys):
    """Which was trained on other words altogether."""
    figures = tmp_path / "figures.json"
    flags = ["--guess=rope_pairing", "--guess=mscale", f"--json_out={figures}"]
    code, out, err = run(capsys, f"--source={nano_run.workdir}", *flags)
    assert code == 1
    assert "FAIL: the weights do not speak this text" in err.splitlines()[-1]
    assert "mscale          perplexity                        not applicable: the model has" in out
    content = json.loads(figures.read_text())
    assert content["passed"] is False
    assert len(content["continuations"]) == 10
    assert {len(c["best"]) for c in content["continuations"]} == {5}
    assert [o["name"] for o in content["outcomes"]] == ["rope_pairing", "mscale"]


# ---- a model that has learned -------------------------------------------------------------------

STEPS = 40


def _learn(folder):
    """A V3 in small learns `TEXT` by heart, with YaRN from its first step."""
    base = preset("nano")
    attention = MlaConfig(
        num_heads=4,
        q_latent_dim=48,
        kv_latent_dim=32,
        nope_dim=16,
        rope_dim=16,
        value_dim=16,
        rope=RopeConfig(yarn=YarnConfig(factor=40.0, original_max_positions=64)),
    )
    moe = dataclasses.replace(
        base.model.stacks[1].blocks[0].ffn,
        expert_dim=32,
        num_experts=4,
        num_groups=2,
        groups_per_token=1,
        num_shared_experts=8,  # 256 wide: with the model's 256, a grid of 2 by 2 blocks
    )
    block = BlockConfig(attention=attention, ffn=moe)
    model = ModelConfig(
        vocab_size=512,
        embed_dim=256,
        stacks=(StackConfig(name="moe", repeats=2, blocks=(block,)),),
        mtp=MtpConfig(depth=1, block=block),
        init_std=0.05,
    )
    train = dataclasses.replace(
        base.train,
        seq_len=256,
        batch_size=4,
        total_tokens=STEPS * 4 * 256,
        eval_every_steps=1000,
        eval_batches=1,
        save_every_steps=1000,
    )
    texts = folder / "texts"
    texts.mkdir()
    for i in range(12):  # some are held out; they are all alike
        (texts / f"{i:02}.txt").write_text(f"{i}\n{TEXT}", encoding="utf-8")
    config = override(
        dataclasses.replace(base, model=model, train=train),
        f'data.sources=[{{"path": "{texts}/*.txt"}}]',
        "data.held_out_fraction=0.2",
    )
    pretrain(config, folder / "run", seed=0)
    return str(folder / "run")


@pytest.fixture(scope="module")
def learned(once):
    return dsjax.load_pretrained(once("verified run", _learn))


def with_params(lm, params):
    return LanguageModel(lm.config, lm.graphdef, params, lm.bias, lm.tokenizer)


def final_norm_flipped(lm, hidden_norm_too):
    """The final norms' weights and the head's rows with half of their signs: the same main model.

    And the same draft, if `hnorm`'s weights have them, too: RMSNorm keeps signs.
    """
    s_D = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], 256), jnp.float32)
    params, mtp = lm.params, lm.params["mtp_modules"][0]
    mtp = mtp | {"final_norm_D": mtp["final_norm_D"] * s_D}
    if hidden_norm_too:
        mtp["hidden_norm_D"] = mtp["hidden_norm_D"] * s_D
    head_DV = params["head_DV"] * s_D[:, None]
    norm_D = params["final_norm_D"] * s_D
    return with_params(
        lm, params | {"final_norm_D": norm_D, "head_DV": head_DV, "mtp_modules": {0: mtp}}
    )


def uneven_blocks(lm):
    """Up projections of shared experts times 16 in half of their columns, down by 1 / 16."""
    params = lm.params
    for path in (("stacks", "moe", 0), ("mtp_modules", 0, "block")):
        shared = hf.get(params, path)["ffn"]["shared"]
        w_in, w_down = shared["w_in_D2F"], shared["w_down_FD"]
        f = w_down.shape[-2]
        factor_F = jnp.where(jnp.arange(f) < f // 2, 16.0, 1.0)
        w_in = jnp.concatenate([w_in[..., :f], w_in[..., f:] * factor_F], axis=-1)
        changed = {"w_in_D2F": w_in, "w_down_FD": w_down / factor_F[:, None]}
        params = module._put(params, (*path, "ffn", "shared"), changed)
    return with_params(lm, params)


@pytest.fixture(scope="module")
def right(learned):
    """The learned model, written so that every mistake matters: the function is the same.

    Forty steps leave norms' weights at about 1, and FP8's scales all alike.
    """
    return uneven_blocks(final_norm_flipped(learned, hidden_norm_too=True))


@pytest.fixture(scope="module")
def right_fp8(right, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "model"
    right.save_pretrained(folder, "fp8")
    return folder, dsjax.load_pretrained(folder)


def report_of(lm, *only):
    return verify(lm.config, lm.params, lm.bias, lm.tokenizer, only=only, prompts=())


@pytest.mark.slow
def test_what_was_trained_passes_and_every_wrong_guess_is_worse(learned, right):
    report = report_of(right)
    assert report.window == 256
    assert report.passed, report.text()
    assert report.verdict().startswith("PASS: ")
    by_name = {outcome.name: outcome for outcome in report.outcomes}
    assert {n for n, o in by_name.items() if o.result == "not applicable"} == NOT_FP8
    for name in set(NAMES) - NOT_FP8 - MILD:
        assert by_name[name].decides
        assert by_name[name].result == "worse", by_name[name]
    # The same function.
    plain = report_of(learned, "rope_pairing")
    assert plain.perplexity == pytest.approx(report.perplexity, rel=1e-3)
    assert plain.acceptance == pytest.approx(report.acceptance, abs=0.005)
    assert plain.passed


def swapped(x, axis):
    return np.concatenate(np.split(np.asarray(x), 2, axis=axis)[::-1], axis=axis)


def broken(lm, mistake):
    """The model as an importer leaves it that makes a mistake."""
    params = lm.params
    paths = (("stacks", "moe", 0), ("mtp_modules", 0, "block"))
    if mistake.startswith("rope_pairing"):
        order = np.arange(16).reshape(2, 8).T.ravel()  # 0, 8, 1, 9, ...
        if mistake == "rope_pairing, the other way":
            order = np.argsort(order)
        for path in paths:
            attention = hf.get(params, path)["attention"]
            for name in ("w_uq_QNA", "w_dkvr_DZ"):
                kept, turned = np.split(np.asarray(attention[name]), [-16], axis=-1)
                leaf = jnp.asarray(np.concatenate([kept, turned[..., order]], axis=-1))
                params = module._put(params, (*path, "attention", name), leaf)
    if mistake == "gate_up":
        for path in paths:
            ffn = hf.get(params, path)["ffn"]
            shared = ffn["shared"] | {
                "w_in_D2F": jnp.asarray(swapped(ffn["shared"]["w_in_D2F"], -1))
            }
            ffn = ffn | {"w_in_ED2F": jnp.asarray(swapped(ffn["w_in_ED2F"], -1)), "shared": shared}
            params = module._put(params, (*path, "ffn"), ffn)
    if mistake == "eh_proj_order":
        leaf = jnp.asarray(swapped(params["mtp_modules"][0]["w_proj_2DD"], 0))
        params = module._put(params, ("mtp_modules", 0, "w_proj_2DD"), leaf)
    if mistake == "mscale":
        text = "model.stacks.moe.blocks.0.attention.rope.yarn"
        mtp = "model.mtp.block.attention.rope.yarn"
        config = override(
            lm.config,
            *(f"{p}.{field}=0.0" for p in (text, mtp) for field in ("mscale", "mscale_all_dim")),
        )
        return LanguageModel(config, lm.graphdef, params, lm.bias, lm.tokenizer)
    return with_params(lm, params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake",
    ["rope_pairing", "rope_pairing, the other way", "gate_up", "eh_proj_order", "mscale"],
)
def test_a_mistake_of_the_importer_fails_under_its_name(right, mistake):
    name, *_ = mistake.split(",")
    # A broken model may be no worse under other guesses, too; undoing the mistake helps most.
    others = {"rope_pairing", "gate_up", "eh_proj_order", name}
    report = report_of(broken(right, mistake), *sorted(others))
    assert not report.passed
    assert report.failed[0] == name, report.text()
    (outcome,) = [o for o in report.outcomes if o.name == name]
    assert outcome.result == "better"
    assert f"{name}: the model is better under a wrong guess" in report.verdict()


@pytest.mark.slow
def test_mtp_that_was_trained_on_another_hidden_state_fails_under_its_name(learned):
    """Weights that want the state from before the final norm, or no `hnorm`.

    The learned norms are flat, so the learned model wants either; then one norm's weights change.
    """
    before = final_norm_flipped(learned, hidden_norm_too=False)
    report = report_of(before, "eh_proj_order", "mtp_norm")
    assert report.failed[0] == "mtp_norm", report.text()
    assert report.outcomes[1].result == "better"
    mtp = before.params["mtp_modules"][0]
    signs_D = jnp.sign(before.params["final_norm_D"])
    unnormed = module._put(
        learned.params, ("mtp_modules", 0, "hidden_norm_D"), mtp["hidden_norm_D"] * signs_D
    )
    report = report_of(with_params(learned, unnormed), "eh_proj_order", "mtp_unnormed")
    assert report.failed[0] == "mtp_unnormed", report.text()
    assert report.outcomes[1].result == "better"


@pytest.mark.nightly
def test_scales_of_fp8(right_fp8, capsys):
    """The published folder passes; scales divided by, or transposed, fail under their names."""
    folder, lm = right_fp8
    names = ("scale_inverse", "scale_grid", "eh_proj_order")
    flags = [f"--guess={name}" for name in names]
    code, out, err = run(capsys, f"--source={folder}", *flags)
    assert code == 0, out
    assert "PASS: 3 wrong guesses are clearly worse" in out
    assert err.count("\n") == 3

    def broken(change):
        def changed(leaf):
            if not isinstance(leaf, Quantized):
                return leaf
            return dataclasses.replace(leaf, scale=jnp.asarray(change(leaf)))

        leaves = jax.tree.map(changed, lm.params, is_leaf=lambda x: isinstance(x, Quantized))
        return with_params(lm, leaves)

    def transposed(leaf):
        scale = np.array(leaf.scale)
        width = scale.shape[-1] // leaf.parts
        if scale.shape[-2] == width == 2:
            for part in range(leaf.parts):
                here = slice(part * width, (part + 1) * width)
                scale[..., here] = scale[..., here].swapaxes(-1, -2)
        return scale

    report = report_of(broken(lambda leaf: 1.0 / np.asarray(leaf.scale)), *names)
    assert report.failed[0] == "scale_inverse", report.text()
    report = report_of(broken(transposed), *names)
    assert report.failed[0] == "scale_grid", report.text()
