"""Asks the model of a run for a fact that stands somewhere in a text of filler.

python -m experiments.needle --workdir=runs/context --length=128 --length=1024

For runs on builtin:recall (the preset tiny_context). --step chooses a checkpoint, and so the stage;
--set overrides the rope, for a control.
"""

import statistics
import sys

import numpy as np
from absl import flags

from dsjax import load_pretrained
from dsjax.errors import InputError
from dsjax.evaluate.needle import needle_accuracy
from experiments import command

FLAGS = command.define_flags(default_preset=None, default_workdir=None)
flags.DEFINE_multi_integer("length", [128, 1024], "Tokens of a text.", flag_values=FLAGS)
flags.DEFINE_integer("repeats", 8, "Texts for each length and depth.", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "Which checkpoint; the newest.", flag_values=FLAGS)


def _body(values: flags.FlagValues) -> None:
    if not values.workdir:
        raise InputError("--workdir is needed: the folder of a run")
    lm = load_pretrained(values.workdir, step=values.step, overrides=values.set)
    if values.preset is not None:
        command.check_preset(values, lm.config)
    assert lm.tokenizer is not None  # every run has one
    if values.repeats < 1:
        raise InputError(f"--repeats is {values.repeats}; it must be at least 1")
    for length in values.length:
        if not 32 <= length <= lm.config.model.max_positions:
            most = lm.config.model.max_positions
            raise InputError(f"--length={length} must lie in [32, {most}] (model.max_positions)")
    for length in values.length:
        found = needle_accuracy(
            lambda tokens: np.asarray(lm.logits(tokens)),
            lm.tokenizer,
            length=length,
            repeats=values.repeats,
            seed=values.seed,
        )
        by_depth = ", ".join(f"{depth:g}: {share:.2f}" for depth, share in found.items())
        print(
            f"{length:>7} tokens: {statistics.fmean(found.values()):.3f} found (depth {by_depth})"
        )


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
