"""Writes golden files of `tests/golden` from tiny random Qwen2 and Llama models, or checks them.

Runs in the oracle interpreter (`make oracle`: torch CPU + transformers) and imports nothing of
dsjax. `--check` loads the committed parameters through transformers' own importer, from either
spelling of the config, computes everything again and compares.

Each case is two files, as `make_golden.py` writes them. `NAME.safetensors` (floats float32,
integers int32):

    input_ids            [B, T]
    param/NAME           every parameter under the name it has in a published checkpoint
    grad/NAME            gradient of `loss` with respect to it
    logits               [B, T, V]
    loss                 scalar: mean next-token cross entropy, B * (T - 1) shifted positions
    continuation         [B, 8], greedy tokens found by full forwards, without a cache
    continuation_logits  [B, 8, V], the logits that chose them

`NAME.json`: the config as transformers saves it (`config`) and as it is published
(`config_published`), seed, versions, and measured facts (`facts`): how near the nearest tie is, how
far another path of transformers lands, and how far the logits go under a known fault
(`distance_under`); a draw that would not tell a fault is refused.

Where the two may differ from a reading of the papers:

* Both rotate number i of a head with number i + width / 2, not with its neighbour.
* Key/value head j serves the query heads j * N / I up to (j + 1) * N / I.
* Llama's head_dim is a field of its own; `llama` has one that is not hidden / heads. Qwen2's
  published files have none.
* Qwen2 has biases on queries, keys and values, whatever its config says; Llama's `attention_bias`
  puts one on the output, too. transformers draws them as zeros; here they are not.
* Llama 3's rope leaves fast pairs alone, divides slow ones and blends between; `llama` has pairs
  of all three kinds.
"""

import argparse
import copy
import dataclasses
import json
import math
import pathlib
import sys
import tempfile
import zlib

import make_golden
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

BATCH = 2
LENGTH = 40  # beyond the original length of `llama`
MAX_BYTES = 200_000
MAX_SEEDS = 2000
# A redraw is asked for below these; float32 noise of two correct programs is some 1e-5 in a logit.
MIN_ARGMAX_GAP = 5e-2
MIN_DISTANCE_UNDER_FAULT = 3e-2

SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# The fields that R1's distilled models have beside those.
QWEN2 = SMALL | {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "max_window_layers": 21,
    "sliding_window": 4096,
    "use_mrope": False,
    "use_sliding_window": False,
}
LLAMA = SMALL | {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One model: the published spelling of its config."""

    family: str
    description: str
    config: dict


CASES = {
    "qwen2": Case(
        family="qwen2",
        description="Qwen2: biases on queries, keys and values, two query heads a key head.",
        config=QWEN2,
    ),
    "qwen2_tied": Case(
        family="qwen2",
        description="Qwen2 whose head is its embedding.",
        config=QWEN2 | {"tie_word_embeddings": True, "rope_theta": 1000000.0},
    ),
    "llama": Case(
        family="llama",
        description="Llama 3: frequencies for a longer context, heads wider than hidden / heads.",
        config=LLAMA
        | {
            "head_dim": 12,
            "rms_norm_eps": 1e-5,
            # With 1e4 and six pairs, no wavelength lies between fast and slow.
            "rope_theta": 20.0,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 32,
                "rope_type": "llama3",
            },
        },
    ),
    "llama_linear": Case(
        family="llama",
        description="Llama as deepseek-coder is: linear interpolation, no grouping of heads.",
        config={k: v for k, v in LLAMA.items() if k not in ("attention_bias", "mlp_bias")}
        | {
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "rope_theta": 100000,
            "rope_scaling": {"factor": 4.0, "type": "linear"},
        },
    ),
    "llama_bias": Case(
        family="llama",
        description="Llama with biases on all four projections of attention.",
        config=LLAMA
        | {
            "num_key_value_heads": 1,
            "attention_bias": True,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": None,
        },
    ),
}
FAMILIES = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}


# --- models ---------------------------------------------------------------------------------------


def build_model(case, seed, **changes):
    """A model whose every parameter is drawn from a stream of its own (name and seed)."""
    config_class, model_class = FAMILIES[case.family]
    # A copy: transformers completes the rope dictionary in place.
    config = config_class(**copy.deepcopy(case.config | changes))
    model = model_class._from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            random = np.random.RandomState((zlib.crc32(name.encode()) + 1_000_003 * seed) % 2**32)
            noise = random.standard_normal(tuple(tensor.shape))
            tensor.copy_(torch.from_numpy(scaled(case, name, noise).astype(np.float32)))
    return model.eval()


def scaled(case, name, noise):
    """Noise at a scale that keeps activations O(1), biases among them."""
    if "norm" in name:
        return 1 + 0.2 * noise  # not ones, or a forgotten norm weight goes unseen
    if name.endswith("bias"):
        return 0.5 * noise
    if "embed_tokens" in name and not case.config["tie_word_embeddings"]:
        return noise
    gain = 2.0 if name.startswith(("lm_head", "model.embed")) or "q_proj" in name else 1.0
    return noise * gain / math.sqrt(noise.shape[-1])  # the last axis is the contracted one


def parameters_of(model):
    """Every parameter as a checkpoint holds it; a tied head is not there."""
    return {k: v.detach().numpy().astype(np.float32) for k, v in model.named_parameters()}


def logits_of(model, ids):
    """Logits of a full forward."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits.numpy()


def interleaved(module):
    """Makes a family's module rotate neighbours with one another; returns what undoes it."""
    plain = module.rotate_half

    def neighbours(x):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((-b, a), -1).flatten(-2)

    module.rotate_half = neighbours

    def undo():
        module.rotate_half = plain

    return undo


def distance_under(case, model, seed, ids):
    """How far the logits go under each known fault."""
    right, told = logits_of(model, ids), {}

    def tell(name, other):
        told[name] = make_golden.distance(logits_of(other, ids), right)

    if case.config.get("rope_scaling"):
        tell("no_rope_scaling", build_model(case, seed, rope_scaling=None))
    for part in ("q", "k", "v", "o"):
        other = build_model(case, seed)
        found = [p for n, p in other.named_parameters() if n.endswith(f"{part}_proj.bias")]
        if found:
            with torch.no_grad():
                for bias in found:
                    bias.zero_()
            # A bias on keys adds the same to every score of a query, but for the rotation.
            tell(f"no_{part}_bias", other)
    heads, kept = case.config["num_attention_heads"], case.config["num_key_value_heads"]
    if 1 < kept < heads:
        other = build_model(case, seed)
        with torch.no_grad():  # query heads dealt out in turn
            for layer in other.model.layers:
                attention = layer.self_attn
                order = torch.arange(heads).reshape(heads // kept, kept).T.flatten()
                for tensor in (attention.q_proj.weight, attention.q_proj.bias):
                    if tensor is not None:
                        by_head = tensor.unflatten(0, (heads, -1))
                        tensor.copy_(by_head[order].flatten(0, 1))
                output = attention.o_proj.weight
                output.copy_(output.unflatten(1, (heads, -1))[:, order].flatten(1, 2))
        tell("heads_dealt_in_turn", other)
    undo = interleaved(sys.modules[type(model).__module__])
    try:
        tell("neighbours_rotated", model)
    finally:
        undo()
    return told


# --- a case ---------------------------------------------------------------------------------------


def draw(case, seed):
    """A model and its inputs if no choice is nearly tied and every fault is told, else None."""
    model = build_model(case, seed)
    random = np.random.RandomState(seed)
    ids = torch.from_numpy(random.randint(0, case.config["vocab_size"], (BATCH, LENGTH)))
    _, continuation_logits, _ = make_golden.continue_greedily(model, ids)
    top = np.sort(continuation_logits, -1)
    gap = float((top[..., -1] - top[..., -2]).min())
    if gap < MIN_ARGMAX_GAP:
        return None
    told = distance_under(case, model, seed, ids)
    if min(told.values()) < MIN_DISTANCE_UNDER_FAULT:
        return None
    return model, ids, {"min_gap_argmax": gap, "distance_under": told}


def compute(model, ids):
    """Everything a golden file holds but the parameters, as numpy."""
    model.zero_grad(set_to_none=True)
    logits = model(ids, use_cache=False).logits
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    loss = torch.nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1))
    loss.backward()
    tokens, token_logits, _ = make_golden.continue_greedily(model, ids)
    tensors = {
        "input_ids": ids.numpy().astype(np.int32),
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        "continuation": tokens.astype(np.int32),
        "continuation_logits": token_logits,
    }
    return tensors | {f"grad/{k}": p.grad.numpy() for k, p in model.named_parameters()}


def peer_noise(model, ids, tensors):
    """How far transformers' other path (sdpa) lands: a floor for tolerances."""
    model.set_attn_implementation("sdpa")
    other = compute(model, ids)
    model.set_attn_implementation("eager")
    grads = [k for k in tensors if k.startswith("grad/")]
    worst = max(grads, key=lambda k: make_golden.distance(other[k], tensors[k]))
    return {
        "logits": make_golden.distance(other["logits"], tensors["logits"]),
        "worst_gradient": make_golden.distance(other[worst], tensors[worst]),
        "worst_gradient_name": worst.removeprefix("grad/"),
    }


def saved_config(model, parameters):
    """What `save_pretrained` writes beside the same tensors: the content of its config.json."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(str(pathlib.Path(folder) / "model.safetensors"))
        config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    if saved.keys() != parameters.keys():
        raise AssertionError(f"names differ: {sorted(saved.keys() ^ parameters.keys())[:5]}")
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
    parameters = parameters_of(model)
    config = saved_config(model, parameters)
    tensors = compute(model, ids)
    facts["rms"] = {"logits": make_golden.rms(tensors["logits"])}
    facts["loss"] = float(tensors["loss"])
    facts["peer_noise"] = peer_noise(model, ids, tensors)
    facts["inv_freq"] = [float(f) for f in model.model.rotary_emb.inv_freq]
    tensors |= {f"param/{k}": v for k, v in parameters.items()}
    make_golden.write(
        folder,
        name,
        tensors,
        {
            "name": name,
            "description": case.description,
            "architecture": FAMILIES[case.family][1].__name__,
            "seed": seed,
            "versions": make_golden.versions(),
            "config": config,
            "config_published": case.config
            | {"model_type": config["model_type"], "architectures": config["architectures"]},
            "facts": facts,
            "notes": [
                "distance_under: of the logits, under a fault; so small an error would be seen.",
                "no_k_bias: without rotation a bias on keys would change nothing.",
            ],
        },
    )
    size = (folder / f"{name}.safetensors").stat().st_size
    if size > MAX_BYTES:
        raise RuntimeError(f"{name}.safetensors has {size} bytes")


def check_model(name, folder):
    """Recomputes one case from its parameters, loaded by transformers; returns complaints."""
    golden, info = make_golden.load_golden(name, folder)
    parameters = {k.removeprefix("param/"): v for k, v in golden.items() if k.startswith("param/")}
    complaints = []
    drawn = parameters_of(build_model(CASES[name], info["seed"]))
    if drawn.keys() != parameters.keys() or any((drawn[k] != parameters[k]).any() for k in drawn):
        complaints.append(f"{name}: the parameters are not those of seed {info['seed']}")
    ids = torch.from_numpy(golden["input_ids"].astype(np.int64))
    for spelling in ("config", "config_published"):
        with tempfile.TemporaryDirectory() as path:
            (pathlib.Path(path) / "config.json").write_text(json.dumps(info[spelling]))
            save_file(parameters, str(pathlib.Path(path) / "model.safetensors"), {"format": "pt"})
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        complaints += make_golden.compare(f"{name} ({spelling})", compute(model, ids), golden)
    return complaints


def main(argv=None):
    """Makes or checks the golden files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=", ".join(CASES))
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--folder", type=pathlib.Path, default=make_golden.GOLDEN)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # these matrices are too small for two
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = args.names or list(CASES)
    if unknown := set(names) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    complaints = []
    for name in names:
        if args.check:
            complaints += check_model(name, args.folder)
        else:
            make_model(name, args.folder)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if args.check:
        print("goldens agree" if not complaints else f"{len(complaints)} complaints")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
