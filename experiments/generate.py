"""Continues a prompt, or answers it, with the model of a run or of a published folder.

python -m experiments.generate --workdir=runs/tiny --prompt="def main("
python -m experiments.generate --workdir=SmolLM2 --chat --prompt="What is 2+3?"
"""

import sys

from absl import flags

from dsjax import load_pretrained
from dsjax.errors import InputError
from experiments import command

FLAGS = command.define_flags(default_preset=None, default_workdir=None)
flags.DEFINE_string("prompt", None, "Text to continue.", flag_values=FLAGS)
flags.DEFINE_bool(
    "chat", False, "Answers the prompt through the model's chat template.", flag_values=FLAGS
)
flags.DEFINE_integer("max_tokens", 64, "Budget of new tokens.", flag_values=FLAGS)
flags.DEFINE_float("temperature", 0.7, "0 takes the best token.", flag_values=FLAGS)
flags.DEFINE_float("top_p", 0.95, "Keeps this much probability.", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "Checkpoint; the newest if left out.", flag_values=FLAGS)
flags.DEFINE_string(
    "dtype", None, "To compute in; that of the folder if left out.", flag_values=FLAGS
)
flags.DEFINE_multi_string(
    "ignore", [], "Unknown field of config.json that changes nothing.", flag_values=FLAGS
)


def _body(values: flags.FlagValues) -> None:
    if not values.workdir:
        raise InputError("--workdir is needed: the folder of a run")
    if values.prompt is None:
        raise InputError("--prompt is needed: the text to continue")
    lm = load_pretrained(
        values.workdir,
        step=values.step,
        dtype=values.dtype,
        overrides=values.set,
        ignore=values.ignore,
    )
    if values.preset is not None:
        command.check_preset(values, lm.config)
    how = {
        "max_tokens": values.max_tokens,
        "temperature": values.temperature,
        "top_p": values.top_p,
        "seed": values.seed,
    }
    if values.chat:
        print(lm.chat(values.prompt, **how))
    else:
        print(values.prompt + lm.generate(values.prompt, **how))


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
