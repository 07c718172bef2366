"""Times every kernel on the device at hand, as shares of what it can do and beside its peers.

python -m experiments.bench_kernels --part=product --json_out=product.json --target_out=gpu.txt
python -m experiments.bench_kernels --read=product.json --read=grouped.json --page=docs/kernels.md

Each call is held against the plain form first, and what is wrong is said to be wrong, not timed. In
the same run: ceilings (large products, a copy), XLA's own products, and in a process of its own
(--torch, an interpreter that has torch and CUDA) cuBLASLt's block-scaled product and torch's
grouped ones. --minutes ends the run in good time: what was not reached is listed. Without an
accelerator, or with --smoke, shapes are tiny and figures mean nothing: it tests the script.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
from absl import flags

from dsjax.errors import InputError
from experiments import command
from experiments.kernels import figures

PARTS = ("product", "weight_gradient", "grouped", "quantize", "decode", "attention")

FLAGS = command.define_flags(default_preset=None, default_workdir=None)
flags.DEFINE_multi_enum("part", PARTS, PARTS, "What to measure.", flag_values=FLAGS)
flags.DEFINE_bool("smoke", False, "Tiny shapes: tests the script.", flag_values=FLAGS)
flags.DEFINE_float("minutes", 9.0, "No case begins after that.", flag_values=FLAGS)
flags.DEFINE_string(
    "torch", sys.executable, "The peer's interpreter; '' for none.", flag_values=FLAGS
)
flags.DEFINE_string("json_out", None, "File for the JSON; stdout if left out.", flag_values=FLAGS)
flags.DEFINE_string(
    "target_out", None, "File for the GPU as XLA describes it, to compile for.", flag_values=FLAGS
)
flags.DEFINE_multi_string("read", [], "JSON of earlier runs; nothing is run.", flag_values=FLAGS)
flags.DEFINE_string("page", None, "Page whose figures to make anew.", flag_values=FLAGS)


def _body(values: flags.FlagValues) -> None:
    results = [_read(name) for name in values.read] or [_measure(values)]
    if values.page is not None:
        _make_page(values.page, results)
    if not values.read:
        text = json.dumps(results[0], indent=1)
        if values.json_out is None:
            print(text)
        else:
            Path(values.json_out).write_text(text + "\n", encoding="utf-8")


def _measure(values: flags.FlagValues) -> dict:
    # The peer needs memory, too; read when the device is first used.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from experiments.kernels import bench

    smoke = values.smoke or jax.default_backend() == "cpu"
    if values.page is not None and smoke:
        raise InputError(
            "--page takes figures of an accelerator; here is none, or --smoke is given"
        )
    if values.target_out is not None:
        _save_target(values.target_out)
    return {
        "machine": _machine(),
        "smoke": smoke,
        **bench.run(
            values.part,
            smoke=smoke,
            torch=values.torch,
            minutes=values.minutes,
            seed=values.seed,
        ),
    }


def _machine() -> dict:
    device = jax.devices()[0]
    told = {
        "device": device.device_kind,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "jax": jax.__version__,
        "runtime": device.client.platform_version,
        "python": platform.python_version(),
    }
    if jax.default_backend() == "gpu":
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
            told["driver, power limit"] = done.stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            told["driver, power limit"] = f"unknown: {error}"
    return told


def _save_target(name: str) -> None:
    """Writes what `experiments.kernels.ahead` needs to compile for this GPU elsewhere."""
    if jax.default_backend() != "gpu":
        raise InputError("--target_out describes a GPU; here is none")
    from jax._src.lib import xla_client

    topology = xla_client.get_topology_for_devices(jax.devices())
    Path(name).write_text(topology.target_config, encoding="utf-8")


def _read(name: str) -> dict:
    try:
        return json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--read={name}: {error}") from error


def _make_page(name: str, results: list[dict]) -> None:
    page = Path(name)
    try:
        text = page.read_text(encoding="utf-8")
        page.write_text(figures.with_figures(text, results), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"--page={name}: {error}") from error


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
