"""transformers as a peer: its models read here, and models of ours read there.

The first half needs golden files alone. The second runs transformers where `make oracle` has put
it, in a process of its own (tests/oracle/read_exports.py).
"""

import dataclasses
import functools
import json
import pathlib
import re
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import dsjax
from dsjax.config import (
    BlockConfig,
    GqaConfig,
    Llama3RopeConfig,
    MoeConfig,
    MtpConfig,
    RopeConfig,
    StackConfig,
    YarnConfig,
)
from dsjax.interop import hf
from dsjax.model.transformer import merge
from dsjax.overrides import override
from dsjax.presets import preset
from tests import golden_cases
from tests.helpers import FLOAT32_GRADIENT, assert_near, assert_trees_near, distance

# ---- goldens ------------------------------------------------------------------------------------

DENSE = ("qwen2", "qwen2_tied", "llama", "llama_linear", "llama_bias")
MODELS = (*DENSE, *golden_cases.MODELS)
SPELLINGS = ("config", "config_published")


def some(*quick, of=MODELS, rest=pytest.mark.slow):
    """Goldens to ask: all of them, but most only where slow tests run, as programs compile long."""
    return [n if n in quick else pytest.param(n, marks=rest) for n in of]


def assert_same(got, wanted):
    """Two trees of the same bits."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        assert a.dtype == b.dtype, jax.tree_util.keystr(path)
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module", params=MODELS)
def golden(request, tmp_path_factory):
    """(tensors, the model loaded from a folder in transformers' spelling, in the published one)."""
    tensors, _ = golden_cases.load(request.param)
    info = json.loads((golden_cases.FOLDER / f"{request.param}.json").read_text())
    weights = {k.removeprefix("param/"): v for k, v in tensors.items() if k.startswith("param/")}
    loaded = []
    for spelling in SPELLINGS:
        folder = tmp_path_factory.mktemp(request.param)
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(info[spelling]))
        loaded.append(dsjax.load_pretrained(folder))
    return tensors, *loaded


def test_both_spellings_are_one_model(golden):
    """transformers 5's config.json and the one of published repositories."""
    _, ours, published = golden
    assert ours.config == published.config
    assert ours.config.precision.param_dtype == "float32"
    assert_same((ours.params, ours.bias), (published.params, published.bias))


@pytest.mark.parametrize("golden", some(*DENSE, "deepseek_v3", "deepseek_v2"), indirect=True)
def test_logits_are_the_peers(golden):
    """Of the text, and of what greedy choice makes of it: each choice is the peer's."""
    tensors, lm, _ = golden
    length, chosen = tensors["input_ids"].shape[1], tensors["continuation"]
    logits = np.asarray(lm.logits(np.concatenate([tensors["input_ids"], chosen], axis=1)))
    assert_near(logits[:, :length], tensors["logits"])
    assert_near(logits[:, length - 1 : -1], tensors["continuation_logits"])
    np.testing.assert_array_equal(logits[:, length - 1 : -1].argmax(-1), chosen)


@pytest.mark.parametrize(
    "golden", some("llama", "deepseek_v3", "deepseek_v2", rest=pytest.mark.nightly), indirect=True
)
def test_greedy_tokens_are_the_peers(golden):
    """Prefill and cached decode beside full forwards; no choice is nearly tied in these files."""
    tensors, lm, _ = golden
    result = lm.generate_tokens(tensors["input_ids"].tolist(), max_tokens=8, stop_ids=())
    np.testing.assert_array_equal(result.tokens_BG, tensors["continuation"])


def test_tensors_go_back_as_they_came(golden):
    """To published names, bit for bit."""
    tensors, lm, _ = golden
    back = hf.to_tensors(lm.params, lm.bias, lm.config.model)
    wanted = {k.removeprefix("param/"): v for k, v in tensors.items() if k.startswith("param/")}
    assert back.keys() == wanted.keys()
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, wanted[name], err_msg=name)


@pytest.mark.parametrize("golden", some("qwen2_tied", "llama", of=DENSE), indirect=True)
def test_gradients_are_the_peers(golden):
    """Of the mean cross entropy, each parameter's under its published name; also of a tied head."""
    tensors, lm, _ = golden
    tokens_BT = jnp.asarray(tensors["input_ids"])

    @jax.jit
    def loss_and_gradients(params):
        def loss_of(params):
            log_BTV = jax.nn.log_softmax(forward(lm.graphdef, params, lm.bias, tokens_BT)[0])
            chosen_BT = jnp.take_along_axis(log_BTV[:, :-1], tokens_BT[:, 1:, None], axis=-1)
            return -chosen_BT.mean()

        return jax.value_and_grad(loss_of)(params)

    loss, grads = loss_and_gradients(lm.params)
    np.testing.assert_allclose(loss, tensors["loss"].item(), rtol=1e-5)
    found = hf.to_tensors(grads, {}, lm.config.model)
    wanted = {k.removeprefix("grad/"): v for k, v in tensors.items() if k.startswith("grad/")}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert distance(gradient, wanted[name]) <= FLOAT32_GRADIENT, name


@functools.partial(jax.jit, static_argnames="graphdef")
def forward(graphdef, params, bias, tokens_BT):
    """Logits of the main model, and of each depth of MTP where the text goes on."""
    model = merge(graphdef, params, bias)
    where = {
        "positions_BT": jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape),
        "segments_BT": jnp.ones_like(tokens_BT),
    }
    hidden_BTD = model(tokens_BT, **where).hidden_BTD
    logits = [model.logits(hidden_BTD)]
    for depth in range(len(model.mtp_modules)):
        next_BT = jnp.roll(tokens_BT, -1 - depth, axis=1)
        hidden_BTD, _ = model.mtp(depth, hidden_BTD, next_BT, **where)
        logits.append(model.logits(hidden_BTD)[:, : -1 - depth])
    return logits


# ---- transformers, live -------------------------------------------------------------------------

ROOT = pathlib.Path(__file__).resolve().parent.parent
PEER = ROOT / ".venv-oracle" / "bin" / "python"
live = [
    pytest.mark.slow,
    pytest.mark.skipif(not PEER.exists(), reason="no transformers here: make oracle"),
]
# Below this, two correct float32 programs might choose different experts.
MIN_ROUTER_GAP = 1e-5
IDS = np.random.default_rng(4).integers(0, 512, (2, 20)).astype(np.int32)
YARN = YarnConfig(factor=4.0, original_max_positions=16)
WIDE = (  # several FP8 blocks a side, with uneven edges
    "model.embed_dim=160",
    "model.stacks.dense.blocks.0.ffn.hidden_dim=320",
    *(
        f"model.{block}.attention.{field}"
        for block in ("stacks.dense.blocks.0", "stacks.moe.blocks.0", "mtp.block")
        for field in ("kv_latent_dim=136", "q_latent_dim=144", "nope_dim=96", "value_dim=48")
    ),
    "model.stacks.moe.blocks.0.ffn.expert_dim=136",
    "model.mtp.block.ffn.expert_dim=136",
)


def _with_model(config, **changes):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def _deepseek(yarn, mtp_depth, **changes):
    """nano with YaRN and a changed mixture."""
    config = preset("nano")
    dense, moe = config.model.stacks
    mixture = moe.blocks[0].ffn
    assert isinstance(mixture, MoeConfig)
    mixture = dataclasses.replace(mixture, **changes)
    attention = dataclasses.replace(moe.blocks[0].attention, rope=RopeConfig(theta=20.0, yarn=yarn))
    experts = BlockConfig(attention=attention, ffn=mixture)
    first = dataclasses.replace(dense.blocks[0], attention=attention)
    return _with_model(
        config,
        stacks=(
            dataclasses.replace(dense, blocks=(first,)),
            dataclasses.replace(moe, blocks=(experts,)),
        ),
        mtp=MtpConfig(depth=mtp_depth, block=experts) if mtp_depth else None,
    )


def _llama():
    """Llama 3's rope, biases, an untied head, and heads wider than width / heads."""
    config = preset("nano_dense")
    (stack,) = config.model.stacks
    rope = RopeConfig(theta=20.0, llama3=Llama3RopeConfig(factor=8.0, original_max_positions=32))
    attention = GqaConfig(
        num_heads=4, num_kv_heads=2, head_dim=12, rope=rope, qkv_bias=True, out_bias=True
    )
    block = dataclasses.replace(stack.blocks[0], attention=attention)
    stack = StackConfig(name=stack.name, repeats=stack.repeats, blocks=(block,))
    return _with_model(config, stacks=(stack,), tie_embeddings=False, norm_eps=1e-5)


CONFIGS = {
    "deepseek_v2": lambda: _deepseek(
        YarnConfig(factor=4.0, original_max_positions=16, mscale=0.707, mscale_all_dim=0.707),
        mtp_depth=0,
        score="softmax",
        group_score="max",
        normalize_gates=False,
        balance_bias=False,
        balance_counts="selected",
        gate_scale=4.0,
    ),
    "deepseek_v3": lambda: _deepseek(YARN, mtp_depth=2),
    "deepseek_v3_wide": lambda: override(preset("nano"), *WIDE),
    "llama": _llama,
    "qwen2": lambda: preset("nano_dense"),
}
EXPORTS = [
    *((name, dtype) for name in CONFIGS for dtype in ("float32", "bfloat16") if "wide" not in name),
    ("deepseek_v3_wide", "fp8"),
]


@functools.cache
def ours(name):
    """A model whose every array is drawn at random, at scales that let everything matter."""
    lm = dsjax.init(CONFIGS[name](), seed=3)
    rng = np.random.default_rng(5)

    def drawn(path, w):
        key, noise = jax.tree_util.keystr(path), rng.standard_normal(w.shape).astype(np.float32)
        if "norm" in key:
            return jnp.asarray(1 + 0.2 * noise)
        if "'b_" in key or "embed" in key:
            return jnp.asarray(0.5 * noise)
        return jnp.asarray(noise * np.float32(1.5 / np.sqrt(lm.config.model.embed_dim)))

    lm.params = jax.tree_util.tree_map_with_path(drawn, lm.params)
    lm.bias = jax.tree.map(
        lambda b: jnp.asarray(rng.normal(-0.7, 0.25, b.shape), jnp.float32), lm.bias
    )
    return lm


@pytest.fixture(scope="session")
def exchanged(once):
    """A folder of exports, and what transformers made of each of them."""

    def make(folder):
        for name, dtype in EXPORTS:
            # Several files in one case, one in the others.
            most = {"shard_bytes": 100_000} if (name, dtype) == ("deepseek_v3", "float32") else {}
            ours(name).save_pretrained(folder / "exports" / f"{name}-{dtype}", dtype, **most)
        np.save(folder / "ids.npy", IDS)
        script = ROOT / "tests" / "oracle" / "read_exports.py"
        done = subprocess.run([PEER, script, folder], capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-4000:]
        return str(folder / "exports")

    return pathlib.Path(once("exchanged", make))


def without_mtp(params, bias):
    """What transformers keeps of a model."""
    params = {name: leaf for name, leaf in params.items() if name != "mtp_modules"}
    return params, {name: leaf for name, leaf in bias.items() if name != "mtp"}


def rounded(tree, dtype):
    """float32 leaves as an export in a dtype leaves them, read as float32."""
    return jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), tree)


@pytest.mark.parametrize(("name", "dtype"), EXPORTS)
class TestExports:
    pytestmark = live

    def test_peer_finds_every_tensor(self, exchanged, name, dtype):
        """None missing, none of another shape, none too many but those of MTP."""
        report = json.loads((exchanged / f"{name}-{dtype}.json").read_text())
        assert report["missing_keys"] == report["mismatched_keys"] == report["error_msgs"] == []
        model = ours(name).config.model
        depth = 0 if model.mtp is None else model.mtp.depth
        prefixes = tuple(hf.LAYER.format(model.num_layers + k) for k in range(depth))
        mtp = {e.name for e in hf.entries(model) if depth and e.name.startswith(prefixes)}
        # transformers tells of experts by the names they have in its memory.
        mtp = {re.sub(r"\d+\.(gate|up)_proj.weight$", "gate_up_proj", name) for name in mtp}
        mtp = {re.sub(r"\d+\.down_proj.weight$", "down_proj", name) for name in mtp}
        assert set(report["unexpected_keys"]) == mtp

    def test_peer_computes_the_same(self, exchanged, name, dtype):
        """Logits, those of multi-token prediction among them."""
        folder = exchanged / f"{name}-{dtype}"
        report = json.loads(folder.with_suffix(".json").read_text())
        for gap in ("min_gap_expert", "min_gap_group"):
            assert (report.get(gap) or 1.0) > MIN_ROUTER_GAP
        lm = dsjax.load_pretrained(folder, dtype="float32")
        wanted = np.load(folder.with_suffix(".npz"))
        got = forward(lm.graphdef, lm.params, lm.bias, IDS)
        assert len(got) == len(wanted.files)
        assert_near(got[0], wanted["logits"])
        for k, logits in enumerate(got[1:]):
            assert_near(logits, wanted[f"mtp_{k}"])

    def test_circle_closes(self, exchanged, name, dtype):
        """Ours, exported, read and saved by transformers, loaded: the same bits, without MTP."""
        lm = ours(name)
        back = dsjax.load_pretrained(exchanged / f"{name}-{dtype}.again")
        assert back.config.model.mtp is None
        if dtype == "fp8":
            wanted = dsjax.load_pretrained(exchanged / f"{name}-{dtype}", dtype="float32")
            assert_same((back.params, back.bias), without_mtp(wanted.params, wanted.bias))
            # Within FP8's three bits of mantissa.
            assert_trees_near(without_mtp(wanted.params, {}), without_mtp(lm.params, {}), 0.04)
            return
        params, bias = without_mtp(lm.params, lm.bias)
        assert_same((back.params, back.bias), (rounded(params, dtype), bias))


@pytest.mark.slow
@pytest.mark.skipif(not PEER.exists(), reason="no transformers here: make oracle")
def test_fp8_is_what_the_published_rule_reads(exchanged):
    """torch's weight times scale by blocks of 128x128, and our float32: the same bits."""
    folder = exchanged / "deepseek_v3_wide-fp8"
    lm = dsjax.load_pretrained(folder, dtype="float32")
    plain = dsjax.load_pretrained(folder.with_name(f"{folder.name}.plain"), dtype="float32")
    assert_same((plain.params, plain.bias), (lm.params, lm.bias))
