"""Benchmarks reading and converting published checkpoints: memory over the target's size, and time.

python -m experiments.bench_convert --gib=2 --out=convert.json

Makes a synthetic checkpoint of V3's kind, of random numbers, and reads it in processes of their
own, one for each way; the peer, transformers in the oracle's interpreter (`make oracle`), reads the
BF16 one, in turn with ours. Memory is what a process has at most over what it had before it began
to read, less the arrays that it made, sampled every 10 ms: its own, and with it the pages of the
checkpoint that are mapped in. JSON goes to stdout or to --out.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from dsjax.config import Config
from dsjax.errors import InputError
from dsjax.interop import hf, save
from dsjax.interop.hf_config import CONFIG_FILE, exported_config
from dsjax.interop.published import as_json
from dsjax.overrides import override
from experiments import command

FLAGS = command.define_flags(default_preset="small", default_workdir=None)
flags.DEFINE_float("gib", 2.0, "Size of the BF16 checkpoint; FP8's has half.", flag_values=FLAGS)
flags.DEFINE_integer("repeats", 3, "Processes of each kind; the median counts.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "File for the JSON; stdout if left out.", flag_values=FLAGS)
flags.DEFINE_string(
    "oracle", ".venv-oracle/bin/python", "The peer's interpreter; '' for none.", flag_values=FLAGS
)

_WATCH = """
import json, sys, threading, time
def status():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    mapped, ours = 0, False
    for line in open("/proc/self/smaps"):
        if "-" in line.split(" ", 1)[0]:
            ours = ".safetensors" in line
        elif ours and line.startswith("Rss:"):
            mapped += int(line.split()[1]) * 1024
    own = int(fields["RssAnon"].split()[0]) * 1024
    return {"own": own, "own and mapped": own + mapped}
class Watch:
    def __enter__(self):
        self.before, self.most, self.on = status(), status(), True
        def look():
            while self.on:
                now = status()
                self.most = {k: max(v, now[k]) for k, v in self.most.items()}
                time.sleep(0.01)
        self.thread = threading.Thread(target=look); self.thread.start()
        self.start = time.perf_counter()
        return self
    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.start
        self.on = False; self.thread.join()
    def tell(self, target):
        over = {f"{k}, over target": self.most[k] - self.before[k] - target for k in self.most}
        print(json.dumps({"seconds": self.seconds, "target bytes": target} | over))
"""
_LOAD = (
    _WATCH
    + """
import jax, jax.numpy as jnp, dsjax
jnp.zeros(8).block_until_ready()
with Watch() as watch:
    lm = dsjax.load_pretrained(sys.argv[1], dtype=sys.argv[2])
    jax.block_until_ready(lm.params)
watch.tell(sum(leaf.nbytes for leaf in jax.tree.leaves((lm.params, lm.bias))))
"""
)
_CONVERT = (
    _WATCH
    + """
import jax.numpy as jnp
from dsjax.interop.published import Published, convert
jnp.zeros(8).block_until_ready()
with Watch() as watch, Published(sys.argv[1]) as source:
    convert(source, sys.argv[3], sys.argv[2], requantize=True)
watch.tell(0)
"""
)
_PEER = (
    _WATCH
    + """
import torch, transformers
transformers.utils.logging.disable_progress_bar()
with Watch() as watch:
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    total = sum(float(p.reshape(-1)[:1]) for p in model.parameters())  # every tensor is there
watch.tell(sum(p.nbytes for p in model.parameters()))
"""
)


def _body(values: flags.FlagValues) -> None:
    if not 0.01 <= values.gib <= 64:
        raise InputError(f"--gib is {values.gib}; it must lie in [0.01, 64]")
    if values.repeats < 1:
        raise InputError(f"--repeats is {values.repeats}; it must be at least 1")
    with tempfile.TemporaryDirectory(dir=values.workdir) as base:
        folder = Path(base)
        config = _sized(command.configured(values), values.gib * 2**30)
        largest = {}
        for dtype in ("bfloat16", "fp8"):
            largest[dtype] = _make(config, folder / dtype, dtype)
        ways = {
            "load bfloat16": (_LOAD, "bfloat16", "bfloat16"),
            "load fp8, kept": (_LOAD, "fp8", "fp8"),
            "load fp8 as bfloat16": (_LOAD, "fp8", "bfloat16"),
            "load fp8 as float32": (_LOAD, "fp8", "float32"),
            "convert fp8 to bfloat16": (_CONVERT, "fp8", "bfloat16"),
            "convert bfloat16 to fp8": (_CONVERT, "bfloat16", "fp8"),
        }
        figures: dict = {"checkpoint": _sizes(folder, largest), "ours": {}}
        for name, (program, source, dtype) in ways.items():
            runs = []
            for i in range(values.repeats):
                target = folder / f"target {i}"
                arguments = [folder / source, dtype, target]
                runs.append(_run(sys.executable, program, *arguments))
                subprocess.run(["rm", "-rf", target], check=True)
            figures["ours"][name] = _summed(runs, largest[source])
        if values.oracle and Path(values.oracle).exists():
            figures["peer"] = _against_peer(folder, values)
    text = json.dumps(figures, indent=1)
    if values.out is None:
        print(text)
    else:
        Path(values.out).write_text(text + "\n", encoding="utf-8")


def _sized(config: Config, wanted: float) -> Config:
    """The configuration with as many layers of experts as make that many bytes of BF16."""

    def num_bytes(layers: int) -> int:
        model = override(config, f"model.stacks.moe.repeats={layers}").model
        return sum(spec.num_bytes for spec in save.specs(model, "bfloat16").values())

    one, two = num_bytes(1), num_bytes(2)
    layers = max(1, round(1 + (wanted - one) / (two - one)))
    return override(config, f"model.stacks.moe.repeats={layers}", "model.mtp=null")


def _make(config: Config, target: Path, dtype: save.Dtype) -> int:
    """Writes a checkpoint of random numbers; the size of its largest tensor."""
    model = config.model
    plan = save.specs(model, dtype)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(1 << 20).astype(np.float32) * 0.02

    def pieces(name: str):
        left, step = int(np.prod(plan[name].shape)), len(noise)
        scale = name.endswith(hf.SCALE_SUFFIX)
        while left > 0:
            values = np.abs(noise[: min(left, step)]) + 1e-6 if scale else noise[: min(left, step)]
            yield np.asarray(_as(values, plan[name].dtype))
            left -= step

    total = sum(spec.num_bytes for spec in plan.values())
    with tqdm(desc=f"making {dtype}", total=total, unit="B", unit_scale=True) as bar:
        save.write_folder(
            target,
            plan,
            pieces,
            {CONFIG_FILE: as_json(exported_config(model, dtype, "float32"))},
            on_bytes=bar.update,
        )
    return max(spec.num_bytes for spec in plan.values())


def _as(values: np.ndarray, dtype: str) -> np.ndarray:
    import ml_dtypes

    kinds = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "F8_E4M3": ml_dtypes.float8_e4m3fn}
    return values.astype(kinds[dtype])


def _sizes(folder: Path, largest: dict[str, int]) -> dict[str, dict[str, int]]:
    return {
        name: {
            "bytes": sum(f.stat().st_size for f in (folder / name).glob("*.safetensors")),
            "largest tensor": size,
        }
        for name, size in largest.items()
    }


def _run(python: str, program: str, *arguments: object) -> dict[str, float]:
    done = subprocess.run(
        [python, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TQDM_DISABLE": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def _summed(runs: list[dict[str, float]], largest: int | None = None) -> dict[str, float]:
    """The median time, and the most memory of all runs."""
    summed = {name: max(run[name] for run in runs) for name in runs[0]}
    summed["seconds"] = statistics.median(run["seconds"] for run in runs)
    if largest is not None:
        summed["in largest tensors"] = summed["own and mapped, over target"] / largest
    return summed


def _against_peer(folder: Path, values: flags.FlagValues) -> dict:
    """Ours and transformers in turn, on the BF16 checkpoint."""
    ours, theirs = [], []
    for _ in range(values.repeats):
        ours.append(_run(sys.executable, _LOAD, folder / "bfloat16", "bfloat16"))
        theirs.append(_run(values.oracle, _PEER, folder / "bfloat16"))
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True)]
    return {
        "transformers": _summed(theirs),
        "ours": _summed(ours),
        "seconds, ours over theirs": {"median": statistics.median(ratios), "pairs": ratios},
    }


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
