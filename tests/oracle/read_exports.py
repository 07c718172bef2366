"""Reads exported folders with transformers and says what it makes of them; see tests/test_peer.py.

Runs in the oracle interpreter (torch CPU + transformers) and imports nothing of dsjax. Of ROOT it
takes `ids.npy` [B, T] and every folder NAME in `exports`, and writes there:

    NAME.json   keys that transformers missed, did not expect or found of another shape, and how
                near the nearest tie of a router is
    NAME.npz    `logits` [B, T, V] and, of a model with MTP, `mtp_k` [B, T - 1 - k, V] at depth k:
                position i predicts token i + 2 + k
    NAME.again  the model as transformers saves it

FP8 is made float32 first, in NAME.plain, by the rule of DeepSeek's published `weight_dequant`:
weight times `weight_scale_inv` of its block of 128x128. transformers' own reader of FP8 is of no
use here: it takes a block's size to be the weight's over the grid's, so that a weight whose sides
are no multiples of 128 - V3's own kv_a_proj_with_mqa, [576, 7168] - is refused, or read wrongly.

MTP of V3 is transformers' own (`MtpModel`, behind `generate(use_mtp=True)`). It finds the layers by
`_keys_to_ignore_on_load_unexpected`, which names layer 61: of a smaller model they count as
unexpected, and here the pattern is moved to where they are.
"""

import argparse
import copy
import json
import pathlib
import sys

import make_golden
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

BLOCK = 128
PLAIN = {"dtype": torch.float32, "attn_implementation": "eager"}


def load(folder):
    """(model, loading report) of a folder, in float32."""
    config = json.loads((folder / "config.json").read_text())
    options = dict(PLAIN)
    if config["model_type"].startswith("deepseek"):
        options["experts_implementation"] = "eager"
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options
    )
    return model.eval(), report


def mtp_logits(model, ids):
    """Logits of each prediction depth, by transformers' own modules."""
    layers, depth = model.config.num_hidden_layers, model.config.num_nextn_predict_layers
    model._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{layers + k}\..*" for k in range(depth)
    ]
    mtp = MtpModel.from_pretrained(model).eval()
    hidden = model.model(ids, use_cache=False).last_hidden_state
    told = {}
    for k in range(depth):
        next_ids = ids[:, k + 1 :]
        where = torch.arange(k + 1, ids.shape[1]).expand_as(next_ids)
        hidden = mtp.forward_layer(k, hidden[:, :-1], where, None, input_ids=next_ids)
        told[f"mtp_{k}"] = model.lm_head(hidden).numpy()
    return told


def dequantised(tensors):
    """FP8 weights and their scales -> float32 weights; the rest as it is."""
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[f"{name}_scale_inv"].float()
            rows, cols = tensor.shape
            wide = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :cols]
            tensor = tensor.float() * wide
        plain[name] = tensor.contiguous()
    return plain


def plain_folder(folder):
    """The folder of an FP8 export in float32."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    plain = folder.with_name(f"{folder.name}.plain")
    plain.mkdir()
    save_file(dequantised(tensors), plain / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    return plain


def read(folder, ids):
    """Reads one folder and writes what is said above."""
    told = {}
    content = json.loads((folder / "config.json").read_text())
    source = plain_folder(folder) if "quantization_config" in content else folder
    model, report = load(source)
    told |= {key: sorted(map(str, found)) for key, found in report.items()}
    with torch.no_grad():
        arrays = {"logits": model(ids, use_cache=False).logits.numpy()}
        if make_golden.moe_layers(model):
            facts = make_golden.routing_facts(model, make_golden.forward(model, ids), model.config)
            told["min_gap_expert"] = facts["min_gap_expert"]
            told["min_gap_group"] = facts["min_gap_group"]
        if getattr(model.config, "num_nextn_predict_layers", 0):
            arrays |= mtp_logits(copy.copy(model), ids)
    np.savez(folder.with_name(f"{folder.name}.npz"), **arrays)
    folder.with_name(f"{folder.name}.json").write_text(json.dumps(told, indent=2) + "\n")
    model.save_pretrained(folder.with_name(f"{folder.name}.again"))


def main(argv=None):
    """Reads every export of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", type=pathlib.Path, help="without one, nothing is done")
    args = parser.parse_args(argv)
    if args.root is None:  # `make oracle` runs every script of this folder
        return 0
    torch.set_num_threads(1)  # these matrices are too small for two
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ids = torch.from_numpy(np.load(args.root / "ids.npy").astype(np.int64))
    for folder in sorted(path for path in (args.root / "exports").iterdir() if path.is_dir()):
        read(folder, ids)
    return 0


if __name__ == "__main__":
    sys.exit(main())
