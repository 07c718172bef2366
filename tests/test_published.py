"""Published checkpoints in and out: configuration, names, FP8 blocks, streaming, round trips."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

import dsjax
from dsjax.config import GqaConfig, RopeConfig
from dsjax.errors import InputError, RunError
from dsjax.interop import fp8, hf, hf_config, save
from dsjax.interop.published import Published, convert, planned
from dsjax.overrides import override
from dsjax.plan.count import parameter_counts
from dsjax.precision import Quantized
from dsjax.presets import preset
from experiments import convert as convert_script
from experiments import pretrain as pretrain_script
from sharding.mesh import MeshShape, make_mesh
from sharding.rules import AxisRules
from tests.golden_cases import FOLDER, MODELS, model_config
from tests.helpers import assert_near

TOKENS = np.random.default_rng(1).integers(0, 512, (1, 16)).astype(np.int32)
# Several blocks a side, uneven edges, heads that no block boundary falls on.
BLOCKY = (
    "model.embed_dim=160",
    *(
        f"model.{block}.attention.{field}"
        for block in ("stacks.dense.blocks.0", "stacks.moe.blocks.0", "mtp.block")
        for field in ("kv_latent_dim=136", "q_latent_dim=144", "nope_dim=96", "value_dim=48")
    ),
    "model.stacks.dense.blocks.0.ffn.hidden_dim=320",
    "model.stacks.moe.blocks.0.ffn.expert_dim=136",
    "model.mtp.block.ffn.expert_dim=136",
)


def refused(function, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def filled(config, seed=0):
    """A model whose every array is drawn at random, norms and balancing biases included."""
    lm = dsjax.init(config)
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(rng.standard_normal(leaf.shape) * 0.1 + 0.05, leaf.dtype)

    params, bias = jax.tree.map(draw, (lm.params, lm.bias))
    return dsjax.LanguageModel(lm.config, lm.graphdef, params, bias, None)


def tensors_of(folder):
    """Every tensor of a folder as (dtype, bytes)."""
    with Published(folder) as published:
        return {
            name: (info.dtype, published.folder.read(name).tobytes())
            for name, info in published.folder.infos.items()
        }


@pytest.fixture(scope="module")
def blocky():
    return filled(override(preset("nano"), *BLOCKY))


@pytest.fixture(scope="module")
def folders(blocky, tmp_path_factory):
    """The same model in every form: {name: folder}."""
    base = tmp_path_factory.mktemp("published")
    forms = {
        "float32": {"dtype": "float32"},
        "bfloat16": {"dtype": "bfloat16"},
        "fp8": {"dtype": "fp8"},
        "power_of_two": {"dtype": "fp8", "scale_format": "power_of_two"},
        "e8m0": {"dtype": "fp8", "scale_format": "e8m0"},
    }
    for name, how in forms.items():
        blocky.save_pretrained(base / name, **how)
    return {name: base / name for name in forms}


# ------------------------------------------------------------------------------------ config.json


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spelling", ["config", "config_published"])
def test_both_spellings_describe_the_model(name, spelling):
    facts = json.loads((FOLDER / f"{name}.json").read_text())
    got = hf_config.model_config(facts[spelling])
    wanted = model_config(facts["config_published"])
    wanted = dataclasses.replace(wanted, init_std=0.02, max_positions=64)
    assert hf_config.computes_alike(got, wanted)


@pytest.mark.parametrize(
    "name",
    [
        *("deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "nano", "tiny", "small"),
        *("r1_distill_qwen_1_5b", "r1_distill_qwen_7b", "r1_distill_qwen_14b"),
        *("r1_distill_qwen_32b", "r1_distill_llama_8b", "r1_distill_llama_70b"),
        *("deepseek_llm_7b", "deepseek_coder_6_7b", "nano_dense"),
    ],
)
def test_a_presets_config_reads_back(name):
    model = preset(name).model
    content = json.loads(json.dumps(hf_config.published_config(model)))
    assert hf_config.computes_alike(hf_config.model_config(content), model)


def v3(**changes):
    return hf_config.published_config(preset("nano").model) | changes


def dense(**changes):
    content = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
    }
    return content | changes


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (v3(use_qk_norm=True), "unknown field 'use_qk_norm'"),
        (v3(index_topk=2048), "unknown field 'index_topk'"),
        (v3(hidden_act="gelu"), "'hidden_act' is \"gelu\""),
        (v3(scoring_func="softmax"), "'scoring_func' is \"softmax\""),
        (v3(topk_method="greedy"), "'topk_method'"),
        (v3(rope_interleave=False), "'rope_interleave' is false"),
        (v3(attention_bias=True), "'attention_bias' is true"),
        (v3(num_key_value_heads=1), "'num_key_value_heads' is 1"),
        (v3(moe_layer_freq=2), "'moe_layer_freq' is 2"),
        (v3(rope_scaling={"type": "dynamic", "factor": 2.0}), "'type' is \"dynamic\""),
        (v3(rope_scaling={"type": "yarn", "factor": 4.0, "mscale": 1.0}), "'mscale' is 1.0"),
        (v3(rope_scaling={"type": "yarn", "factor": 4.0, "attention_factor": 3.0}), "attention_f"),
        (v3(quantization_config={"quant_method": "gptq"}), "'quant_method' is \"gptq\""),
        (v3(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}), "64"),
        (v3(vocab_size=None), "has no 'vocab_size'"),
        (v3(vocab_size="512"), "'vocab_size' must be int"),
        (v3(vocab_size=-1), "vocab_size is -1"),
        (v3(n_group=3), "8 experts do not divide into 3 groups"),
        (v3(num_hidden_layers=10**9), "must lie in [0, 1000]"),
        (v3(n_routed_experts=10**9), "must lie in [0, 4096]"),
        (v3(model_type="mixtral"), "model_type is 'mixtral'"),
        (v3(model_type=["deepseek_v3"]), "model_type is ['deepseek_v3']"),
        (v3(rms_norm_eps=float("nan")), "'rms_norm_eps' must be float"),
        (dense(model_type="qwen2", use_sliding_window=True), "'use_sliding_window' is true"),
        (dense(model_type="qwen2", layer_types=["sliding_attention"] * 2), "'layer_types'"),
        (dense(num_key_value_heads=3), "4 heads do not divide over 3"),
        (dense(hidden_size=30), "30 does not divide into 4 heads"),
        (dense(mlp_bias=True), "'mlp_bias' is true"),
        (dense(partial_rotary_factor=0.5), "'partial_rotary_factor' is 0.5"),
        (dense(attention_dropout=0.1), "'attention_dropout' is 0.1"),
        (dense(rope_parameters={"rope_type": "longrope"}), "longrope"),
        (dense(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor"),
        (dense(rope_parameters={"rope_type": "linear", "factor": 2.0, "new": 1}), "'new'"),
    ],
)
def test_what_changes_the_mathematics_is_refused_by_name(content, says):
    assert says in refused(hf_config.model_config, content)


@pytest.mark.parametrize(
    "name",
    [
        *("routed_scaling_factor", "n_group", "topk_group", "n_shared_experts", "norm_topk_prob"),
        *("first_k_dense_replace", "rms_norm_eps", "kv_lora_rank", "num_experts_per_tok"),
    ],
)
def test_what_is_not_said_is_not_guessed(name):
    content = v3()
    del content[name]
    assert f"has no '{name}'" in refused(hf_config.model_config, content)


def test_unknown_fields_can_be_let_pass():
    assert hf_config.model_config(v3(novelty=1), ignore=("novelty",)) == preset("nano").model
    assert hf_config.model_config(v3(novelty=None)) == preset("nano").model


def test_dense_models_have_their_own_attention():
    llama3 = {
        "rope_theta": 5e5,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    content = dense(num_key_value_heads=2, head_dim=16, rope_parameters=llama3)
    attention = hf_config.model_config(content).stacks[0].blocks[0].attention
    assert isinstance(attention, GqaConfig)
    assert (attention.num_kv_heads, attention.head_dim, attention.qkv_bias) == (2, 16, False)
    assert attention.rope.theta == 5e5
    assert attention.rope.llama3.original_max_positions == 16
    qwen = hf_config.model_config(dense(model_type="qwen2", tie_word_embeddings=True))
    assert qwen.tie_embeddings
    assert qwen.stacks[0].blocks[0].attention.qkv_bias
    coder = dense(rope_theta=1e5, rope_scaling={"type": "linear", "factor": 4.0})
    rope = hf_config.model_config(coder).stacks[0].blocks[0].attention.rope
    assert rope == RopeConfig(theta=1e5, linear_factor=4.0)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.mtp=null", "model.stacks.moe.blocks.0.ffn.balance_bias=false"], "balancing bias"),
        (["model.stacks.moe.blocks.0.attention.rope.theta=5.0"], "attention of layer 1"),
        (["model.mtp.block.ffn.gate_scale=1.0"], "multi-token prediction differs"),
        (["model.mtp=null", "model.stacks.moe.blocks.0.ffn.score=softmax"], "softmax scores"),
    ],
)
def test_what_no_architecture_computes_is_not_exported(overrides, says):
    model = override(preset("nano"), *overrides).model
    assert says in refused(hf_config.published_config, model)


# ------------------------------------------------------------------------------------------ names


def test_v3s_export_lists_the_published_tensors(tmp_path, capsys):
    out = tmp_path / "index.json"
    arguments = ["--preset=deepseek_v3", "--dtype=fp8", "--dry_run", f"--index_out={out}"]
    assert convert_script.main(["convert", *arguments]) == 0
    assert "91,991 tensors (316 BF16, 45,867 F32, 45,808 F8_E4M3)" in capsys.readouterr().out
    index = json.loads(out.read_text())
    assert len(index) == 91_991
    layer = "model.layers.61."
    wanted = {
        "model.embed_tokens.weight": ([129280, 7168], "BF16"),
        "lm_head.weight": ([129280, 7168], "BF16"),
        "model.layers.0.mlp.down_proj.weight": ([7168, 18432], "F8_E4M3"),
        "model.layers.0.mlp.down_proj.weight_scale_inv": ([56, 144], "F32"),
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": ([576, 7168], "F8_E4M3"),
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv": ([5, 56], "F32"),
        "model.layers.3.self_attn.q_b_proj.weight": ([24576, 1536], "F8_E4M3"),
        "model.layers.3.self_attn.kv_a_layernorm.weight": ([512], "BF16"),
        "model.layers.3.mlp.gate.weight": ([256, 7168], "BF16"),
        "model.layers.3.mlp.gate.e_score_correction_bias": ([256], "F32"),
        "model.layers.60.mlp.experts.255.up_proj.weight": ([2048, 7168], "F8_E4M3"),
        layer + "embed_tokens.weight": ([129280, 7168], "BF16"),
        layer + "eh_proj.weight": ([7168, 14336], "BF16"),
        layer + "enorm.weight": ([7168], "BF16"),
        layer + "hnorm.weight": ([7168], "BF16"),
        layer + "shared_head.norm.weight": ([7168], "BF16"),
        layer + "shared_head.head.weight": ([129280, 7168], "BF16"),
        layer + "mlp.experts.0.gate_proj.weight_scale_inv": ([16, 56], "F32"),
    }
    for name, (shape, dtype) in wanted.items():
        assert index[name] == {"shape": shape, "dtype": dtype}, name
    assert "model.layers.0.mlp.gate.weight" not in index  # dense
    assert layer + "eh_proj.weight_scale_inv" not in index


@pytest.mark.parametrize("name", ["nano", "nano_dense", "deepseek_v2_lite", "deepseek_v3"])
def test_the_plan_holds_every_parameter(name):
    config = preset(name)
    counts = parameter_counts(config)
    plan = planned(config.model, "float32")
    copies = [e.name for e in hf.entries(config.model) if e.copy or e.path[0] == "router_bias"]
    numbers = sum(int(np.prod(t["shape"])) for n, t in plan.items() if n not in copies)
    assert numbers == counts.total + counts.mtp


# -------------------------------------------------------------------------------------------- FP8


def slow_dequantized(q, scale):
    """Element by element."""
    out = np.empty(q.shape, np.float32)
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            out[i, j] = np.float32(q[i, j]) * scale[i // 128, j // 128]
    return out


def random_fp8(rng, shape):
    """Every bit pattern but NaN's, zeros of both signs included."""
    bits = rng.integers(0, 256, shape, dtype=np.uint8)
    return np.where(bits & 0x7F == 0x7F, 0x00, bits).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("shape", [(576, 200), (128, 128), (1, 130), (64, 40)])
def test_blocks_and_their_edges(shape, rng):
    q = random_fp8(rng, shape)
    scale = rng.uniform(1e-4, 1e-2, fp8.blocks(shape)).astype(np.float32)
    assert fp8.blocks((576, 7168)) == (5, 56)
    wide = np.asarray(fp8.decoded(q, scale, "float32"))
    np.testing.assert_array_equal(wide, slow_dequantized(q, scale))
    # Under the same scales, the same bits: for negative zero and subnormals, too.
    back = np.asarray(fp8.encode(wide, scale))
    assert back.tobytes() == q.tobytes()
    assert np.asarray(fp8.kept_by(wide, scale)).all()
    assert not np.asarray(fp8.kept_by(wide * np.float32(1.001), scale)).any()


@pytest.mark.parametrize("scale_format", ["float32", "power_of_two"])
def test_fresh_scales_use_the_whole_range(scale_format, rng):
    x = rng.standard_normal((300, 260)).astype(np.float32)
    x[:128, :128] = 0.0
    amax = np.asarray(fp8.amax(x))
    assert amax[0, 0] == 0.0
    assert amax[2, 1] == np.abs(x[256:, 128:256]).max()
    scale = fp8.choose_scale(amax, scale_format)
    assert scale[0, 0] == 1.0
    largest = (amax / scale)[amax > 0]
    if scale_format == "power_of_two":
        assert fp8.is_power_of_two(scale)
        assert ((largest > 224) & (largest <= 448)).all()
    else:
        np.testing.assert_allclose(largest, 448, rtol=1e-6)
    wide = np.asarray(fp8.decoded(fp8.encode(x, scale), scale, "float32"))
    # Half of a step of three bits, 2**-4 of a number; of subnormals, half of the smallest.
    spread = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:300, :260]
    assert (np.abs(wide - x) <= np.maximum(np.abs(x) * 2**-4, spread * 2**-10) * 1.0001).all()


def test_powers_of_two_stay_what_they_are():
    amax = np.float32([[448.0, 224.0, 448.0 * (1 + 2**-20), 3.5e-36]])
    scale = fp8.choose_scale(amax, "power_of_two")
    np.testing.assert_array_equal(scale[0, :3], np.float32([1.0, 0.5, 2.0]))
    assert scale[0, 3] == 2.0**-116  # the smallest, as training in FP8 has it


# ------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize(
    "form",
    [
        *("float32", "bfloat16", "fp8"),
        *(pytest.param(form, marks=pytest.mark.nightly) for form in ("power_of_two", "e8m0")),
    ],
)
def test_import_and_export_are_inverse_bit_for_bit(folders, form, tmp_path):
    dtype = form if form in save.DTYPES else "fp8"
    lm = dsjax.load_pretrained(folders[form])
    assert lm.config.precision.param_dtype == ("float32" if form == "float32" else "bfloat16")
    lm.save_pretrained(tmp_path / "again", dtype=dtype)
    assert tensors_of(tmp_path / "again") == tensors_of(folders[form])
    assert (tmp_path / "again/config.json").read_text() == (
        folders[form] / "config.json"
    ).read_text()
    again = dsjax.load_pretrained(tmp_path / "again")
    for a, b in zip(
        jax.tree.leaves((again.params, again.bias)),
        jax.tree.leaves((lm.params, lm.bias)),
        strict=True,
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("form", ["fp8", "power_of_two", "e8m0"])
def test_float32_masters_of_fp8_give_the_same_bits_back(folders, form, tmp_path):
    lm = dsjax.load_pretrained(folders[form], dtype="float32")
    assert not any(isinstance(x, Quantized) for x in jax.tree.leaves(lm.params))
    lm.save_pretrained(tmp_path / "again", dtype="fp8")
    assert tensors_of(tmp_path / "again") == tensors_of(folders[form])


@pytest.mark.parametrize("scales", ["any", "halves"])
def test_masters_of_arbitrary_fp8_give_the_same_bits_back(folders, scales, tmp_path, rng):
    """Scales that no maximum of a block leads to, as published powers of two are."""
    source = tmp_path / "source"
    shutil.copytree(folders["fp8"], source)
    tensors = load_file_bits(source)
    for name, (dtype, x) in list(tensors.items()):
        if dtype == "F8_E4M3":
            q = random_fp8(rng, x.shape)
            scale = rng.uniform(1e-4, 1e-2, fp8.blocks(x.shape)).astype(np.float32)
            if scales == "halves":
                scale = np.exp2(rng.integers(-12, -4, scale.shape)).astype(np.float32)
            tensors[name] = dtype, q
            tensors[name + hf.SCALE_SUFFIX] = "F32", scale
    write_bits(source, tensors)
    lm = dsjax.load_pretrained(source, dtype="float32")
    w = np.asarray(lm.params["stacks"]["moe"][0]["ffn"]["w_down_EFD"])[1, 3]
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    wanted = slow_dequantized(tensors[name][1], tensors[name + hf.SCALE_SUFFIX][1])
    np.testing.assert_array_equal(w, wanted.T)
    lm.save_pretrained(tmp_path / "again", dtype="fp8")
    assert tensors_of(tmp_path / "again") == tensors_of(source)


def load_file_bits(folder):
    """{name: (dtype, array)}, safetensors' own reader having no FP8 for NumPy."""
    with Published(folder) as published:
        return {
            name: (info.dtype, np.array(published.folder.read(name)))
            for name, info in published.folder.infos.items()
        }


def write_bits(folder, tensors):
    from dsjax.interop.tensor_files import TensorSpec, plan_shards, write_shard

    (folder / "model.safetensors").unlink()
    plan = {name: TensorSpec(dtype, x.shape) for name, (dtype, x) in tensors.items()}
    for shard in plan_shards(plan, 10**12):
        write_shard(folder, shard, lambda name: [tensors[name][1]])


def test_a_changed_block_gets_a_scale_of_its_own(folders, tmp_path):
    lm = dsjax.load_pretrained(folders["fp8"], dtype="float32")
    block = lm.params["stacks"]["dense"][0]["ffn"]
    block["w_down_FD"] = block["w_down_FD"].at[0, 5, 150].set(10.0)  # published [150, 5]
    lm.save_pretrained(tmp_path / "tuned", dtype="fp8")
    before, after = tensors_of(folders["fp8"]), tensors_of(tmp_path / "tuned")
    changed = {name for name in before if before[name] != after[name]}
    name = "model.layers.0.mlp.down_proj.weight"
    assert changed == {name, name + hf.SCALE_SUFFIX}
    scales = [
        np.frombuffer(t[name + hf.SCALE_SUFFIX][1], np.float32).reshape(2, 3)
        for t in (before, after)
    ]
    assert (scales[0] != scales[1]).tolist() == [[False] * 3, [True, False, False]]


def test_fp8_is_not_made_of_rounded_weights_unasked(folders, tmp_path):
    for lm in (
        dsjax.load_pretrained(folders["bfloat16"]),
        dsjax.load_pretrained(folders["bfloat16"], dtype="float32"),
        dsjax.load_pretrained(folders["fp8"], dtype="bfloat16"),
    ):
        assert "requantize" in refused(lm.save_pretrained, tmp_path / "out", dtype="fp8")
        assert not (tmp_path / "out").exists()
    lm.save_pretrained(tmp_path / "out", dtype="fp8", requantize=True)
    assert "holds no FP8" in refused(dsjax.load_pretrained, folders["bfloat16"], dtype="fp8")


def test_scales_become_powers_of_two_only_by_rounding_again(folders, tmp_path):
    lm = dsjax.load_pretrained(folders["fp8"])
    said = refused(lm.save_pretrained, tmp_path / "out", dtype="fp8", scale_format="e8m0")
    assert "no powers of two" in said
    lm.save_pretrained(tmp_path / "out", dtype="fp8", scale_format="e8m0", requantize=True)
    assert "F8_E8M0" in {dtype for dtype, _ in tensors_of(tmp_path / "out").values()}
    # The other way nothing is rounded.
    lm = dsjax.load_pretrained(folders["e8m0"])
    lm.save_pretrained(tmp_path / "wide", dtype="fp8", scale_format="float32")
    before, after = tensors_of(folders["e8m0"]), tensors_of(tmp_path / "wide")
    for name, (dtype, content) in before.items():
        if dtype == "F8_E8M0":
            scale = np.frombuffer(content, ml_dtypes.float8_e8m0fnu).astype(np.float32)
            assert after[name] == ("F32", scale.tobytes())
        else:
            assert after[name] == (dtype, content)


@pytest.mark.parametrize("scale_format", ["power_of_two", "e8m0"])
def test_masters_take_scales_of_the_format_asked_for(folders, scale_format, tmp_path):
    lm = dsjax.load_pretrained(folders["fp8"], dtype="float32")  # of scales that are none
    lm.save_pretrained(tmp_path / "out", dtype="fp8", scale_format=scale_format)
    back = dsjax.load_pretrained(tmp_path / "out", dtype="float32")
    for a, b in zip(jax.tree.leaves(lm.params), jax.tree.leaves(back.params), strict=True):
        assert np.abs(a - b).max() <= np.abs(a).max() * 2**-4
    for name, (dtype, content) in tensors_of(tmp_path / "out").items():
        if name.endswith(hf.SCALE_SUFFIX):
            kind = {"F32": np.float32, "F8_E8M0": ml_dtypes.float8_e8m0fnu}[dtype]
            scale = np.frombuffer(content, kind).astype(np.float32)
            assert fp8.is_power_of_two(scale[None]), name


def test_scales_are_rounded_before_weights_are_encoded(folders, tmp_path):
    """Scales kept in BF16: a changed weight is encoded under the scale that is written."""
    source = tmp_path / "source"
    shutil.copytree(folders["fp8"], source)
    tensors = load_file_bits(source)
    for name, (_, x) in list(tensors.items()):
        if name.endswith(hf.SCALE_SUFFIX):
            tensors[name] = "BF16", x.astype(ml_dtypes.bfloat16)
    write_bits(source, tensors)
    lm = dsjax.load_pretrained(source, dtype="float32")
    lm.save_pretrained(tmp_path / "same", dtype="fp8")
    assert tensors_of(tmp_path / "same") == tensors_of(source)
    block = lm.params["stacks"]["dense"][0]["ffn"]
    block["w_down_FD"] = block["w_down_FD"] * 1.2345
    lm.save_pretrained(tmp_path / "tuned", dtype="fp8")
    back = dsjax.load_pretrained(tmp_path / "tuned", dtype="float32")
    got = np.asarray(back.params["stacks"]["dense"][0]["ffn"]["w_down_FD"])
    wanted = np.asarray(block["w_down_FD"])
    assert np.abs(got - wanted).max() <= np.abs(wanted).max() * 2**-5
    # A block's largest number is its 448: it comes back but for the scale's own rounding up.
    assert abs(np.abs(got).max() / np.abs(wanted).max() - 1) < 2**-4


def test_layers_that_were_not_quantized_stay_so(folders, tmp_path):
    """`modules_to_not_convert`: the dense layer's feed-forward matrices are BF16."""
    source = tmp_path / "source"
    shutil.copytree(folders["fp8"], source)
    content = json.loads((source / "config.json").read_text())
    content["quantization_config"]["modules_to_not_convert"] = ["model.layers.0.mlp"]
    (source / "config.json").write_text(json.dumps(content))
    tensors = load_file_bits(source)
    for name in [n for n in tensors if "layers.0.mlp" in n and not n.endswith(hf.SCALE_SUFFIX)]:
        wide = slow_dequantized(tensors[name][1], tensors.pop(name + hf.SCALE_SUFFIX)[1])
        tensors[name] = "BF16", wide.astype(ml_dtypes.bfloat16)
    write_bits(source, tensors)
    with Published(source) as published:
        convert(published, tmp_path / "copy", "fp8")
    dsjax.load_pretrained(source).save_pretrained(tmp_path / "kept", dtype="fp8")
    wide = dsjax.load_pretrained(source, dtype="float32")
    wide.save_pretrained(tmp_path / "masters", dtype="fp8")
    for name in ("copy", "kept", "masters"):
        assert tensors_of(tmp_path / name) == tensors_of(source), name
        assert "modules_to_not_convert" in (tmp_path / name / "config.json").read_text()


def test_other_types_come_back_too(folders, tmp_path):
    """float16 throughout, or BF16 with norms in F32: what BF16 would round is kept wide."""

    def half(tensors):
        for name, x in tensors.items():
            tensors[name] = x.astype(np.float16)

    lm = dsjax.load_pretrained(edited(folders["float32"], tmp_path / "half", half))
    assert lm.config.precision.compute_dtype == "float32"
    lm.save_pretrained(tmp_path / "half again")
    assert tensors_of(tmp_path / "half again") == tensors_of(tmp_path / "half")
    assert "requantize" in refused(lm.save_pretrained, tmp_path / "x", dtype="fp8")

    mixed = tmp_path / "mixed"
    shutil.copytree(folders["bfloat16"], mixed)
    tensors = load_file_bits(mixed)
    for name, (_, x) in list(tensors.items()):
        if name.endswith("norm.weight"):
            tensors[name] = "F32", x.astype(np.float32) * np.float32(1.00001)
    write_bits(mixed, tensors)
    dsjax.load_pretrained(mixed).save_pretrained(tmp_path / "mixed again")
    assert tensors_of(tmp_path / "mixed again") == tensors_of(mixed)


@pytest.mark.parametrize("scale", [1e-40, 2.0**-126, 1e37])
def test_scales_that_float32_cannot_follow(folders, tmp_path, scale):
    source = tmp_path / "source"
    shutil.copytree(folders["fp8"], source)
    tensors = load_file_bits(source)
    name = "model.layers.0.mlp.up_proj.weight"
    for value in (np.float32(scale),):
        tensors[name + hf.SCALE_SUFFIX][1][0, 0] = value
    write_bits(source, tensors)
    assert "which float32 cannot follow" in refused(dsjax.load_pretrained, source, dtype="float32")
    tensors[name][1][:128, :128] = -0.0  # a block of zeros may have any, and keeps it
    write_bits(source, tensors)
    dsjax.load_pretrained(source, dtype="float32").save_pretrained(tmp_path / "out", dtype="fp8")
    assert tensors_of(tmp_path / "out") == tensors_of(source)


def test_what_is_not_finite_has_no_fp8(blocky, tmp_path):
    params = jax.tree.map(lambda x: x, blocky.params)
    block = params["stacks"]["dense"][0]["ffn"]
    block["w_down_FD"] = block["w_down_FD"].at[0, 0, 0].set(np.inf)
    lm = dsjax.LanguageModel(blocky.config, blocky.graphdef, params, blocky.bias, None)
    assert "not finite" in refused(lm.save_pretrained, tmp_path / "out", dtype="fp8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p.pop("final_norm_D"), "the model has no final_norm_D"),
        (lambda p: p.update(embed_VD=p["embed_VD"][:-1]), "embed_VD has shape [511, 160]"),
    ],
)
def test_arrays_of_another_model_are_not_exported(blocky, tmp_path, change, says):
    params = dict(blocky.params)
    change(params)
    lm = dsjax.LanguageModel(blocky.config, blocky.graphdef, params, blocky.bias, None)
    assert says in refused(lm.save_pretrained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_quantized_leaves_compute_what_their_masters_do(folders):
    kept = dsjax.load_pretrained(
        folders["fp8"],
        overrides=["precision.compute_dtype=float32", "precision.param_dtype=float32"],
    )
    leaves = jax.tree.leaves(kept.params, is_leaf=lambda x: isinstance(x, Quantized))
    kinds = [group[0].kind for group in hf.by_leaf(kept.config.model).values()]
    assert sum(isinstance(leaf, Quantized) for leaf in leaves) == kinds.count("fp8") > 20
    wide = dsjax.load_pretrained(folders["fp8"], dtype="float32")
    prompts = [[5, 6, 7], [8]]
    a, b = (lm.generate_tokens(prompts, max_tokens=6) for lm in (kept, wide))  # few experts a step
    np.testing.assert_array_equal(a.tokens_BG, b.tokens_BG)
    assert_near(kept.logits(TOKENS), wide.logits(TOKENS))


def test_mtp_travels_both_ways(blocky, folders):
    lm = dsjax.load_pretrained(folders["float32"])
    for a, b in zip(
        jax.tree.leaves(lm.params["mtp_modules"]),
        jax.tree.leaves(blocky.params["mtp_modules"]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(lm.bias["mtp"], blocky.bias["mtp"])
    tensors = load_file(folders["float32"] / "model.safetensors")
    # [enorm(embedding) ; hnorm(hidden)]: the embedding's columns come first.
    np.testing.assert_array_equal(
        tensors["model.layers.3.eh_proj.weight"],
        np.asarray(lm.params["mtp_modules"][0]["w_proj_2DD"]).T,
    )
    for copy, main in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        np.testing.assert_array_equal(
            tensors[f"model.layers.3.{copy}.weight"], tensors[f"{main}.weight"]
        )


def edited(source, folder, edit):
    """A copy of a folder with its tensors changed by `edit(dict)`."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_mtp_may_be_missing_or_left_out(blocky, folders, tmp_path):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    lm = dsjax.load_pretrained(edited(folders["float32"], tmp_path / "none", drop))
    assert lm.config.model.mtp is None
    lm.save_pretrained(tmp_path / "again", dtype="float32")
    assert json.loads((tmp_path / "again/config.json").read_text())["num_nextn_predict_layers"] == 0

    def own(tensors):
        tensors["model.layers.3.embed_tokens.weight"] = (
            tensors["model.layers.3.embed_tokens.weight"] + 1
        )

    other = edited(folders["float32"], tmp_path / "own", own)
    assert "model.layers.3.embed_tokens.weight is not" in refused(dsjax.load_pretrained, other)
    lm = dsjax.load_pretrained(other, overrides=["model.mtp=null"])
    assert_near(lm.logits(TOKENS), blocky.logits(TOKENS))


def test_tied_embeddings_are_written_once(tmp_path):
    lm = filled(preset("nano_dense"))
    lm.save_pretrained(tmp_path / "out", dtype="float32")
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert "lm_head.weight" not in tensors
    back = dsjax.load_pretrained(tmp_path / "out")
    tokens = TOKENS % lm.config.model.vocab_size
    np.testing.assert_array_equal(back.logits(tokens), lm.logits(tokens))

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    def differ(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    dsjax.load_pretrained(edited(tmp_path / "out", tmp_path / "same", repeat))
    other = edited(tmp_path / "out", tmp_path / "other", differ)
    assert "to which it is tied" in refused(dsjax.load_pretrained, other)


def test_what_the_source_said_is_handed_back(folders, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folders["bfloat16"], source)
    content = json.loads((source / "config.json").read_text())
    content |= {"auto_map": {"AutoModel": "code.Model"}, "aux_loss_alpha": 0.001, "bos_token_id": 7}
    content["novelty"] = 1
    (source / "config.json").write_text(json.dumps(content))
    generation = b'{"eos_token_id": [5, 9], "temperature": 0.6}\n'
    (source / "generation_config.json").write_bytes(generation)
    lm = dsjax.load_pretrained(source, ignore=["novelty"])
    assert lm.stop_ids == (5, 9)
    lm.save_pretrained(tmp_path / "out")
    back = json.loads((tmp_path / "out/config.json").read_text())
    assert (back["aux_loss_alpha"], back["novelty"]) == (0.001, 1)
    assert back["bos_token_id"] == 7
    assert "auto_map" not in back  # its code is not handed on
    assert (tmp_path / "out/generation_config.json").read_bytes() == generation


# -------------------------------------------------------------------------------------- streaming


@pytest.mark.nightly
def test_each_device_reads_what_it_holds(folders, monkeypatch, tmp_path):
    from dsjax.interop import load as load_module

    monkeypatch.setattr(load_module, "PIECE_BYTES", 2**16)
    mesh = make_mesh(MeshShape(fsdp=2, expert=2, tensor=2))
    rules = AxisRules(embed="fsdp", heads="tensor", experts="expert", mlp="tensor", vocab="tensor")
    short = {"overrides": ["model.mtp=null"]}  # a program a shape and device
    wanted = dsjax.load_pretrained(folders["fp8"], **short)
    lm = dsjax.load_pretrained(folders["fp8"], mesh=mesh, rules=rules, **short)
    for a, b in zip(jax.tree.leaves(lm.params), jax.tree.leaves(wanted.params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    jax.tree.map(np.testing.assert_array_equal, lm.bias, wanted.bias)
    experts = lm.params["stacks"]["moe"][0]["ffn"]["w_in_ED2F"]
    assert experts.q.sharding.spec == PartitionSpec(None, "expert", "fsdp", None)
    assert experts.q.addressable_shards[0].data.shape == (2, 4, 80, 272)
    assert experts.scale.sharding.spec == PartitionSpec(None, "expert")
    # No byte of a tensor is read for a device that does not hold it.
    read: list[int] = []
    with Published(folders["fp8"]) as source:
        load_module.load(
            source.folder, lm.config, resident=True, rules=rules, mesh=mesh, on_bytes=read.append
        )
    leaves = jax.tree.leaves((lm.params, lm.bias), is_leaf=lambda leaf: isinstance(leaf, Quantized))
    held = [leaf.q if isinstance(leaf, Quantized) else leaf for leaf in leaves]
    width = {"float8_e4m3fn": 1, "bfloat16": 2, "float32": 2}  # the router's are BF16 in the file
    wanted_bytes = sum(
        shard.data.size * width[leaf.dtype.name]
        for leaf in held
        for shard in leaf.addressable_shards
    )
    wanted_bytes += sum(2 * s.data.size for b in lm.bias.values() for s in b.addressable_shards)
    assert sum(read) == wanted_bytes
    lm.save_pretrained(tmp_path / "out", dtype="fp8")  # gathered from its shards
    wanted.save_pretrained(tmp_path / "wanted", dtype="fp8")
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "wanted")


def test_blocks_are_cut_where_a_shard_needs_them(folders):
    """FP8 made wide on a shard whose border lies inside a block and inside a head's rows."""
    from dsjax.interop import load as load_module

    with Published(folders["fp8"]) as source:
        entries = {entry.name: entry for entry in hf.entries(source.model)}
        entry = entries["model.layers.1.self_attn.o_proj.weight"]  # [160, 2 * 48]
        name = entry.name + hf.SCALE_SUFFIX
        scale = np.array(source.folder.read(name))
        q = np.array(source.folder.read(entry.name))
    wide = slow_dequantized(q, scale)
    box = [slice(0, 2), slice(1, 2), slice(0, 48), slice(40, 160)]
    shard = jnp.zeros([s.stop - s.start for s in box], jnp.float32)
    for piece in load_module._pieces(entry, box):
        shard = load_module._fill(
            shard,
            q[piece.rows, piece.cols],
            load_module._scale_of(scale, piece),
            np.array(piece.start, np.int32),
            layout=piece.layout,
            corner=(piece.rows.start % 128, piece.cols.start % 128),
        )
    np.testing.assert_array_equal(shard[0, 0], wide[40:160, 48:96].T)


def test_a_shard_reads_no_more_than_its_part(folders):
    """Two of four experts, one half of every row of attention: the bytes are counted."""
    from dsjax.interop.load import _pieces

    model = override(preset("nano"), *BLOCKY).model
    by_name = {entry.name: entry for entry in hf.entries(model)}
    entry = by_name["model.layers.1.mlp.experts.5.up_proj.weight"]  # [136, 160]
    whole = [slice(0, 2), slice(0, 8), slice(0, 160), slice(0, 272)]
    assert [(p.rows, p.cols, p.start) for p in _pieces(entry, whole)] == [
        (slice(0, 136), slice(0, 160), (0, 5, 0, 136))
    ]
    half = [slice(0, 2), slice(4, 8), slice(80, 160), slice(0, 272)]
    assert [(p.rows, p.cols, p.start) for p in _pieces(entry, half)] == [
        (slice(0, 136), slice(80, 160), (0, 1, 0, 136))
    ]
    assert list(_pieces(entry, [slice(0, 2), slice(0, 4), *whole[2:]])) == []
    assert list(_pieces(entry, [*whole[:3], slice(0, 136)])) == []  # the gate's half
    entry = by_name["model.layers.0.self_attn.q_b_proj.weight"]  # [2 * 104, 144]
    second = [slice(0, 1), slice(0, 144), slice(1, 2), slice(0, 104)]
    (piece,) = _pieces(entry, second)
    assert (piece.rows, piece.cols) == (slice(104, 208), slice(0, 144))
    with pytest.raises(ValueError, match="dimension 2 of its leaf cannot be sharded"):
        list(_pieces(entry, [slice(0, 1), slice(0, 144), slice(0, 2), slice(0, 52)]))


# ------------------------------------------------------------------------------------- conversion


def test_a_conversion_is_an_import_and_an_export(folders, tmp_path):
    with Published(folders["fp8"]) as source:
        for dtype in ("bfloat16", "float32", "fp8"):
            convert(source, tmp_path / dtype, dtype, shard_bytes=200_000)
    assert (tmp_path / "float32/model.safetensors.index.json").is_file()
    assert tensors_of(tmp_path / "fp8") == tensors_of(folders["fp8"])
    lm = dsjax.load_pretrained(folders["fp8"], dtype="float32")
    for dtype in ("bfloat16", "float32"):
        lm.save_pretrained(tmp_path / f"{dtype} by hand", dtype=dtype)
        assert tensors_of(tmp_path / dtype) == tensors_of(tmp_path / f"{dtype} by hand")


def test_a_conversion_goes_on_where_it_was_killed(folders, tmp_path):
    """Killed again and again, each time later, it ends with what an unbroken one writes."""
    target = tmp_path / "out"
    script = (
        "import os, sys, threading\n"
        "from dsjax.interop.published import Published, convert\n"
        "left = int(sys.argv[3])\n"
        "def count(n):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left < 0: os.kill(os.getpid(), 9)\n"
        "with Published(sys.argv[1]) as source:\n"
        "    convert(source, sys.argv[2], 'bfloat16', shard_bytes=100_000, on_bytes=count)\n"
    )
    seen: dict[str, int] = {}
    for steps in (30, 60, 10**9):
        done = subprocess.run(
            [sys.executable, "-c", script, folders["fp8"], target, str(steps)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        if steps < 10**9:
            assert done.returncode == -signal.SIGKILL, done.stderr
            assert not target.exists()
            partial = (tmp_path / "out.partial").glob("model-*.safetensors")
            whole = {path.name: path.stat().st_ino for path in partial}
            assert whole.items() >= seen.items()  # not written again
            seen = whole
    assert done.returncode == 0, done.stderr
    assert seen.items() <= {path.name: path.stat().st_ino for path in target.iterdir()}.items()
    assert not (tmp_path / "out.partial").exists()
    assert not list(target.glob(".*"))
    with Published(folders["fp8"]) as source:
        convert(source, tmp_path / "unbroken", "bfloat16", shard_bytes=100_000)
    assert tensors_of(target) == tensors_of(tmp_path / "unbroken")
    assert seen


def test_another_sources_leftovers_are_not_mixed_in(folders, tmp_path):
    def interrupted(count):
        raise KeyboardInterrupt

    origin, target = tmp_path / "source", tmp_path / "out"
    shutil.copytree(folders["float32"], origin)
    with Published(origin) as source, pytest.raises(KeyboardInterrupt):
        convert(source, target, "fp8", on_bytes=interrupted)
    os.utime(origin / "model.safetensors")  # as if other weights lay there now
    with Published(origin) as changed, Published(folders["fp8"]) as other:
        for how in (
            {"source": changed, "dtype": "fp8"},
            {"source": other, "dtype": "fp8"},
            {"source": changed, "dtype": "fp8", "scale_format": "power_of_two"},
        ):
            said = refused(convert, target=target, **how)
            assert "an unfinished export of something else" in said
    shutil.rmtree(tmp_path / "out.partial")
    with Published(origin) as source:
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, "bfloat16", on_bytes=interrupted)
        convert(source, target, "bfloat16")
        assert "exists and is not an empty folder" in refused(
            convert, source, tmp_path / "out", "bfloat16"
        )
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial/mine").touch()
    lm = dsjax.load_pretrained(folders["bfloat16"])
    assert "is no unfinished export" in refused(lm.save_pretrained, tmp_path / "mine")


def test_targets_are_taken_as_they_are_meant(folders, tmp_path, monkeypatch):
    lm = dsjax.load_pretrained(folders["bfloat16"])
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    lm.save_pretrained(".")
    assert tensors_of(tmp_path / "here") == tensors_of(folders["bfloat16"])
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    lm.save_pretrained(tmp_path / "link")
    assert (tmp_path / "real/model.safetensors").is_file()
    (tmp_path / "begun.partial").mkdir()  # ended before a word was written
    lm.save_pretrained(tmp_path / "begun")
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(lm.save_pretrained, tmp_path / "file/x")
    (tmp_path / "odd.partial").mkdir()
    (tmp_path / "odd.partial/.dsjax-export.json").write_text("[]")
    assert "is no unfinished export" in refused(lm.save_pretrained, tmp_path / "odd")


def test_a_refusing_disk_is_told_in_one_line(folders, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    lm = dsjax.load_pretrained(folders["bfloat16"])
    monkeypatch.setattr(save, "write_shard", full)
    with pytest.raises(RunError, match=r"out\.partial cannot be written: No space left"):
        lm.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--source and --target are needed"),
        (["--source=x"], "--source and --target are needed"),
        (["--source=nowhere", "--target=out"], "nowhere holds neither dsjax.json"),
        (["--source={fp8}", "--target={fp8}"], "exists and is not an empty folder"),
        (["--source={fp8}", "--target=out", "--dtype=int8"], "dtype is 'int8'; known: bfloat16"),
        (["--source={bfloat16}", "--target=out", "--dtype=fp8"], "requantize"),
        (["--source={fp8}", "--target=out", "--scale_format=e4"], "scale format is 'e4'"),
        (["--source={fp8}", "--target=out", "--shard_bytes=0"], "--shard_bytes is 0"),
        (["--source={fp8}", "--target=out", "--set", "model.mtp=null"], "--set, --preset"),
        (["--source={fp8}", "--target=out", "--index_out=x"], "--index_out goes with --dry_run"),
        (["--dry_run"], "--dry_run needs --preset"),
        (["--dry_run", "--preset=nanoo"], "did you mean 'nano'"),
        (["--dry_run", "--preset=nano", "--source=x"], "reads and writes no weights"),
        (["--dry_run", "--preset=nano", "--index_out=/proc/x"], "/proc/x cannot be written"),
        (["--source=none.gguf", "--target=out"], "none.gguf"),
    ],
)
def test_the_script_refuses_in_one_line(arguments, says, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(**folders) for argument in arguments]
    assert convert_script.main(["convert", *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.startswith("convert: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_exported_with_its_tokenizer(nano_run, tmp_path, capsys):
    target = tmp_path / "exported"
    arguments = [f"--source={nano_run.workdir}", f"--target={target}", "--dtype=float32"]
    assert convert_script.main(["convert", *arguments]) == 0
    run, lm = dsjax.load_pretrained(nano_run.workdir), dsjax.load_pretrained(target)
    jax.tree.map(np.testing.assert_array_equal, lm.params, run.params)
    jax.tree.map(np.testing.assert_array_equal, lm.bias, run.bias)
    assert lm.tokenizer.encode("aei 日本") == run.tokenizer.encode("aei 日本")
    assert lm.generate("aei ", max_tokens=8) == run.generate("aei ", max_tokens=8)
    content = json.loads((target / "config.json").read_text())
    assert content["eos_token_id"] == run.tokenizer.eos_id
    # The average is another set of weights.
    arguments = [f"--source={nano_run.workdir}", f"--target={tmp_path / 'ema'}", "--ema"]
    assert convert_script.main(["convert", *arguments, "--dtype=float32"]) == 0
    assert tensors_of(tmp_path / "ema") != tensors_of(target)


def test_training_begins_with_published_weights(nano_run, tmp_path, monkeypatch, capsys):
    source, workdir = tmp_path / "published", tmp_path / "tuned"
    dsjax.load_pretrained(nano_run.workdir).save_pretrained(source, dtype="float32")
    (source / "generation_config.json").write_bytes(b'{"eos_token_id": [9]}')
    monkeypatch.setattr(pretrain_script.command, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(pretrain_script.command, "keep_compiled", lambda folder: None)
    arguments = [
        *(a for a in nano_run.arguments if not a.startswith(("--steps", "--sample"))),
        *("--steps=1", "--sample=aei ", f"--init={source}", f"--workdir={workdir}"),
        *("--set", "train.optimizer.learning_rate=1e-9"),
    ]
    assert pretrain_script.main(["pretrain", *arguments]) == 0
    tuned, first = dsjax.load_pretrained(workdir), dsjax.load_pretrained(source)
    jax.tree.map(assert_near, tuned.params, first.params)
    for stack, bias in first.bias.items():  # which one step has moved by 0.001
        assert np.abs(np.asarray(bias)).max() > 2e-3
        assert np.abs(np.asarray(tuned.bias[stack] - bias)).max() < 1.5e-3
    assert tuned.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert tuned.stop_ids == first.stop_ids == (first.tokenizer.eos_id, 9)
    shutil.move(source, tmp_path / "elsewhere")  # it is not needed any more
    assert pretrain_script.main(["pretrain", *arguments]) == 0
    shutil.move(tmp_path / "elsewhere", source)
    again = [*arguments, "--set", "model.norm_eps=1e-3", f"--workdir={tmp_path / 'x'}"]
    assert pretrain_script.main(["pretrain", *again]) == 2
    assert "is of another model; model.norm_eps" in capsys.readouterr().err


TALK = """\
import json, sys
import dsjax
lm, prompts = dsjax.load_pretrained(sys.argv[1]), json.loads(sys.argv[2])
said = lm.generate("The capital of France is", max_tokens=8)
question = [{"role": "user", "content": "What is 2+3?"}]
answer = lm.chat(question, temperature=0.0, max_tokens=16)
result = lm.generate_tokens(prompts, max_tokens=16, stop_ids=())
print(json.dumps([said, answer, result.tokens_BG.tolist()]))
"""


@pytest.mark.slow
def test_smollm2_talks(tmp_path):
    """A published model through the command line: transformers' greedy tokens, and an answer.

    In a process of its own with optimised code: it is large enough to want that.
    """
    target = tmp_path / "smollm2"
    assert convert_script.main(["convert", "--source=smollm2", f"--target={target}"]) == 0
    cases = list(json.loads((FOLDER / "smollm2.json").read_text())["prompts"].values())
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", TALK, target, json.dumps([case["ids"] for case in cases])],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, answer, tokens_BG = json.loads(done.stdout)
    assert said.startswith(" Paris")
    assert answer == "2 + 3 = 5"
    assert tokens_BG == [case["new_ids"] for case in cases]


# ------------------------------------------------------------------------------------ bad folders


def without(name):
    return lambda tensors: tensors.pop(name)


def replaced(name, change):
    def edit(tensors):
        tensors[name] = change(tensors[name])

    return edit


NORM = "model.layers.1.self_attn.kv_a_layernorm.weight"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (without(NORM), f"missing tensor {NORM}"),
        (without("model.layers.3.hnorm.weight"), "missing tensor model.layers.3.hnorm.weight"),
        (replaced(NORM, lambda x: x[:-1]), f"tensor {NORM} has shape [135], expected [136]"),
        (replaced(NORM, lambda x: x.astype(np.int32)), f"{NORM} is of type I32"),
        (
            lambda tensors: tensors.update(extra=np.zeros(3, np.float32)),
            "tensor 'extra' is not part of the model",
        ),
        (
            lambda tensors: tensors.update({"../../x": np.zeros(3, np.float32)}),
            "tensor '../../x' is not part of the model",
        ),
        (
            lambda tensors: tensors.update(
                {"model.layers.0.mlp.up_proj.weight_scale_inv": np.ones((3, 2), np.float32)}
            ),
            "up_proj.weight_scale_inv' is not part of the model",
        ),
    ],
)
def test_a_folder_with_other_tensors_is_refused(folders, tmp_path, edit, says):
    folder = edited(folders["float32"], tmp_path / "bad", edit)
    said = refused(dsjax.load_pretrained, folder)
    assert says in said
    assert str(folder) in said


def scale_edit(change):
    name = "model.layers.0.mlp.up_proj.weight" + hf.SCALE_SUFFIX

    def edit(tensors):
        if change is None:
            del tensors[name]
        else:
            tensors[name] = "F32", change(tensors[name][1])

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (scale_edit(None), "up_proj.weight is FP8 without model.layers.0.mlp.up_proj.weight_scale"),
        (scale_edit(lambda x: x.T.copy()), "has shape [2, 3], expected [3, 2]"),
        (scale_edit(lambda x: x * 0), "holds the scale 0.0"),
        (scale_edit(lambda x: -x), "holds the scale -"),
        (scale_edit(lambda x: x + np.nan), "holds the scale nan"),
        (scale_edit(lambda x: x + np.inf), "holds the scale inf"),
    ],
)
def test_fp8_with_wrong_scales_is_refused(folders, tmp_path, edit, says):
    folder = tmp_path / "bad"
    shutil.copytree(folders["fp8"], folder)
    tensors = load_file_bits(folder)
    edit(tensors)
    write_bits(folder, tensors)
    said = refused(dsjax.load_pretrained, folder)
    assert says in said
    assert "model.safetensors" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"step": 3}, "is a published folder; it has no steps"),
        ({"ema": True}, "no average"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"overrides": ["model.embed_dim=64"]}, "the overrides ask for"),
        ({"overrides": ["model.embed_dims=64"]}, "did you mean 'embed_dim'"),
    ],
)
def test_what_does_not_fit_a_published_folder_is_refused(folders, arguments, says):
    assert says in refused(dsjax.load_pretrained, folders["bfloat16"], **arguments)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"null", b"[" * 100_000])
def test_a_malformed_config_is_refused(folders, tmp_path, content):
    folder = tmp_path / "bad"
    shutil.copytree(folders["bfloat16"], folder)
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refused(dsjax.load_pretrained, folder)


def test_small_files_do_not_lead_out_of_the_folder(folders, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(folders["bfloat16"], folder)
    (tmp_path / "secret").write_text("secret")
    (folder / "merges.txt").symlink_to(tmp_path / "secret")
    with Published(folder) as source:
        assert "leads out of its folder" in refused(convert, source, tmp_path / "x", "bfloat16")
    assert "leads out of its folder" in refused(dsjax.load_pretrained, folder)
    (folder / "merges.txt").unlink()
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "is not a regular file" in refused(Published, folder)


def test_hostile_values_are_one_short_line():
    for content in (v3(rms_norm_eps=10**400), v3(**{"a\nb\x1b[2J": 1}), v3(vocab_size="x" * 10**6)):
        said = refused(hf_config.model_config, content)
        assert said.isprintable()
        assert len(said) < 3000


def test_pickles_are_not_opened(folders, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(folders["bfloat16"], folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle" in refused(dsjax.load_pretrained, folder)
