"""How a run begins: with which weights and which tokenizer, and how that is remembered.

Knows nothing about steps. A run names its beginning as `folder@mark`, the step of another run or
the fingerprint of a published folder, so that it begins with the same after it was killed early.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dsjax.checkpoint import read_params
from dsjax.config import Config, ModelConfig
from dsjax.data.corpus import find_tokenizer, with_template
from dsjax.durable import write_durably
from dsjax.errors import InputError
from dsjax.interop.chat import ChatTemplate
from dsjax.interop.hf_config import computes_alike
from dsjax.interop.load import load
from dsjax.interop.published import (
    GENERATION_BYTES,
    GENERATION_FILE,
    Published,
    also_ending,
    fingerprint,
    is_published,
)
from dsjax.interop.tensor_files import read_small
from dsjax.interop.tokenizer import Tokenizer
from dsjax.interop.turns import turn_end
from dsjax.overrides import first_difference, to_json
from dsjax.train.state import TrainState, abstract_state, blueprint, create, fresh_state
from dsjax.workdir import CONFIG_FILE, Run, read_run
from sharding.distributed import Processes
from sharding.spread import Spread


def recorded_init(workdir: str | os.PathLike, init: str | os.PathLike | None) -> str | None:
    """Where the first weights come from: a folder, or `folder@step` for a run that goes on.

    It keeps the step that it began with: there may be newer ones by now.
    """
    if init is None:
        return None
    folder = os.path.realpath(init)
    if os.path.isfile(os.path.join(workdir, CONFIG_FILE)):
        there = read_run(workdir).init
        if there is not None and there.rpartition("@")[0] == folder:
            return there
    return folder


def first_tokenizer(config: Config, init: str | os.PathLike | None) -> Tokenizer:
    """The tokenizer that a run begins with: that of `init`, or the one that the data name.

    Raises:
        InputError: if it cannot be had, or has more ids than the model.
    """
    if init is not None:
        folder = init if is_published(init) else os.path.join(init, "tokenizer")
        tokenizer, vocab_size = Tokenizer.load(folder), config.model.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise InputError(
                f"the tokenizer of {folder} has {tokenizer.vocab_size} ids, more than "
                f"model.vocab_size {vocab_size}"
            )
        return with_template(config.data, tokenizer)
    return find_tokenizer(config.data, config.model.vocab_size)


def saving(
    config: Config, tokenizer: Tokenizer, init: str | os.PathLike | None
) -> Callable[[str | os.PathLike], None]:
    """Writes the tokenizer, and beside it how a turn ends: as before, and as it now learns to."""
    content = None
    if init is not None:
        there = init if is_published(init) else os.path.join(init, "tokenizer")
        content = read_small(there, GENERATION_FILE, GENERATION_BYTES)
    if config.data.has_conversations and tokenizer.chat_template is not None:
        end = turn_end(ChatTemplate(tokenizer))
        if end != tokenizer.eos_id:
            content = also_ending(content, end)

    def save(folder: str | os.PathLike) -> None:
        tokenizer.save(folder)
        if content is not None:
            write_durably(Path(folder, GENERATION_FILE), content)

    return save


def read_init(
    folder: str,
    mark: str | None,
    config: Config,
    model: ModelConfig,
    spread: Spread,
    processes: Processes,
) -> tuple[dict[str, Any], str]:
    """The weights that a run begins with, and which they are.

    Args:
        folder: of a run, or a published one.
        mark: which they were: the step of a run, or the fingerprint of a published folder. None
            takes the newest, or the folder as it is.
        config: of the first stage.
        model: of the whole run, which a published folder must describe.
        spread: where they go.
        processes: of the run.
    """
    if is_published(folder):
        with Published(folder) as published:
            there, here = published.model, model
            if not computes_alike(there, here):
                difference = first_difference(to_json(there), to_json(here), "model")
                raise InputError(f"{folder} is of another model; {difference}")
            here_mark = f"sha256-{fingerprint(published.identity())[:16]}"
            if mark is not None and mark != here_mark:
                raise InputError(f"{folder} has changed since the run began with it")
            loaded = load(published.folder, config, rules=spread.rules, mesh=spread.mesh)
        return {"params": loaded.params, "bias": loaded.bias}, here_mark
    if mark is not None and not mark.isdecimal():
        raise InputError(f"{folder}, the published folder that the run began with, is gone")
    step = None if mark is None else int(mark)
    if step is None and processes.count > 1:  # that run may go on: all take the same step
        small = {"step": abstract_state(config, spread.rules).step}
        step = processes.first("init", lambda: read_params(folder, small)[1])
    like = abstract_state(config, spread.rules, spread.mesh)
    weights, step = read_params(folder, {"params": like.params, "bias": like.bias}, step)
    return weights, str(step)


def first_state(
    run: Run,
    config: Config,
    weights: dict[str, Any] | None,
    spread: Spread,
    processes: Processes,
) -> TrainState:
    """The state before the first step.

    Args:
        run: whose it is.
        config: of its first stage.
        weights: `read_init`'s; None reads them again, for a run that was ended before its first
            checkpoint.
        spread: where they go.
        processes: of the run.
    """
    if run.init is None:
        return create(config, jax.random.key(run.seed), spread.rules, spread.mesh)
    if weights is None:
        folder, _, mark = run.init.rpartition("@")
        weights, _ = read_init(folder, mark, config, run.config.model, spread, processes)
    _, optimizer = blueprint(config, spread.rules)
    with spread.mesh_set():
        opt = jax.jit(optimizer.init)(weights["params"])
    return fresh_state(config, weights["params"], weights["bias"], opt, spread.mesh)
