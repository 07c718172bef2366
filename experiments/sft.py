"""Fine-tunes a model on conversations: what the assistant wrote is learnt, the rest is context.

python -m experiments.sft --init=runs/tiny --workdir=runs/sft --data=messages.jsonl --template=plain
python -m experiments.sft --init=SmolLM2 --workdir=runs/sft --data=messages.jsonl --epochs=2
python -m experiments.sft --preset=tiny --workdir=runs/sft --data=messages.jsonl --template=r1_zero

A line of the data has `messages`, with or without `tools`, or `prompt` and `completion`. Without
--init a preset with random weights learns, with a tokenizer made for the data. Ctrl-C, SIGTERM and
exit codes are those of experiments.pretrain, and so is what the same command does later.
"""

import dataclasses
import math
import os
import sys

from absl import flags

from dsjax import LanguageModel, load_pretrained
from dsjax.config import Config, DataConfig, SourceConfig
from dsjax.errors import InputError
from dsjax.interop.published import Published, is_published
from dsjax.interop.tokenizer import Tokenizer
from dsjax.overrides import override
from dsjax.presets import preset
from dsjax.train.begin import first_tokenizer
from dsjax.train.clock import process_age_s
from dsjax.train.loop import pretrain
from dsjax.train.tuning import EPOCHS, published_recipe, tuning_recipe, with_epochs
from dsjax.workdir import COMPILED, CONFIG_FILE, Run, check_workdir, read_run
from experiments import command, running

FLAGS = command.define_flags(default_preset=None, default_workdir=None)
flags.DEFINE_string(
    "init",
    None,
    "Folder of a run or of a published model, whose weights and tokenizer to begin with. R1's "
    "recipe is the default for a published model, the sizes and rate of the run for a run.",
    flag_values=FLAGS,
)
flags.DEFINE_multi_string("data", [], "Glob of .jsonl files; repeatable.", flag_values=FLAGS)
flags.DEFINE_string(
    "template",
    None,
    "Chat template in the place of the tokenizer's own: plain, r1_zero, or a file *.jinja.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("steps", None, "Length, in steps.", flag_values=FLAGS)
flags.DEFINE_float(
    "epochs", None, f"Length, in passes over the data; {EPOCHS:g} by default.", flag_values=FLAGS
)
flags.DEFINE_multi_string(
    "sample", [], "Questions to ask at the end, through the template.", flag_values=FLAGS
)
running.define_processes(FLAGS)


def _body(values: flags.FlagValues) -> None:
    _check(values)
    config = override(_base(values), *values.set)
    if not config.data.has_conversations:
        raise InputError("no source of data.sources holds conversations")
    command.keep_compiled(os.path.join(values.workdir, COMPILED))
    with running.joined(values) as processes:
        if values.steps is not None:
            config = command.with_steps(config, values.steps)
        else:
            tokenizer = _tokenizer(values, config)
            config = with_epochs(
                config, EPOCHS if values.epochs is None else values.epochs, tokenizer
            )
        result = pretrain(
            config,
            values.workdir,
            seed=values.seed,
            init=values.init,
            age_s=process_age_s(),
            processes=processes,
        )
    if processes.index != 0 or not running.tell(result):
        return
    if values.sample and (where := running.place(config)) is not None:
        lm = load_pretrained(values.workdir, **where)
        for question in values.sample:
            print(f"\n--- {question!r}\n{_answer(lm, question, values.seed)}")


def _check(values: flags.FlagValues) -> None:
    if not values.workdir:
        raise InputError("--workdir is needed: the folder that the run is kept in")
    if not values.data:
        raise InputError("--data is needed: a glob of .jsonl files with conversations")
    if values.init is not None and values.preset is not None:
        raise InputError("--init brings its own model; --preset goes without it")
    if values.steps is not None and values.epochs is not None:
        raise InputError("give --steps or --epochs, not both")
    if values.epochs is not None and not (math.isfinite(values.epochs) and values.epochs > 0):
        raise InputError(f"--epochs is {values.epochs:g}; it must be positive")
    for question in values.sample:
        if not question or question.encode(errors="ignore").decode() != question:
            raise InputError(f"--sample={question!r} is no text to ask")


def _base(values: flags.FlagValues) -> Config:
    """What is tuned and how, before overrides."""
    sources = tuple(SourceConfig(path=path, format="conversations") for path in values.data)
    data = DataConfig(sources=sources, chat_template=values.template)
    if values.init is None:
        return dataclasses.replace(preset(values.preset or "tiny"), data=data)
    if is_published(values.init):
        with Published(values.init) as published:
            model = published.model
        return Config(model=model, train=published_recipe(model), data=data)
    if os.path.isfile(os.path.join(values.init, CONFIG_FILE)):
        began = read_run(values.init).config
        return dataclasses.replace(began, train=tuning_recipe(began.train), data=data)
    known = _known(values)
    if known is not None and known.init is not None:
        folder = known.init.rpartition("@")[0]
        if folder == os.path.realpath(values.init):  # which is gone by now
            return dataclasses.replace(known.config, data=data)
    raise InputError(
        f"--init={values.init} holds neither {CONFIG_FILE} (a run) nor config.json (a published "
        "model)"
    )


def _known(values: flags.FlagValues) -> Run | None:
    """The run that the workdir holds already."""
    there = os.path.isfile(os.path.join(values.workdir, CONFIG_FILE))
    return read_run(values.workdir) if there else None


def _tokenizer(values: flags.FlagValues, config: Config) -> Tokenizer:
    """That of the run, which may not have begun."""
    if _known(values) is not None:
        return Tokenizer.load(os.path.join(values.workdir, "tokenizer"))
    check_workdir(values.workdir, Run(config=config, seed=values.seed, init=values.init))
    return first_tokenizer(config, values.init)


def _answer(lm: LanguageModel, question: str, seed: int) -> str:
    """What the model says by now; a model without a template continues the text."""
    assert lm.tokenizer is not None  # every run has one
    try:
        if lm.tokenizer.chat_template is None:
            return lm.generate(question, max_tokens=64, temperature=0.7, seed=seed)
        return lm.chat(question, max_tokens=64, temperature=0.7, seed=seed)
    except InputError as error:  # no room for an answer, or a template that takes no such question
        return f"({error})"


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
