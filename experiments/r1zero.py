"""R1-Zero in small, in minutes on two cores: base, rewards alone in three seeds, two controls.

python -m experiments.r1zero --workdir=runs/r1zero
python -m experiments.r1zero --workdir=runs/r1zero --seeds=1 --nocontrols

Ctrl-C or SIGTERM ends the step, saves and exits with 0; the same command goes on.
"""

import os
import sys

from absl import flags

from dsjax.errors import InputError
from dsjax.rl.r1zero import MAX_SEEDS, run_r1zero
from dsjax.workdir import COMPILED
from experiments import command

FLAGS = command.define_flags(default_preset=None, default_workdir=None)
flags.DEFINE_integer("seeds", 3, "Runs, each with problems of its own.", flag_values=FLAGS)
flags.DEFINE_bool(
    "controls", True, "Also a run by format alone and one by shuffled rewards.", flag_values=FLAGS
)


def _body(values: flags.FlagValues) -> None:
    if values.preset or values.set or values.seed:
        raise InputError("this script takes --workdir, --seeds and --controls alone")
    if not values.workdir:
        raise InputError("--workdir is needed: the folder that the runs are kept in")
    if not 1 <= values.seeds <= MAX_SEEDS:
        raise InputError(f"--seeds is {values.seeds}; it must lie in [1, {MAX_SEEDS}]")
    command.keep_compiled(os.path.join(values.workdir, COMPILED))
    found = run_r1zero(values.workdir, seeds=values.seeds, controls=values.controls)
    if found is None:
        print("stopped; run it again to go on")


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
