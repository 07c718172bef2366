"""Continues a prompt with the model of a run.

python -m experiments.generate --workdir=runs/tiny --prompt="def main("
"""

import sys

from absl import flags

from dsjax import load_pretrained
from dsjax.errors import InputError
from experiments import command

FLAGS = command.define_flags(default_preset=None, default_workdir=None)
flags.DEFINE_string("prompt", None, "Text to continue.", flag_values=FLAGS)
flags.DEFINE_integer("max_tokens", 64, "Budget of new tokens.", flag_values=FLAGS)
flags.DEFINE_float("temperature", 0.7, "0 takes the best token.", flag_values=FLAGS)
flags.DEFINE_float("top_p", 0.95, "Keeps this much probability.", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "Checkpoint; the newest if left out.", flag_values=FLAGS)


def _body(values: flags.FlagValues) -> None:
    if not values.workdir:
        raise InputError("--workdir is needed: the folder of a run")
    if values.prompt is None:
        raise InputError("--prompt is needed: the text to continue")
    lm = load_pretrained(values.workdir, step=values.step, overrides=values.set)
    if values.preset is not None:
        command.check_preset(values, lm.config)
    text = lm.generate(
        values.prompt,
        max_tokens=values.max_tokens,
        temperature=values.temperature,
        top_p=values.top_p,
        seed=values.seed,
    )
    print(values.prompt + text)


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
