"""`config.json` of a Hugging Face folder <-> ModelConfig: deepseek_v2, deepseek_v3, qwen2, llama.

Knows nothing about tensors. Every field is read, known to leave the mathematics alone, or refused
by name: a model that runs is the model that was published.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dsjax.config import (
    BlockConfig,
    GqaConfig,
    Llama3RopeConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    MtpConfig,
    RopeConfig,
    StackConfig,
    SwiGluConfig,
    YarnConfig,
)
from dsjax.errors import InputError
from dsjax.interop.tensor_files import read_small

CONFIG_FILE = "config.json"
ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
LATENT_NORM_EPS = 1e-6  # of MLA's two latents, whatever rms_norm_eps says, as published

# Say nothing about a forward pass: where a model comes from, how it is run, trained or sampled.
_NEUTRAL = frozenset(
    (
        *("_attn_implementation", "_commit_hash", "_name_or_path", "architectures", "auto_map"),
        *("aux_loss_alpha", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id"),
        *("ep_size", "finetuning_task", "id2label", "initializer_range", "is_decoder"),
        *(
            "is_encoder_decoder",
            "is_llama_config",
            "label2id",
            "max_window_layers",
            "model_type",
            "num_labels",
        ),
        *("output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id"),
        *("pretraining_tp", "problem_type", "qk_head_dim", "return_dict", "router_aux_loss_coef"),
        *("seq_aux", "tokenizer_class", "torch_dtype", "transformers_version", "unsloth_fixed"),
        *("unsloth_version", "use_cache", "use_mla"),
    )
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MAX_BYTES = 10_000_000
# A file that says more is not believed: each is a loop, or a list, of that length.
_MOST_LAYERS, _MOST_HEADS, _MOST_EXPERTS = 1000, 4096, 4096
_MISSING = object()


class _Fields:
    """The fields of one `config.json`; what nobody asked for is refused at the end."""

    def __init__(self, content: Mapping[str, Any], where: str):
        self.content, self.where = content, where
        self.asked: set[str] = set()

    def get(self, name: str, kind: type, default: Any = _MISSING) -> Any:
        """A field of a type; null is like no field.

        Raises:
            InputError: if it is missing and has no default, or is of another type.
        """
        self.asked.add(name)
        value = self.content.get(name)
        if value is None:
            if default is _MISSING:
                raise InputError(f"{self.where} has no '{name}'")
            return default
        if kind is float and type(value) is int and abs(value) < 2**1000:
            value = float(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise InputError(f"{self.where}: '{name}' must be {kind.__name__}, not {value!r:.200}")
        return value

    def count(self, name: str, most: int, default: Any = _MISSING) -> int:
        """A field that counts something, from 0 to `most`.

        Raises:
            InputError: as `get`, and outside that range.
        """
        value = self.get(name, int, default)
        if not 0 <= value <= most:
            raise InputError(f"{self.where}: '{name}' is {value}; it must lie in [0, {most}]")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuses a field with another value than these; it may be missing or null."""
        self.asked.add(name)
        value = self.content.get(name)
        if value is not None and not any(value == a and type(value) is type(a) for a in allowed):
            self.refuse(name)

    def refuse(self, name: str) -> NoReturn:
        """Raises: the field's value asks for another mathematics."""
        value = json.dumps(self.content[name])
        raise InputError(
            f"{self.where}: '{name}' is {value[:200]}, which this version does not compute"
        )

    def finish(self, ignore: Sequence[str]) -> None:
        """Refuses what is left, unless it is null or named in `ignore`."""
        for name, value in self.content.items():
            if name in self.asked or name in _NEUTRAL or name in ignore or value is None:
                continue
            raise InputError(
                f"{self.where}: unknown field '{name:.100}', which may change the mathematics; if "
                "it does not, name it in `ignore` (--ignore)"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's `config.json`.

    Raises:
        InputError: if it cannot be read, or is no JSON object.
    """
    path = folder / CONFIG_FILE
    text = read_small(folder, CONFIG_FILE, _MAX_BYTES)
    if text is None:
        raise InputError(f"cannot read {path}: there is no such file")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no object")
    return content


def model_config(
    content: Mapping[str, Any], where: str = CONFIG_FILE, ignore: Sequence[str] = ()
) -> ModelConfig:
    """The model that a `config.json` describes.

    Args:
        content: as read; transformers' older spelling (`rope_theta`, `rope_scaling`) or its newer
            one (`rope_parameters`).
        where: the file, for messages.
        ignore: unknown fields that the caller knows to change nothing.

    Raises:
        InputError: naming a field that is missing, unknown, or asks for another mathematics.
    """
    fields = _Fields(content, where)
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise InputError(
            f"{where}: model_type is {kind!r:.200}; known: {', '.join(sorted(ARCHITECTURES))}"
        )
    fields.expect("hidden_act", "silu")
    fields.expect("attention_dropout", 0, 0.0)
    fields.expect("rope_interleaved", False)
    fields.expect("mlp_bias", False)
    _check_quantization(fields)
    try:
        model = _latent(fields, kind) if kind.startswith("deepseek") else _grouped(fields, kind)
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(where) else f"{where}: {message}") from None
    fields.finish(ignore)
    return model


def _shared(fields: _Fields) -> dict[str, Any]:
    return {
        "vocab_size": fields.get("vocab_size", int),
        "embed_dim": fields.get("hidden_size", int),
        "norm_eps": fields.get("rms_norm_eps", float),
        "init_std": fields.get("initializer_range", float, 0.02) or 0.02,
        "max_positions": fields.get("max_position_embeddings", int),
        "tie_embeddings": fields.get("tie_word_embeddings", bool, False),
    }


def _grouped(fields: _Fields, kind: str) -> ModelConfig:
    """Qwen2 and Llama: grouped-query attention and dense layers."""
    shared = _shared(fields)
    heads = fields.count("num_attention_heads", _MOST_HEADS)
    head_dim = fields.get("head_dim", int, None)
    if head_dim is None:
        if heads < 1 or shared["embed_dim"] % heads:
            raise InputError(
                f"hidden_size {shared['embed_dim']} does not divide into {heads} heads"
            )
        head_dim = shared["embed_dim"] // heads
    layers = fields.count("num_hidden_layers", _MOST_LAYERS)
    if kind == "qwen2":
        fields.expect("use_sliding_window", False)
        fields.expect("use_mrope", False)
        fields.asked.add("sliding_window")
        fields.expect("layer_types", ["full_attention"] * layers)
        qkv_bias, out_bias = True, False
    else:
        qkv_bias = out_bias = fields.get("attention_bias", bool, False)
    attention = GqaConfig(
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads", int, heads),
        head_dim=head_dim,
        rope=_rope(fields, shared["max_positions"], softmax_scaled=False),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
    )
    ffn = SwiGluConfig(hidden_dim=fields.get("intermediate_size", int))
    block = BlockConfig(attention=attention, ffn=ffn)
    stack = StackConfig(name="dense", repeats=layers, blocks=(block,))
    return ModelConfig(**shared, stacks=(stack,))


def _latent(fields: _Fields, kind: str) -> ModelConfig:
    """DeepSeek-V2 and V3: latent attention, a few dense layers, then experts."""
    shared = _shared(fields)
    fields.expect("attention_bias", False)
    fields.expect("rope_interleave", True)
    fields.expect("moe_layer_freq", 1)
    heads = fields.count("num_attention_heads", _MOST_HEADS)
    layers = fields.count("num_hidden_layers", _MOST_LAYERS)
    fields.expect("num_key_value_heads", heads)
    attention = MlaConfig(
        num_heads=heads,
        q_latent_dim=fields.get("q_lora_rank", int, None),
        kv_latent_dim=fields.get("kv_lora_rank", int),
        nope_dim=fields.get("qk_nope_head_dim", int),
        rope_dim=fields.get("qk_rope_head_dim", int),
        value_dim=fields.get("v_head_dim", int),
        rope=_rope(fields, shared["max_positions"], softmax_scaled=True),
        latent_norm_eps=LATENT_NORM_EPS,
    )
    fields.expect("head_dim", attention.rope_dim, attention.head_dim)
    dense = min(fields.count("first_k_dense_replace", _MOST_LAYERS), layers)
    moe = _experts(fields, kind)
    stacks = []
    if dense:
        ffn = SwiGluConfig(hidden_dim=fields.get("intermediate_size", int))
        block = BlockConfig(attention=attention, ffn=ffn)
        stacks.append(StackConfig(name="dense", repeats=dense, blocks=(block,)))
    fields.asked.add("intermediate_size")
    experts = BlockConfig(attention=attention, ffn=moe)
    if layers > dense:
        stacks.append(StackConfig(name="moe", repeats=layers - dense, blocks=(experts,)))
    mtp = None
    if kind == "deepseek_v3":
        # transformers 5 writes either name.
        depth = fields.count("num_nextn_predict_layers", _MOST_LAYERS, 0)
        depth = depth or fields.count("num_mtp_layers", _MOST_LAYERS, 0)
        mtp = MtpConfig(depth=depth, block=experts) if depth else None
    fields.expect("num_nextn_predict_layers", *([mtp.depth] if mtp else []), 0)
    fields.expect("num_mtp_layers", *([mtp.depth] if mtp else []), 0)
    return ModelConfig(**shared, stacks=tuple(stacks), mtp=mtp)


def _experts(fields: _Fields, kind: str) -> MoeConfig:
    shared: dict[str, Any] = {
        "num_experts": fields.count("n_routed_experts", _MOST_EXPERTS),
        "num_experts_per_token": fields.get("num_experts_per_tok", int),
        "expert_dim": fields.get("moe_intermediate_size", int),
        # Defaults differ between readers, so what is not said is not guessed. V2-Lite's null means
        # no groups.
        "num_shared_experts": fields.get("n_shared_experts", int),
        "gate_scale": fields.get("routed_scaling_factor", float),
    }
    grouped = kind == "deepseek_v3" or fields.content.get("topk_method") == "group_limited_greedy"
    default = {} if grouped else {"default": 1}
    groups, kept = fields.get("n_group", int, **default), fields.get("topk_group", int, **default)
    if kind == "deepseek_v3":
        fields.expect("scoring_func", "sigmoid")
        fields.expect("topk_method", "noaux_tc")
        return MoeConfig(
            **shared,
            num_groups=groups,
            groups_per_token=kept,
            normalize_gates=fields.get("norm_topk_prob", bool),
        )
    fields.expect("scoring_func", "softmax")
    fields.expect("topk_method", "greedy", "group_limited_greedy")
    # transformers ignores it; the published code normalises instead of scaling.
    fields.expect("norm_topk_prob", False)
    return MoeConfig(
        **shared,
        num_groups=groups if grouped else 1,
        groups_per_token=kept if grouped else 1,
        score="softmax",
        group_score="max",
        normalize_gates=False,
        balance_bias=False,
        balance_counts="selected",
    )


def _check_quantization(fields: _Fields) -> None:
    """Only DeepSeek's FP8 is read: E4M3 in blocks of 128x128."""
    if (value := fields.get("quantization_config", dict, None)) is None:
        return
    inner = _Fields(value, f"{fields.where}: quantization_config")
    inner.expect("quant_method", "fp8")
    inner.expect("fmt", "e4m3")
    inner.expect("weight_block_size", [128, 128])
    inner.expect("activation_scheme", "dynamic")
    inner.expect("scale_fmt", "ue8m0")
    inner.asked |= {"modules_to_not_convert", "ignored_layers", "dequantize"}
    inner.finish(())


def _rope(fields: _Fields, max_positions: int, *, softmax_scaled: bool) -> RopeConfig:
    """RoPE from `rope_parameters`, or from `rope_theta` and `rope_scaling`.

    Args:
        fields: of the file.
        max_positions: what a scaling without an original length starts from.
        softmax_scaled: DeepSeek's attention also scales its softmax by mscale squared.
    """
    where = f"{fields.where}: rope_scaling"
    content = fields.get("rope_scaling", dict, None)
    parameters = fields.get("rope_parameters", dict, None)
    if parameters is not None:
        where = f"{fields.where}: rope_parameters"
        content = {**(content or {}), **parameters}
    inner = _Fields(content or {}, where)
    theta = inner.get("rope_theta", float, None) or fields.get("rope_theta", float, 10_000.0)
    fields.asked.add("rope_theta")
    inner.expect("partial_rotary_factor", 1, 1.0)
    fields.expect("partial_rotary_factor", 1, 1.0)
    kind = inner.get("rope_type", str, None) or inner.get("type", str, "default")
    inner.asked.add("type")
    if kind == "default":
        rope = RopeConfig(theta=theta)
    elif kind == "linear":
        rope = RopeConfig(theta=theta, linear_factor=inner.get("factor", float))
    elif kind == "llama3":
        llama3 = Llama3RopeConfig(
            factor=inner.get("factor", float),
            low_freq_factor=inner.get("low_freq_factor", float),
            high_freq_factor=inner.get("high_freq_factor", float),
            original_max_positions=inner.get(
                "original_max_position_embeddings", int, max_positions
            ),
        )
        rope = RopeConfig(theta=theta, llama3=llama3)
    elif kind == "yarn":
        rope = RopeConfig(theta=theta, yarn=_yarn(inner, max_positions, softmax_scaled))
    else:
        inner.refuse("rope_type" if "rope_type" in inner.content else "type")
    inner.finish(())
    return rope


def _yarn(inner: _Fields, max_positions: int, softmax_scaled: bool) -> YarnConfig:
    """YaRN; without both mscales, cos and sin carry 0.1 ln(factor) + 1 and the softmax nothing."""
    inner.expect("truncate", True)
    inner.expect("finetuned", True, False)
    mscale = inner.get("mscale", float, 0.0)
    all_dim = inner.get("mscale_all_dim", float, 0.0)
    if not mscale and not all_dim:
        mscale = 1.0
    elif not (mscale and all_dim) or not softmax_scaled:
        inner.refuse("mscale" if mscale else "mscale_all_dim")
    factor = inner.get("factor", float)
    if (attention := inner.get("attention_factor", float, None)) is not None:
        wanted = _temperature(factor, mscale) / _temperature(factor, all_dim)
        if not math.isclose(attention, wanted, rel_tol=1e-6):
            inner.refuse("attention_factor")
    return YarnConfig(
        factor=factor,
        original_max_positions=inner.get("original_max_position_embeddings", int, max_positions),
        beta_fast=inner.get("beta_fast", float, 32.0),
        beta_slow=inner.get("beta_slow", float, 1.0),
        mscale=mscale,
        mscale_all_dim=all_dim,
    )


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


# ---- the way back -------------------------------------------------------------------------------


def published_config(model: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model, in the spelling of the published ones.

    Raises:
        InputError: if none of the four architectures computes it, naming the field in the way.
    """
    blocks = [b for s in model.stacks for _ in range(s.repeats) for b in s.blocks]
    attention = blocks[0].attention
    for i, block in enumerate(blocks):
        if block.attention != attention:
            _no_architecture(f"the attention of layer {i} differs from that of layer 0")
    content: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": attention.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        **_published_rope(attention.rope),
    }
    if isinstance(attention, MlaConfig):
        content |= _published_latent(model, attention, blocks)
    else:
        content |= _published_grouped(model, attention, blocks)
    content["architectures"] = [ARCHITECTURES[content["model_type"]]]
    assert _essence(model_config(content)) == _essence(model), "config.json must read back"
    return content


def _no_architecture(why: str) -> NoReturn:
    raise InputError(
        f"the model cannot be written as any of {', '.join(sorted(ARCHITECTURES))}: {why}"
    )


def _essence(model: ModelConfig) -> tuple:
    """What a forward pass depends on, whatever the stacks are called and how they are grouped."""

    def plain(block: BlockConfig) -> BlockConfig:
        if isinstance(block.ffn, MoeConfig):  # a matter of training
            ffn = dataclasses.replace(block.ffn, balance_counts="selected")
            return dataclasses.replace(block, ffn=ffn)
        return block

    layers = [plain(b) for s in model.stacks for _ in range(s.repeats) for b in s.blocks]
    mtp = None if model.mtp is None else (model.mtp.depth, plain(model.mtp.block))
    rest = (model.vocab_size, model.embed_dim, model.norm_eps, model.max_positions)
    return layers, mtp, *rest, model.tie_embeddings


def computes_alike(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether two models have the same tensors and forward pass, stack names and grouping aside."""
    return _essence(a) == _essence(b)


def _published_rope(rope: RopeConfig) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if rope.yarn is not None:
        yarn = rope.yarn
        scaling = {
            "type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_positions,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
        }
        if yarn.mscale_all_dim:
            scaling |= {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
        elif yarn.mscale != 1.0:
            _no_architecture(f"YaRN's mscale is {yarn.mscale} beside an mscale_all_dim of 0")
    elif rope.llama3 is not None:
        llama3 = rope.llama3
        scaling = {
            "rope_type": "llama3",
            "factor": llama3.factor,
            "low_freq_factor": llama3.low_freq_factor,
            "high_freq_factor": llama3.high_freq_factor,
            "original_max_position_embeddings": llama3.original_max_positions,
        }
    elif rope.linear_factor != 1.0:
        scaling = {"type": "linear", "factor": rope.linear_factor}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _published_grouped(
    model: ModelConfig, attention: GqaConfig, blocks: list[BlockConfig]
) -> dict[str, Any]:
    ffns = [block.ffn for block in blocks]
    if model.mtp is not None:
        _no_architecture("multi-token prediction beside grouped-query attention")
    if isinstance(ffns[0], MoeConfig) or any(ffn != ffns[0] for ffn in ffns):
        _no_architecture("grouped-query attention with experts, or layers of several widths")
    if attention.rope.yarn is not None and attention.rope.yarn.mscale_all_dim:
        _no_architecture("YaRN's mscale_all_dim with grouped-query attention")
    content = {
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": ffns[0].hidden_dim,
    }
    if attention.qkv_bias and not attention.out_bias:
        return {"model_type": "qwen2", "use_sliding_window": False, **content}
    if attention.qkv_bias != attention.out_bias:
        _no_architecture("a bias on the output of attention alone")
    bias = {"attention_bias": attention.qkv_bias, "mlp_bias": False}
    return {"model_type": "llama", **bias, **content}


def _published_latent(
    model: ModelConfig, attention: MlaConfig, blocks: list[BlockConfig]
) -> dict[str, Any]:
    dense = next((i for i, b in enumerate(blocks) if isinstance(b.ffn, MoeConfig)), len(blocks))
    kinds = {block.ffn for block in blocks[:dense]}, {block.ffn for block in blocks[dense:]}
    if len(kinds[0]) > 1 or len(kinds[1]) > 1:
        _no_architecture("dense layers after experts, or layers of several widths")
    if not kinds[1]:
        _no_architecture("latent attention without experts")
    if attention.latent_norm_eps != LATENT_NORM_EPS:
        _no_architecture(f"latent_norm_eps is {attention.latent_norm_eps}, not {LATENT_NORM_EPS}")
    moe = blocks[-1].ffn
    assert isinstance(moe, MoeConfig)
    if model.mtp is not None and model.mtp.block != blocks[-1]:
        _no_architecture("the block of multi-token prediction differs from the last layer's")
    content = {
        "num_key_value_heads": attention.num_heads,
        "attention_bias": False,
        "q_lora_rank": attention.q_latent_dim,
        "kv_lora_rank": attention.kv_latent_dim,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope_dim,
        "v_head_dim": attention.value_dim,
        "first_k_dense_replace": dense,
        "moe_layer_freq": 1,
        "moe_intermediate_size": moe.expert_dim,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.num_experts_per_token,
        "n_group": moe.num_groups,
        "topk_group": moe.groups_per_token,
        "routed_scaling_factor": moe.gate_scale,
        "norm_topk_prob": moe.normalize_gates,
        "scoring_func": moe.score,
    }
    # A dense width is asked for even where no layer is dense.
    widths = [ffn.hidden_dim for ffn in kinds[0] if isinstance(ffn, SwiGluConfig)]
    content["intermediate_size"] = widths[0] if widths else moe.expert_dim
    if moe.score == "sigmoid":
        if moe.group_score != "top2_sum" or not moe.balance_bias:
            _no_architecture("sigmoid scores without V3's group score or balancing bias")
        depth = 0 if model.mtp is None else model.mtp.depth
        return {
            "model_type": "deepseek_v3",
            **content,
            "topk_method": "noaux_tc",
            "num_nextn_predict_layers": depth,
        }
    if moe.group_score != "max" or moe.balance_bias or moe.normalize_gates or model.mtp:
        _no_architecture("softmax scores with a balancing bias, normalised gates or MTP")
    method = "greedy" if moe.num_groups == 1 else "group_limited_greedy"
    return {"model_type": "deepseek_v2", **content, "topk_method": method}


def exported_config(
    model: ModelConfig,
    dtype: str,
    scale_format: str,
    source: Mapping[str, Any] | None = None,
    *,
    as_stored: bool = False,
) -> dict[str, Any]:
    """The `config.json` that goes with exported tensors.

    Args:
        model: whose.
        dtype: "bfloat16", "float32" or "fp8".
        scale_format: of FP8's scales; "float32", "power_of_two" or "e8m0".
        source: that of the checkpoint the model came from; what it says is handed back where it
            still describes the model.
        as_stored: the tensors keep the types that they came in, and so do the fields about them.

    Raises:
        InputError: as `published_config`.
    """
    content, kept = None, False
    if source is not None:
        there = model_config(source, ignore=tuple(source))  # what was let pass in reading
        if computes_alike(there, model):
            content = {k: v for k, v in source.items() if k != "auto_map"}  # code not handed on
            content["architectures"] = [ARCHITECTURES[content["model_type"]]]
            kept = as_stored
    if content is None:
        content = published_config(model)
        if source is not None and content["model_type"] == source.get("model_type"):
            content = {k: v for k, v in source.items() if k in _TOKENS} | content
    if kept:
        return content
    content = {k: v for k, v in content.items() if k not in ("quantization_config", "dtype")}
    content["torch_dtype"] = "float32" if dtype == "float32" else "bfloat16"
    if dtype == "fp8":
        content["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        } | ({} if scale_format == "float32" else {"scale_fmt": "ue8m0"})
    return content
