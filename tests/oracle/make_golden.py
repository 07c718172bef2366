"""Writes the golden files of `tests/golden` from tiny random transformers models, or checks them.

Runs in the oracle interpreter (`make oracle`: torch CPU + transformers) and imports nothing of
dsjax, so that an error of ours cannot hide in both sides of a comparison. `--check` loads the
committed parameters through transformers' own importer, computes everything again and compares.

Each model case is two files. `NAME.safetensors` (floats float32, integers int32):

    input_ids            [B, T]
    param/NAME           every parameter under the name it has in a published checkpoint
    grad/NAME            gradient of `loss` with respect to it (the router's bias has none)
    logits               [B, T, V]
    hidden               [B, T, D], after the final norm
    layers               [L, B, T, D], the residual stream leaving each layer
    router/logits        [MoE layers, B, T, E], before sigmoid or softmax
    router/indices       [MoE layers, B, T, K], ascending (transformers' order is undefined)
    router/gates         [MoE layers, B, T, K], in the same order, scaling factor included
    loss                 scalar: mean next-token cross entropy, B * (T - 1) shifted positions
    continuation         [B, 8], greedy tokens found by full forwards, without a cache
    continuation_logits  [B, 8, V], the logits that chose them

`NAME.json`: the config as transformers saves it (`config`) and as DeepSeek's repositories spell it
(`config_published`), seed, versions, and measured facts (`facts`): how near the nearest tie is, how
many tokens tell a wrong router from the right one, how far another path of transformers lands.

Where transformers 5.23 differs from the paper or from the published inference code:

* V3's router masks excluded groups with -inf, as the published inference code does (transformers
  before 5.x masked with 0.0). The biases here are negative enough that 0.0 picks other experts for
  most tokens; the count is in `facts`, and a draw with none would be refused.
* V2's router masks with 0.0, as V2's published code. Softmax scores are positive and the kept
  groups hold at least K experts, so that -inf and 0.0 agree.
* V2's router ignores `norm_topk_prob` (False in every published V2) and always scales the gates;
  published code normalises them instead where it is set.
* V3 rotates interleaved pairs and leaves them de-interleaved: all first elements, then all second
  ones. Queries and keys are permuted alike, so scores are equal, but its rope *cache* is a
  permutation of ours. V2 rotates as complex numbers and keeps the pairs.
* The norms of both latents have eps 1e-6 whatever `rms_norm_eps` says; here that is 1e-6 as well.
* The balance loss is not in transformers' forward; `loss` is cross entropy alone.
* Published `rope_scaling` + `rope_theta` become `rope_parameters` on load; both spellings are kept.
"""

import argparse
import copy
import dataclasses
import json
import math
import pathlib
import platform
import sys
import tempfile
import zlib

import numpy as np
import safetensors
import torch
import transformers
from safetensors.numpy import load_file, save_file

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
BATCH = 2
LENGTH = 24  # beyond YaRN's original 16, so that interpolated frequencies matter
CONTINUATION = 8
MAX_BYTES = 1_500_000
MAX_SEEDS = 20_000
# A redraw is asked for below these. Float32 noise of two correct programs is some 1e-6 in a router
# score and 1e-5 in a logit, so neither can turn a choice that is this clear.
MIN_ROUTER_GAP = 2e-3
MIN_ARGMAX_GAP = 5e-2
# Of `--check`, norm of the difference over norm of the golden: another CPU sums in another order.
CHECK_TOLERANCE = 2e-5

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,  # unlike nope and rope, or a swapped slice goes unseen
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# theta 20 rather than 1e4: with 4 frequencies and 24 positions, 1e4 leaves half of them unturned
# and the ramp without a value between 0 and 1.
YARN = {
    "type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One model: the published spelling of its config and the scales of its random parameters."""

    family: str
    description: str
    config: dict
    router_gain: float
    expert_down_gain: float
    bias_mean: float = 0.0
    bias_std: float = 0.0


V3 = TINY | {
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
}
V2 = TINY | {
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
}
CASES = {
    "deepseek_v3": Case(
        family="v3",
        description="V3: latent queries, YaRN (mscale 1.0), sigmoid router, groups, negative bias.",
        config=V3
        | {
            "q_lora_rank": 24,
            "rope_theta": 20.0,
            "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
        router_gain=1.5,
        expert_down_gain=1.0,
        bias_mean=-0.7,
        bias_std=0.25,
    ),
    "deepseek_v2": Case(
        family="v2",
        description="V2: latent queries, YaRN (mscale 0.707), softmax router, groups, gates x16.",
        config=V2
        | {
            "q_lora_rank": 24,
            "rope_theta": 20.0,
            "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
        },
        router_gain=1.5,
        expert_down_gain=0.25,  # unnormalised gates sum to some 10
    ),
    "deepseek_v2_lite": Case(
        family="v2",
        description="V2-Lite: no query latent, YaRN (mscale 0.707), plain softmax top-k.",
        config=V2
        | {
            "q_lora_rank": None,
            "rope_theta": 20.0,
            "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
        },
        router_gain=1.5,
        expert_down_gain=2.0,
    ),
    "deepseek_v3_plain": Case(
        family="v3",
        description="V3 without YaRN and without query latent (theta 1e4).",
        config=V3 | {"q_lora_rank": None, "rope_theta": 10000.0, "rope_scaling": None},
        router_gain=1.5,
        expert_down_gain=1.0,
        bias_mean=-0.7,
        bias_std=0.25,
    ),
}
FAMILIES = {
    "v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
    "v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
}


def versions():
    """The versions that made a file."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }


# --- models ---------------------------------------------------------------------------------------


def build_config(case):
    """transformers' config, from the published spelling (that load path is under test as well)."""
    config_class, _ = FAMILIES[case.family]
    # A copy: transformers completes the rope dictionary in place.
    return config_class(**copy.deepcopy(case.config))


def build_model(case, seed):
    """A model whose every parameter is drawn from a stream of its own (name and seed)."""
    _, model_class = FAMILIES[case.family]
    config = build_config(case)
    model = model_class._from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, tensor in all_tensors(model).items():
            # RandomState's streams are frozen by NumPy; torch's differ between instruction sets.
            random = np.random.RandomState((zlib.crc32(name.encode()) + 1_000_003 * seed) % 2**32)
            noise = random.standard_normal(tuple(tensor.shape))
            tensor.copy_(torch.from_numpy(scaled(case, name, noise).astype(np.float32)))
    return model


def scaled(case, name, noise):
    """Noise at a scale that keeps activations O(1); std 0.02 would nearly tie all routing."""
    if name.endswith("e_score_correction_bias"):
        return case.bias_mean + case.bias_std * noise
    if "norm" in name:
        return 1 + 0.2 * noise  # not ones, or a forgotten norm weight goes unseen
    if "embed_tokens" in name:
        return noise
    if name.endswith("mlp.gate.weight"):
        gain = case.router_gain
    elif "experts.down_proj" in name and "shared" not in name:
        gain = case.expert_down_gain
    elif name.startswith("lm_head") or "q_b_proj" in name or "q_proj" in name:
        gain = 2.0  # attention and predictions with some contrast
    else:
        gain = 1.0
    return noise * gain / math.sqrt(noise.shape[-1])  # the last axis is the contracted one


def all_tensors(model):
    """Parameters, and the one buffer that a checkpoint holds."""
    tensors = dict(model.named_parameters())
    tensors |= {k: v for k, v in model.named_buffers() if k.endswith("e_score_correction_bias")}
    return tensors


def published_layout(tensors):
    """Names and slices of a published checkpoint: transformers 5 fuses experts in memory only."""
    out = {}
    for name, tensor in tensors.items():
        array = tensor.detach().numpy().astype(np.float32)
        if name.endswith("experts.gate_up_proj"):
            prefix, width = name.removesuffix("gate_up_proj"), array.shape[1] // 2
            for e in range(array.shape[0]):
                out[f"{prefix}{e}.gate_proj.weight"] = array[e, :width].copy()
                out[f"{prefix}{e}.up_proj.weight"] = array[e, width:].copy()
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for e in range(array.shape[0]):
                out[f"{prefix}{e}.down_proj.weight"] = array[e].copy()
        else:
            out[name] = array.copy()
    return out


# --- routing, a second time -----------------------------------------------------------------------


def select(logits, bias, config, *, mask=-math.inf, use_bias=True, use_groups=True):
    """The paper's selection in float64, with the two gaps that a tie could turn.

    Returns (indices sorted by id, gap at the k-th expert, gap at the last kept group). Softmax
    scores are compared by their logarithms: there a gap means the same whatever the scores' size.
    """
    logits = logits.astype(np.float64)
    if config.model_type == "deepseek_v3":
        scores = 1 / (1 + np.exp(-logits)) + (bias.astype(np.float64) if use_bias else 0)
        grouped, top = use_groups, 2
    else:
        scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        grouped, top = use_groups and config.topk_method == "group_limited_greedy", 1
    gap_group = np.inf
    if grouped:
        by_group = scores.reshape(*scores.shape[:-1], config.n_group, -1)
        group_scores = np.sort(by_group, -1)[..., -top:].sum(-1)
        order = np.sort(group_scores, -1)[..., ::-1]
        gap_group = (order[..., config.topk_group - 1] - order[..., config.topk_group]).min()
        kept = group_scores >= order[..., config.topk_group - 1, None]
        scores = np.where(kept[..., None], by_group, mask).reshape(scores.shape)
    k = config.num_experts_per_tok
    order = np.argsort(-scores, -1, kind="stable")
    ranked = np.take_along_axis(scores, order, -1)
    gap_expert = (ranked[..., k - 1] - ranked[..., k]).min()
    return np.sort(order[..., :k], -1), float(gap_expert), float(gap_group)


def moe_layers(model):
    """(name, router module) of each mixture layer, in order."""
    return [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("TopkRouter")]


def forward(model, input_ids):
    """One forward: logits, final hidden state, residual streams, the routers' outputs."""
    routed, streams, hidden, handles = [], [], [], []
    for _, router in moe_layers(model):
        handles.append(router.register_forward_hook(lambda m, i, o: routed.append(o)))
    for layer in model.model.layers:
        handles.append(layer.register_forward_hook(lambda m, i, o: streams.append(o)))
    handles.append(model.model.norm.register_forward_hook(lambda m, i, o: hidden.append(o)))
    try:
        logits = model(input_ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    shape = (len(routed), *input_ids.shape, -1)
    router_logits, gates, indices = (
        torch.stack(x).detach().reshape(shape) for x in zip(*routed, strict=True)
    )
    indices, order = indices.sort(-1)
    return {
        "logits": logits,
        "hidden": hidden[0].detach(),
        "layers": torch.stack(streams).detach(),
        "router/logits": router_logits,
        "router/indices": indices.to(torch.int32),
        "router/gates": gates.gather(-1, order),
    }


def routing_facts(model, out, config):
    """Gaps, loads and how many tokens each known wrong router would send elsewhere."""
    names = moe_layers(model)
    logits, chosen = out["router/logits"].numpy(), out["router/indices"].numpy()
    facts = {"min_gap_expert": math.inf, "min_gap_group": math.inf, "min_load": math.inf}
    wrong = {
        "mask_zero": {"mask": 0.0},
        "no_bias": {"use_bias": False},
        "no_groups": {"use_groups": False},
    }
    if config.model_type != "deepseek_v3":
        # In the logarithm 0.0 is no mask at all, and there is no bias.
        wrong = {"no_groups": wrong["no_groups"]} if config.n_group > 1 else {}
    told = dict.fromkeys(wrong, 0)
    for layer, (_, router) in enumerate(names):
        bias = getattr(router, "e_score_correction_bias", None)
        bias = None if bias is None else bias.numpy()
        indices, gap_expert, gap_group = select(logits[layer], bias, config)
        if not np.array_equal(indices, chosen[layer]) and min(gap_expert, gap_group) > 1e-5:
            raise AssertionError("transformers routes differently from the paper's rule")
        facts["min_gap_expert"] = min(facts["min_gap_expert"], gap_expert)
        facts["min_gap_group"] = min(facts["min_gap_group"], gap_group)
        load = np.bincount(chosen[layer].ravel(), minlength=config.n_routed_experts)
        facts["min_load"] = min(facts["min_load"], int(load.min()))
        for key, change in wrong.items():
            other, _, _ = select(logits[layer], bias, config, **change)
            told[key] += int((other != chosen[layer]).any(-1).sum())
    if facts["min_gap_group"] == math.inf:
        facts["min_gap_group"] = None
    facts["tokens_routed"] = int(chosen.shape[0] * chosen.shape[1] * chosen.shape[2])
    facts["tokens_that_tell"] = told
    return facts


# --- a case ---------------------------------------------------------------------------------------


def draw(case, seed):
    """A model and its inputs if nothing about them is nearly tied, else None."""
    model = build_model(case, seed)
    random = np.random.RandomState(seed)
    ids = torch.from_numpy(random.randint(0, case.config["vocab_size"], (BATCH, LENGTH)))
    with torch.no_grad():
        facts = routing_facts(model, forward(model, ids), model.config)
    if not clear(facts):
        return None
    _, continuation_logits, longer = continue_greedily(model, ids)
    top = np.sort(continuation_logits, -1)
    argmax_gap = float((top[..., -1] - top[..., -2]).min())
    with torch.no_grad():
        facts_longer = routing_facts(model, forward(model, longer), model.config)
    if not clear(facts_longer) or argmax_gap < MIN_ARGMAX_GAP:
        return None
    # Of the longer text: its beginning is the input, so its gaps are the smaller ones.
    for key in ("min_gap_expert", "min_gap_group"):
        facts[key] = facts_longer[key]
    return model, ids, facts | {"min_gap_argmax": argmax_gap}


def clear(facts):
    """No near tie, no idle expert, and every known wrong router is caught by some token."""
    gaps = [g for g in (facts["min_gap_expert"], facts["min_gap_group"]) if g is not None]
    return (
        min(gaps) > MIN_ROUTER_GAP
        and facts["min_load"] > 0
        and all(facts["tokens_that_tell"].values())
    )


def continue_greedily(model, ids):
    """Greedy tokens by full forwards: (tokens, the logits that chose them, input and tokens)."""
    all_logits = []
    with torch.no_grad():
        for _ in range(CONTINUATION):
            last = model(ids, use_cache=False).logits[:, -1]
            all_logits.append(last)
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
    return ids[:, -CONTINUATION:].numpy(), torch.stack(all_logits, 1).numpy(), ids


def compute(model, ids):
    """Everything a golden file holds but the parameters, as numpy."""
    model.zero_grad(set_to_none=True)
    out = forward(model, ids)
    logits = out["logits"][:, :-1].reshape(-1, out["logits"].shape[-1])
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1))
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        # An expert that no token chose would have None; `clear` excludes that for the eager path.
        gradients[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    tokens, token_logits, _ = continue_greedily(model, ids)
    tensors = {k: v.detach().numpy() for k, v in out.items()} | {
        "input_ids": ids.numpy().astype(np.int32),
        "loss": loss.detach().numpy(),
        "continuation": tokens.astype(np.int32),
        "continuation_logits": token_logits,
    }
    return tensors | {f"grad/{k}": v for k, v in published_layout(gradients).items()}


def peer_noise(model, ids, tensors):
    """How far transformers' other path (sdpa, grouped_mm) lands: a floor for tolerances."""
    model.set_attn_implementation("sdpa")
    model.set_experts_implementation("grouped_mm")
    other = compute(model, ids)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    worst = max(
        (k for k in tensors if k.startswith("grad/")), key=lambda k: distance(other[k], tensors[k])
    )
    return {
        "logits": distance(other["logits"], tensors["logits"]),
        "worst_gradient": distance(other[worst], tensors[worst]),
        "worst_gradient_name": worst.removeprefix("grad/"),
    }


def distance(a, b):
    """Norm of the difference over the norm of the reference."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def rms(x):
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def check_layout(model, parameters):
    """Our split of the experts must be what `save_pretrained` writes; returns config.json."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(str(pathlib.Path(folder) / "model.safetensors"))
        config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    if saved.keys() != parameters.keys():
        raise AssertionError(f"names differ: {sorted(saved.keys() ^ parameters.keys())[:5]}")
    for name, array in saved.items():
        if not np.array_equal(array, parameters[name]):
            raise AssertionError(f"values differ: {name}")
    return config


def make_model(name, folder):
    """Draws until nothing is nearly tied, then writes one case."""
    case = CASES[name]
    for seed in range(MAX_SEEDS):
        drawn = draw(case, seed)
        if drawn is not None:
            break
    else:
        raise RuntimeError(f"{name}: no clear draw in {MAX_SEEDS} seeds")
    model, ids, facts = drawn
    parameters = published_layout(all_tensors(model))
    config = check_layout(model, parameters)
    tensors = compute(model, ids)
    facts["rms"] = {
        "layers": [rms(x) for x in tensors["layers"]],
        "logits": rms(tensors["logits"]),
        "hidden": rms(tensors["hidden"]),
    }
    facts["loss"] = float(tensors["loss"])
    facts["peer_noise"] = peer_noise(model, ids, tensors)
    facts["softmax_scale"] = float(model.model.layers[0].self_attn.scaling)
    facts["rope_factor"] = float(model.model.rotary_emb.attention_scaling)
    tensors |= {f"param/{k}": v for k, v in parameters.items()}
    notes = [
        "Selected experts are sorted by id; gates follow and include the scaling factor.",
        "Gaps are in float64: of biased sigmoid scores (V3), of log-softmax scores (V2).",
        "tokens_that_tell: tokens whose experts change under that fault, both layers.",
    ]
    if case.family == "v3":
        notes.append("transformers masks excluded groups with -inf; a mask of 0.0 is told.")
    else:
        notes.append("transformers masks groups with 0.0; scores are positive, so -inf agrees.")
    write(
        folder,
        name,
        tensors,
        {
            "name": name,
            "description": case.description,
            "architecture": FAMILIES[case.family][1].__name__,
            "seed": seed,
            "versions": versions(),
            "config": config,
            "config_published": case.config
            | {"model_type": config["model_type"], "architectures": config["architectures"]},
            "facts": facts,
            "notes": notes,
        },
    )


def load_golden(name, folder):
    """The tensors and the JSON of one case."""
    tensors = load_file(str(folder / f"{name}.safetensors"))
    return tensors, json.loads((folder / f"{name}.json").read_text())


def check_model(name, folder):
    """Recomputes one case from its parameters, loaded by transformers; returns complaints."""
    golden, info = load_golden(name, folder)
    parameters = {k.removeprefix("param/"): v for k, v in golden.items() if k.startswith("param/")}
    complaints = []
    drawn = published_layout(all_tensors(build_model(CASES[name], info["seed"])))
    if drawn.keys() != parameters.keys() or any((drawn[k] != parameters[k]).any() for k in drawn):
        complaints.append(f"{name}: the parameters are not those of seed {info['seed']}")
    ids = torch.from_numpy(golden["input_ids"].astype(np.int64))
    spellings = {k: info[k] for k in ("config", "config_published")}
    for spelling, config in spellings.items():
        with tempfile.TemporaryDirectory() as path:
            (pathlib.Path(path) / "config.json").write_text(json.dumps(config))
            save_file(parameters, str(pathlib.Path(path) / "model.safetensors"), {"format": "pt"})
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float32,
                attn_implementation="eager",
                experts_implementation="eager",
            ).eval()
        complaints += compare(f"{name} ({spelling})", compute(model, ids), golden)
    return complaints


def compare(label, new, golden):
    """Complaints about every tensor that is not the golden one; prints the worst distance."""
    complaints, worst = [], (0.0, "")
    stored = {k for k in golden if not k.startswith("param/")}
    if stored != new.keys():
        complaints.append(f"{label}: tensors differ: {sorted(stored ^ new.keys())[:5]}")
    for key in sorted(stored & new.keys()):
        if golden[key].dtype == np.int32:
            if not np.array_equal(golden[key], new[key]):
                complaints.append(f"{label}: {key} differs")
            continue
        found = distance(new[key], golden[key])
        worst = max(worst, (found, key))
        if not found <= CHECK_TOLERANCE:
            complaints.append(f"{label}: {key} is {found:.1e} away")
    print(f"{label}: worst distance {worst[0]:.1e} {worst[1]}")
    return complaints


# --- rotary tables --------------------------------------------------------------------------------

POSITIONS = (0, 1, 2, 7, 100, 1023, 4095, 4096, 20000, 163839)
# (mscale, mscale_all_dim); the third is nobody's, but alone scales cos and sin by other than 1.
ROPES = {"v2": (0.707, 0.707), "v3": (1.0, 1.0), "uneven": (1.0, 0.707)}


def compute_yarn():
    """Tables of the published YaRN by transformers, and exact ones (float64, rounded once)."""
    tensors = {"positions": np.asarray(POSITIONS, np.int32)}
    facts = {}
    for name, (mscale, mscale_all_dim) in ROPES.items():
        scaling = {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": mscale,
            "mscale_all_dim": mscale_all_dim,
        }
        published = dict(rope_theta=10000.0, rope_scaling=scaling, max_position_embeddings=163840)
        config = transformers.DeepseekV3Config(**copy.deepcopy(published), num_hidden_layers=1)
        module = transformers.models.deepseek_v3.modeling_deepseek_v3
        rotary = module.DeepseekV3RotaryEmbedding(config)
        cos, sin = rotary(torch.zeros(1), torch.tensor([POSITIONS]))
        half = config.qk_rope_head_dim // 2  # transformers stores the angles twice, side by side
        exact = yarn_reference(scaling, 10000.0, config.qk_rope_head_dim)
        angles = np.asarray(POSITIONS, np.float64)[:, None] * exact
        factor = float(rotary.attention_scaling)
        tensors |= {
            f"{name}/inv_freq": rotary.inv_freq.numpy(),
            f"{name}/inv_freq_exact": exact.astype(np.float32),
            f"{name}/cos": cos[0, :, :half].numpy(),
            f"{name}/sin": sin[0, :, :half].numpy(),
            f"{name}/cos_exact": (factor * np.cos(angles)).astype(np.float32),
            f"{name}/sin_exact": (factor * np.sin(angles)).astype(np.float32),
            f"{name}/attention_scaling": np.asarray(factor, np.float32),
            f"{name}/softmax_scale": np.asarray(
                module.yarn_apply_mscale(config.rope_parameters, config.qk_head_dim**-0.5),
                np.float32,
            ),
        }
        facts[name] = {
            "config_published": published | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
            "inv_freq_distance_to_exact": distance(rotary.inv_freq.numpy(), exact),
            "worst_cos_error_per_position": {
                str(p): float(np.abs(cos[0, i, :half].numpy() - factor * np.cos(angles[i])).max())
                for i, p in enumerate(POSITIONS)
            },
        }
    return {k: np.ascontiguousarray(v) for k, v in tensors.items()}, facts


def yarn_reference(scaling, theta, dim):
    """YaRN's inverse frequencies in float64, written from DeepSeek's published inference code."""

    def correction_dim(rotations):
        length = scaling["original_max_position_embeddings"]
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction_dim(scaling["beta_fast"])), 0)
    high = min(math.ceil(correction_dim(scaling["beta_slow"])), dim - 1)
    plain = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    return plain / scaling["factor"] * ramp + plain * (1 - ramp)


def make_yarn(folder):
    """Writes the rotary tables."""
    tensors, facts = compute_yarn()
    write(
        folder,
        "yarn",
        tensors,
        {
            "name": "yarn",
            "description": "YaRN as published with V2 and V3 (theta 1e4, x40 from 4096, R 64).",
            "versions": versions(),
            "facts": facts,
            "notes": [
                "cos and sin are [positions, 32], one angle a pair, attention_scaling included.",
                "Without _exact: transformers in float32, where an angle of 1e5 has a spacing of"
                " 0.008: correct programs differ at far positions, by some of the errors here.",
                "_exact: float64 arithmetic, rounded once.",
                "softmax_scale is (128 + 64)^-0.5 times mscale_all_dim's mscale, squared.",
                "'uneven' is no published model: it alone has attention_scaling other than 1.",
            ],
        },
    )


def check_yarn(folder):
    """Recomputes the rotary tables; returns the complaints."""
    golden, _ = load_golden("yarn", folder)
    return compare("yarn", compute_yarn()[0], golden)


def write(folder, name, tensors, info):
    """One safetensors file and its JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {k: list(v.shape) for k, v in tensors.items() if not k.startswith(("param/", "grad/"))}
    path = folder / f"{name}.safetensors"
    tensors = {k: np.ascontiguousarray(tensors[k]) for k in sorted(tensors)}
    save_file(tensors, str(path), {"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600
    if path.stat().st_size > MAX_BYTES:
        raise RuntimeError(f"{path.name} has {path.stat().st_size} bytes")
    info |= {"shapes": shapes}
    (folder / f"{name}.json").write_text(json.dumps(info, indent=2) + "\n")
    print(f"{name}: seed {info.get('seed')}, {len(tensors)} tensors, {path.stat().st_size} bytes")


def main(argv=None):
    """Makes or checks the golden files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=", ".join([*CASES, "yarn"]))
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--folder", type=pathlib.Path, default=GOLDEN)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # these matrices are too small for two
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = args.names or [*CASES, "yarn"]
    unknown = set(names) - {*CASES, "yarn"}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    complaints = []
    for name in names:
        if args.check:
            complaints += (
                check_yarn(args.folder) if name == "yarn" else check_model(name, args.folder)
            )
        elif name == "yarn":
            make_yarn(args.folder)
        else:
            make_model(name, args.folder)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if args.check:
        print("goldens agree" if not complaints else f"{len(complaints)} complaints")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
