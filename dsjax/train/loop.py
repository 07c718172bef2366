"""A pretraining run from configuration to checkpoint, to be rerun until it is done.

Knows nothing about generation. Rerunning with the same configuration and seed goes on from the
newest checkpoint; another configuration is refused.
"""

import dataclasses
import math
import os
import sys
import time
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from dsjax.checkpoint import Checkpoints, Run, check_workdir, write_run
from dsjax.config import Config
from dsjax.data.batches import TrainBatches, eval_batches, make_train_batches
from dsjax.data.packing import PackedRows, tokenise
from dsjax.data.sources import read_documents, split_held_out
from dsjax.interop.tokenizer import Tokenizer
from dsjax.model.transformer import merge
from dsjax.train.loss import PretrainLoss, next_token_loss
from dsjax.train.metrics import MetricsWriter, plot_loss
from dsjax.train.schedule import value_at
from dsjax.train.state import TrainState, create
from dsjax.train.step import make_train_step
from sharding.rules import AxisRules


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """How a run went.

    Attributes:
        step: optimizer steps taken in all.
        before: held-out `eval_loss` and `bits_per_byte` of the untrained model.
        after: the same at the end, over the whole held-out split.
        tokens_per_s: positions a second in this process, compilation left out; None if no step ran.
    """

    step: int
    before: dict[str, float]
    after: dict[str, float]
    tokens_per_s: float | None


@dataclasses.dataclass(frozen=True)
class _Corpus:
    """A run's text, ready to read."""

    tokenizer: Tokenizer
    train: TrainBatches
    held_out: list[dict[str, np.ndarray]]
    held_out_bytes: int


def pretrain(
    config: Config,
    workdir: str | os.PathLike,
    *,
    seed: int = 0,
    stop_at_step: int | None = None,
) -> PretrainResult:
    """Trains, or goes on training, the run of a folder.

    Args:
        config: what to train, and on what.
        workdir: written only once configuration, folder and text are known to be good.
        seed: decides the parameters and the order of the text.
        stop_at_step: stops, with a checkpoint, at this step of the schedule; for tests.

    Returns:
        How it went.

    Raises:
        InputError: for a folder that cannot be used or holds another run, and for unusable text.
        FloatingPointError: if the loss is no longer finite; the last checkpoint stays.
    """
    run = Run(config=config, seed=seed)
    known = check_workdir(workdir, run)
    tokenizer_folder = os.path.join(workdir, "tokenizer")
    tokenizer = Tokenizer.load(tokenizer_folder) if known else None
    corpus = _read_corpus(config, seed, tokenizer)
    if not known:
        corpus.tokenizer.save(tokenizer_folder)
        write_run(workdir, run)  # last: its presence says that the folder is complete

    graphdef, state, optimizer = create(config, jax.random.key(seed), AxisRules())
    evaluate = _make_evaluate(graphdef, corpus)
    checkpoints = Checkpoints(workdir, keep=config.train.keep_checkpoints)
    step, tokens, before = 0, 0, None
    if (latest := checkpoints.latest_step()) is not None:
        saved, data_state, meta = checkpoints.restore(_as_dict(state), latest)
        state = TrainState(**saved)
        corpus.train.set_state(data_state)
        step, tokens, before = latest, meta["tokens"], meta["before"]
    writer = MetricsWriter(workdir, after_step=step)
    if before is None:
        before = evaluate(state, None)
        if not writer.has(0, "eval_loss"):
            writer.write({"step": 0, "tokens": 0, **before})

    train_step = make_train_step(
        graphdef, PretrainLoss.of(config), optimizer, bias_speed=config.train.bias_speed
    )
    train = config.train
    last_step = min(train.steps, stop_at_step if stop_at_step is not None else train.steps)
    clock = _Clock()
    bar = tqdm(
        total=train.steps,
        initial=step,
        desc="pretrain",
        unit="step",
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.5,
    )
    try:
        while step < last_step:
            progress = tokens / (train.steps * train.tokens_per_step)
            state, metrics = train_step(
                state,
                next(corpus.train),
                progress=progress,
                micro_batch_size=train.micro_batch_size or train.batch_size,
            )
            step, tokens = step + 1, tokens + train.tokens_per_step
            row = jax.device_get(metrics)
            if not math.isfinite(row["loss_total"]):
                raise FloatingPointError(f"loss is {row['loss_total']} at step {step}")
            rate = train.optimizer.learning_rate * float(
                value_at(train.optimizer.schedule, progress)
            )
            row |= {
                "step": step,
                "tokens": tokens,
                "learning_rate": rate,
                "bias_speed": float(value_at(train.bias_speed, progress)),
                **clock.step(train.tokens_per_step),
            }
            if step % train.eval_every_steps == 0 and step < last_step:
                with clock.pause():
                    row |= evaluate(state, train.eval_batches)
            writer.write(row)
            bar.set_postfix_str(
                f"loss {row['loss']:.3f}, {row.get('tokens_per_s', 0):,.0f} tok/s", refresh=False
            )
            bar.update()
            if step % train.save_every_steps == 0 or step == last_step:
                with clock.pause():
                    meta = {"tokens": tokens, "before": before}
                    checkpoints.save(
                        step, _as_dict(state), data=corpus.train.get_state(), meta=meta
                    )
        bar.close()
        after = evaluate(state, None)
        if not writer.has(step, "eval_loss"):  # a finished run may be run again
            writer.write({"step": step, "tokens": tokens, **after})
    finally:
        bar.close()
        writer.close()
        checkpoints.close()
    plot_loss(workdir)
    return PretrainResult(step=step, before=before, after=after, tokens_per_s=clock.tokens_per_s())


def _read_corpus(config: Config, seed: int, tokenizer: Tokenizer | None) -> _Corpus:
    train, held_out = split_held_out(read_documents(config.data), config.data.held_out_fraction)
    if tokenizer is None:
        tokenizer = Tokenizer.train([d.text for d in train], config.model.vocab_size)
    seq_len, batch_size = config.train.seq_len, config.train.batch_size
    rows = PackedRows(tokenise(train, tokenizer), seq_len, seed)
    held_out_stream = tokenise(held_out, tokenizer)
    return _Corpus(
        tokenizer=tokenizer,
        train=make_train_batches(rows, batch_size, seed, config.data.shuffle),
        held_out=eval_batches(PackedRows(held_out_stream, seq_len, None), batch_size),
        held_out_bytes=held_out_stream.num_bytes,
    )


def _make_evaluate(graphdef: nnx.GraphDef, corpus: _Corpus):
    """Returns evaluate(state, batches or None for all) -> eval_loss and bits_per_byte."""
    total_weight = sum(float(batch["weights_BT"].sum()) for batch in corpus.held_out)

    @jax.jit
    def nats(params, bias, batch):
        return next_token_loss(merge(graphdef, params, bias), batch)

    def evaluate(state: TrainState, count: int | None) -> dict[str, float]:
        batches = corpus.held_out
        if count is not None and count < len(batches):
            # Spread over the split, so that a part of it stands for the whole.
            batches = [batches[i * len(batches) // count] for i in range(count)]
        total = sum(float(nats(state.params, state.bias, batch)) for batch in batches)
        weight = sum(float(batch["weights_BT"].sum()) for batch in batches)
        loss = total / max(weight, 1.0)
        bits = loss * total_weight / math.log(2.0) / corpus.held_out_bytes
        return {"eval_loss": loss, "bits_per_byte": bits}

    return evaluate


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


class _Clock:
    """Wall time of the training steps; the first step of a process, which compiles, left out."""

    def __init__(self):
        self._start = self._last = time.perf_counter()
        self._counted_s = 0.0
        self._counted_tokens = 0
        self._steps = 0

    def step(self, tokens: int) -> dict[str, float]:
        """Ends a step; returns `elapsed_s`, and `tokens_per_s` from the second step on."""
        now = time.perf_counter()
        row = {"elapsed_s": now - self._start}
        if self._steps > 0:
            self._counted_s += now - self._last
            self._counted_tokens += tokens
            row["tokens_per_s"] = tokens / (now - self._last)
        self._steps += 1
        self._last = now
        return row

    def pause(self) -> "_Clock":
        """Leaves out what runs inside `with clock.pause()`."""
        return self

    def __enter__(self) -> None:
        self._paused_at = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._last += time.perf_counter() - self._paused_at

    def tokens_per_s(self) -> float | None:
        """The mean over the process; None before a second step."""
        return self._counted_tokens / self._counted_s if self._counted_s else None
