"""Reads the golden files that `tests/oracle/make_golden.py` made with transformers."""

import json
import pathlib

from safetensors.numpy import load_file

from dsjax.config import (
    BlockConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    StackConfig,
    SwiGluConfig,
    YarnConfig,
)

FOLDER = pathlib.Path(__file__).parent / "golden"
MODELS = ("deepseek_v3", "deepseek_v3_plain", "deepseek_v2", "deepseek_v2_lite")


def load(name):
    """(tensors, the published form of the configuration)."""
    facts = json.loads((FOLDER / f"{name}.json").read_text())
    return load_file(FOLDER / f"{name}.safetensors"), facts["config_published"]


def model_config(c):
    """Our configuration of a golden model."""
    yarn = None
    if (scaling := c["rope_scaling"]) is not None:
        yarn = YarnConfig(
            factor=float(scaling["factor"]),
            original_max_positions=scaling["original_max_position_embeddings"],
            beta_fast=float(scaling["beta_fast"]),
            beta_slow=float(scaling["beta_slow"]),
            mscale=scaling["mscale"],
            mscale_all_dim=scaling["mscale_all_dim"],
        )
    attention = MlaConfig(
        num_heads=c["num_attention_heads"],
        q_latent_dim=c["q_lora_rank"],
        kv_latent_dim=c["kv_lora_rank"],
        nope_dim=c["qk_nope_head_dim"],
        rope_dim=c["qk_rope_head_dim"],
        value_dim=c["v_head_dim"],
        rope=RopeConfig(theta=float(c["rope_theta"]), yarn=yarn),
    )
    v3 = c["topk_method"] == "noaux_tc"
    moe = MoeConfig(
        num_experts=c["n_routed_experts"],
        num_experts_per_token=c["num_experts_per_tok"],
        expert_dim=c["moe_intermediate_size"],
        num_shared_experts=c["n_shared_experts"],
        num_groups=c["n_group"] or 1,
        groups_per_token=c["topk_group"] or 1,
        score="sigmoid" if v3 else "softmax",
        group_score="top2_sum" if v3 else "max",
        normalize_gates=c["norm_topk_prob"],
        gate_scale=float(c["routed_scaling_factor"]),
        balance_bias=v3,
    )
    dense = BlockConfig(attention=attention, ffn=SwiGluConfig(hidden_dim=c["intermediate_size"]))
    first = c["first_k_dense_replace"]
    return ModelConfig(
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        stacks=(
            StackConfig(name="dense", repeats=first, blocks=(dense,)),
            StackConfig(
                name="moe",
                repeats=c["num_hidden_layers"] - first,
                blocks=(BlockConfig(attention=attention, ffn=moe),),
            ),
        ),
        norm_eps=c["rms_norm_eps"],
    )
