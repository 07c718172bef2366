"""Reinforcement learning by GRPO on rewards that can be checked.

python -m experiments.grpo --init=runs/base --workdir=runs/rl --task=reasoning_gym:chain_sum
python -m experiments.grpo --init=SmolLM2 --workdir=runs/gsm8k --task='gsm8k/*.jsonl' --steps=200

Ctrl-C or SIGTERM ends the step, saves and exits with 0; the same command goes on, also in the
middle of a rollout's mini-batches. Exit code 1 says that the run could not go on.
"""

import json
import os
import sys

from absl import flags

from dsjax.errors import InputError
from dsjax.overrides import override
from dsjax.rl.loop import GrpoResult, train_grpo
from dsjax.rl.recipe import around, recipe, recipes
from dsjax.train.clock import process_age_s
from dsjax.workdir import COMPILED
from experiments import command

FLAGS = command.define_flags(default_preset=None, default_workdir=None)
flags.DEFINE_string(
    "init",
    None,
    "Folder of a run, or of a published model, whose weights and tokenizer to begin with.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "recipe", "r1_zero", f"What --set overrides: {', '.join(recipes())}.", flag_values=FLAGS
)
flags.DEFINE_string(
    "task",
    None,
    "reasoning_gym:FAMILY, several joined by +, or a glob of JSON lines with prompt and answer.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("steps", None, "Optimizer steps.", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "reward",
    [],
    "A reward, name or module:function, with its weight: accuracy=1. These replace the recipe's.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "allow_unsafe_code_execution",
    False,
    "Runs programs that the model wrote without a sandbox where none works.",
    flag_values=FLAGS,
)


def _body(values: flags.FlagValues) -> None:
    if values.preset:
        raise InputError("--preset is not for this script: the model is that of --init")
    if not values.init or not values.workdir:
        raise InputError("--init and --workdir are needed: what to begin with, where to keep it")
    assignments = []
    if values.task is not None:
        assignments.append(f"rl.task={json.dumps(values.task)}")
    if values.steps is not None:
        assignments.append(f"rl.steps={values.steps}")
    if values.reward:
        assignments.append(f"rl.rewards={json.dumps([_reward(text) for text in values.reward])}")
    config = around(values.init, recipe(values.recipe))
    config = override(config, *assignments, *values.set)
    command.keep_compiled(os.path.join(values.workdir, COMPILED))
    result = train_grpo(
        *(config, values.workdir),
        init=values.init,
        seed=values.seed,
        allow_unsafe_code=values.allow_unsafe_code_execution,
        age_s=process_age_s(),
    )
    _tell(result)


def _reward(text: str) -> dict[str, object]:
    name, _, weight = text.partition("=")
    try:
        return {"name": name, "weight": float(weight or 1.0)}
    except ValueError:
        raise InputError(f"--reward={text}: {weight!r} is no weight") from None


def _tell(result: GrpoResult) -> None:
    for when, figures in (("before", result.before), ("after", result.after)):
        if figures is not None:
            told = ", ".join(f"{name} {value:.3f}" for name, value in sorted(figures.items()))
            print(f"held out {when}: {told}")
    if result.shares:
        told = ", ".join(f"{name} {share:.0%}" for name, share in result.shares.items())
        print(f"time of steps: {told}")
    if result.stopped_by is not None:
        print(f"stopped by {result.stopped_by} after step {result.step}; run it again to go on")


def main(argv: list[str]) -> int:
    """Runs the script; argv holds the program's name and its flags."""
    return command.run(FLAGS, _body, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
