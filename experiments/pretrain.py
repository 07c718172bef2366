"""Pretrains a preset on text, or goes on where a killed run stopped.

python -m experiments.pretrain --preset=tiny --workdir=runs/tiny
python -m experiments.pretrain --preset=tiny --init=SmolLM2 --workdir=runs/tuned
python -m experiments.pretrain --preset=deepseek_v3 --dry_run --picture=schedule.png

Ctrl-C or SIGTERM ends the step, saves and exits with 0; the same command goes on. Exit code 1 says
that the run could not go on (disk full, loss not finite); what was saved is still there.
"""

import dataclasses
import os
import sys

from absl import flags

from dsjax import load_pretrained
from dsjax.config import Config
from dsjax.errors import InputError
from dsjax.interop.published import Published, is_published
from dsjax.meshes import check_training
from dsjax.overrides import override
from dsjax.plan.count import parameter_counts
from dsjax.presets import preset
from dsjax.train.clock import process_age_s
from dsjax.train.loop import PretrainResult, pretrain
from dsjax.train.pictures import check_picture, plot_schedule
from dsjax.train.recipe import describe, schedule_rows
from dsjax.workdir import COMPILED, CONFIG_FILE, read_run
from experiments import command, running

FLAGS = command.define_flags(default_preset="tiny", default_workdir=None)
flags.DEFINE_integer(
    "steps", None, "Length of the main stage, in steps of the full batch.", flag_values=FLAGS
)
flags.DEFINE_string(
    "init",
    None,
    "Folder of a run, whose weights and tokenizer to begin with, or of a published model, which "
    "then takes the place of the preset's.",
    flag_values=FLAGS,
)
running.define_processes(FLAGS)
flags.DEFINE_bool("dry_run", False, "Prints the schedule and trains nothing.", flag_values=FLAGS)
flags.DEFINE_string("picture", None, "Where --dry_run draws the schedule.", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "sample",
    ["def main(", "class ", "KING HENRY"],
    "Prompts to continue at the end.",
    flag_values=FLAGS,
)


def _body(values: flags.FlagValues) -> None:
    config = _configured(values)
    if values.steps is not None:
        config = command.with_steps(config, values.steps)
    if values.dry_run:
        _dry_run(config, values.preset, values.picture)
        return
    if values.picture is not None:
        raise InputError("--picture goes with --dry_run; a run draws schedule.png in its workdir")
    if not values.workdir:
        raise InputError("--workdir is needed: the folder that the run is kept in")
    for prompt in values.sample:
        if not prompt or prompt.encode(errors="ignore").decode() != prompt:
            raise InputError(f"--sample={prompt!r} is no text to continue")
    command.keep_compiled(os.path.join(values.workdir, COMPILED))
    with running.joined(values) as processes:
        result = pretrain(
            config,
            values.workdir,
            seed=values.seed,
            init=values.init,
            age_s=process_age_s(),
            processes=processes,
        )
    if processes.index == 0:
        _report(values, config, result)


def _report(values: flags.FlagValues, config: Config, result: PretrainResult) -> None:
    """Prints how the run went, and some text that it can write by now."""
    if not running.tell(result) or (where := running.place(config)) is None:
        return
    lm = load_pretrained(values.workdir, **where)
    assert lm.tokenizer is not None  # every run has one
    for prompt in values.sample:
        room = config.model.max_positions - len(lm.tokenizer.encode(prompt))
        if room < 1:
            continue
        text = lm.generate(prompt, max_tokens=min(64, room), temperature=0.7, seed=values.seed)
        print(f"\n--- {prompt!r}\n{prompt}{text}")


def _configured(values: flags.FlagValues) -> Config:
    """The preset with its overrides, around the model of a published folder where one is given."""
    if values.init is None:
        return command.configured(values)
    known = values.workdir and os.path.isfile(os.path.join(values.workdir, CONFIG_FILE))
    began = read_run(values.workdir) if known else None
    if began is not None and began.init is not None:
        folder, _, mark = began.init.rpartition("@")
        if folder == os.path.realpath(values.init):  # which may be gone by now
            if mark.isdecimal():  # another run
                return command.configured(values)
            config = dataclasses.replace(preset(values.preset), model=began.config.model)
            return override(config, *values.set)
    if is_published(values.init):
        with Published(values.init) as published:
            config = dataclasses.replace(preset(values.preset), model=published.model)
        return override(config, *values.set)
    if not os.path.isfile(os.path.join(values.init, CONFIG_FILE)):
        raise InputError(
            f"--init={values.init} holds neither {CONFIG_FILE} (a run) nor config.json (a "
            "published model)"
        )
    return command.configured(values)


def _dry_run(config: Config, name: str, picture: str | None) -> None:
    check_training(config)
    if picture is not None:
        check_picture(picture)
    counts = parameter_counts(config)
    print(f"{name}: {counts.total:,} parameters, {counts.active:,} active, MTP {counts.mtp:,}")
    print(describe(config))
    if picture is not None:
        drawn = plot_schedule(picture, schedule_rows(config))
        print(drawn or "no picture: matplotlib (the extra plot) is missing, or the disk is full")


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
