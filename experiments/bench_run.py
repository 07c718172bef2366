"""Benchmarks what surrounds the train step: waiting for data, saving, and compiling again.

python -m experiments.bench_run --preset=tiny --steps=400 --out=run.json

Trains for half the steps in one process and for the rest in another, as a run that was stopped goes
on, and adds up what each says of its time. JSON goes to stdout or to --out.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import flags

from dsjax.errors import InputError
from dsjax.train.metrics import read_metrics
from experiments import command

FLAGS = command.define_flags(default_preset="tiny", default_workdir=None)
flags.DEFINE_integer("steps", 400, "Steps of both processes together.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "File for the JSON; stdout if left out.", flag_values=FLAGS)

# One process of the run; prints the seconds that JAX spent tracing, lowering and compiling.
_PROCESS = """
import json, sys
import jax
from dsjax.train.clock import process_age_s
from dsjax.train.loop import pretrain
from experiments import command, pretrain as script

spent = {}
def hear(event, seconds, **_):
    if event.startswith("/jax/core/compile/"):
        name = event.removeprefix("/jax/core/compile/").removesuffix("_duration")
        spent[name] = spent.get(name, 0.0) + seconds
jax.monitoring.register_event_duration_secs_listener(hear)
workdir, steps, stop, *arguments = sys.argv[1:]
script.FLAGS(["bench", *arguments])
config = command.with_steps(command.configured(script.FLAGS), int(steps))
command.keep_freed_memory()
command.keep_compiled(workdir + "/compiled")
result = pretrain(config, workdir, age_s=process_age_s(), stop_at_step=int(stop))
print(json.dumps({"compile_s": spent, "shares": result.shares, "wall_s": process_age_s()}))
"""


def _body(values: flags.FlagValues) -> None:
    if values.steps < 4:
        raise InputError(f"--steps is {values.steps}; it must be at least 4")
    settings = [f"--set={assignment}" for assignment in values.set]
    with tempfile.TemporaryDirectory() as folder:
        workdir = values.workdir or os.path.join(folder, "run")
        processes = [
            _run(workdir, values.steps, stop, [f"--preset={values.preset}", *settings])
            for stop in (values.steps // 2, values.steps)
        ]
        # Without a process's first step, which compiles.
        rows = [row for row in read_metrics(workdir) if "tokens_per_s" in row]
    step_s = sum(
        row["batch_size"] * row["seq_len"] / row["tokens_per_s"] + row["save_s"] for row in rows
    )
    first, second = (sum(process["compile_s"].values()) for process in processes)
    figures = {
        "preset": values.preset,
        "steps": values.steps,
        "tokens_per_s": sum(row["batch_size"] * row["seq_len"] for row in rows) / step_s,
        "data_wait_share": sum(row["data_wait_s"] for row in rows) / step_s,
        "save_share": sum(row["save_s"] for row in rows) / step_s,
        "saves": sum(row["save_s"] > 0 for row in rows),
        "compile_s": {"first process": first, "resumed process": second},
        "compile_ratio": second / first,
        "processes": processes,
    }
    text = json.dumps(figures, indent=1)
    if values.out is None:
        print(text)
    else:
        Path(values.out).write_text(text + "\n", encoding="utf-8")


def _run(workdir: str, steps: int, stop: int, arguments: list[str]) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, workdir, str(steps), str(stop), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
