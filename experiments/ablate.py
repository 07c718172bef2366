"""Asks the recipe a question: the same short run with one thing changed, several seeds each.

python -m experiments.ablate --study=balance --preset=tiny --workdir=runs/balance --steps=300

Stopped, it goes on: finished runs are not trained again. Writes results.json and study.png.
"""

import sys

from absl import flags

from dsjax.errors import InputError
from dsjax.study import run_study, study_named, summary
from experiments import command

FLAGS = command.define_flags(default_preset="tiny", default_workdir=None)
flags.DEFINE_string("study", "balance", "balance, mtp, fim or fp8.", flag_values=FLAGS)
flags.DEFINE_integer("seeds", 3, "Runs of each variant.", flag_values=FLAGS)
flags.DEFINE_integer("steps", 300, "Steps of each run.", flag_values=FLAGS)


def _body(values: flags.FlagValues) -> None:
    study = study_named(values.study)
    config = command.configured(values)
    if not values.workdir:
        raise InputError("--workdir is needed: the folder that the runs are kept in")
    if values.seeds < 1:
        raise InputError(f"--seeds is {values.seeds}; it must be at least 1")
    config = command.with_steps(config, values.steps)
    command.keep_compiled(f"{values.workdir}/compiled")
    print(study.question)
    results = run_study(study, config, values.workdir, seeds=values.seeds)
    print("stopped; the same command goes on" if results is None else summary(results))


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
