r"""Compiles a model's decode or prefill for accelerators that need not be there; runs nothing.

python -m experiments.compile_check --preset=deepseek_v3 --topology=h100:1x8 --program=decode \
    --cached=131072 --set mesh.rules=decode --set mesh.tensor=8 --json_out=decode.json

`make aot` installs the compilers. What they say of a device's memory is printed as JSON: the
weights and the cache among the arguments, and the temporaries of a step.
"""

import json
import subprocess
import sys
from pathlib import Path

from absl import flags

from dsjax.errors import InputError, RunError
from dsjax.overrides import to_json
from experiments import command
from experiments.ahead_of_time import topologies

FLAGS = command.define_flags(default_preset="deepseek_v3", default_workdir=None)
flags.DEFINE_string(
    "topology", None, "Devices: h100:NODESxDEVICES, v6e:2x4, v5p:4x4x8, ...", flag_values=FLAGS
)
flags.DEFINE_enum(
    "program", "decode", ["decode", "prefill"], "What is compiled.", flag_values=FLAGS
)
flags.DEFINE_integer("rows", 1, "Sequences, over all devices.", 1, flag_values=FLAGS)
flags.DEFINE_integer("cached", 131_072, "Positions of a sequence's cache.", 1, flag_values=FLAGS)
flags.DEFINE_string("aot", str(topologies.AOT), "Folder of the compilers.", flag_values=FLAGS)
flags.DEFINE_string("json_out", None, "File for the JSON; stdout if left out.", flag_values=FLAGS)


def _body(values: flags.FlagValues) -> None:
    if values.topology is None:
        raise InputError("--topology is needed: the devices to compile for")
    environment = topologies.environment(values.topology, values.aot)
    config = command.configured(values)
    request = {
        "topology": values.topology,
        "config": to_json(config),
        "program": values.program,
        "rows": values.rows,
        "cached": values.cached,
    }
    done = subprocess.run(
        [sys.executable, "-m", "experiments.ahead_of_time.program"],
        input=json.dumps(request),
        cwd=topologies.REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 2:
        raise InputError(done.stderr.splitlines()[-1])
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-3:])
        raise RunError(f"compiling for {values.topology} ended with {done.returncode}: {last}")
    text = json.dumps(json.loads(done.stdout), indent=1)
    if values.json_out is None:
        print(text)
    else:
        Path(values.json_out).write_text(text + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
