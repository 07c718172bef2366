"""How far each recipe's gradients are from float32's, layer by layer.

python -m experiments.gradient_error --workdir=runs/precision/BF16-0

At the newest weights of a run and on one batch of its held-out text.
"""

import json
import sys
from pathlib import Path

from absl import flags

from dsjax.errors import InputError
from dsjax.gradient_error import gradient_errors, table
from experiments import command

FLAGS = command.define_flags(default_preset=None, default_workdir=None)
flags.DEFINE_string("json_out", None, "A file for the figures.", flag_values=FLAGS)


def _body(values: flags.FlagValues) -> None:
    if not values.workdir:
        raise InputError("--workdir is needed: the folder of a run")
    if values.preset is not None or values.set:
        raise InputError("--preset and --set have no effect: the run decides")
    errors = gradient_errors(values.workdir)
    print(table(errors))
    if values.json_out:
        Path(values.json_out).write_text(json.dumps(errors, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
