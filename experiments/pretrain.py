"""Pretrains a preset on text, or goes on where a killed run stopped.

python -m experiments.pretrain --preset=tiny --workdir=runs/tiny
"""

import dataclasses
import sys

from absl import flags

from dsjax import load_pretrained
from dsjax.errors import InputError
from dsjax.train.loop import pretrain
from experiments import command

FLAGS = command.define_flags(default_preset="tiny", default_workdir=None)
flags.DEFINE_integer("steps", None, "Length of the run, in steps.", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "sample",
    ["def main(", "class ", "KING HENRY"],
    "Prompts to continue at the end.",
    flag_values=FLAGS,
)


def _body(values: flags.FlagValues) -> None:
    config = command.configured(values)
    if not values.workdir:
        raise InputError("--workdir is needed: the folder that the run is kept in")
    for prompt in values.sample:
        if not prompt or prompt.encode(errors="ignore").decode() != prompt:
            raise InputError(f"--sample={prompt!r} is no text to continue")
    if values.steps is not None:
        if values.steps < 1:
            raise InputError(f"--steps is {values.steps}; it must be at least 1")
        total = values.steps * config.train.tokens_per_step
        config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, total_tokens=total)
        )
    result = pretrain(config, values.workdir, seed=values.seed)
    for label, figures in (("before", result.before), ("after", result.after)):
        loss, bits = figures["eval_loss"], figures["bits_per_byte"]
        print(f"held-out loss {label}: {loss:.4f} nats a token, {bits:.4f} bits a byte")
    if result.tokens_per_s is not None:
        print(f"{result.tokens_per_s:,.0f} tokens/s")
    lm = load_pretrained(values.workdir)
    assert lm.tokenizer is not None  # every run has one
    for prompt in values.sample:
        room = config.model.max_positions - len(lm.tokenizer.encode(prompt))
        if room < 1:
            continue
        text = lm.generate(prompt, max_tokens=min(64, room), temperature=0.7, seed=values.seed)
        print(f"\n--- {prompt!r}\n{prompt}{text}")


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
