"""A pretraining run from configuration to checkpoint, to be rerun until it is done.

Knows nothing about generation. Rerunning with the same configuration and seed goes on from the
newest checkpoint that is whole; another configuration is refused.
"""

import contextlib
import dataclasses
import math
import os
import sys
import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dsjax.checkpoint import Checkpoints, Restored, read_params
from dsjax.config import Config
from dsjax.data.corpus import Corpus, find_tokenizer, open_corpus
from dsjax.errors import RunError
from dsjax.interop.tokenizer import Tokenizer
from dsjax.model.transformer import merge
from dsjax.train.clock import Clock, Profiler
from dsjax.train.flops import memory_bytes, peak_flops_per_s, train_flops_per_token
from dsjax.train.loss import PretrainLoss, next_token_loss
from dsjax.train.metrics import MetricsWriter
from dsjax.train.pictures import plot_loss, plot_router, plot_schedule
from dsjax.train.recipe import schedule_rows
from dsjax.train.schedule import value_at
from dsjax.train.stages import Stage, stages
from dsjax.train.state import (
    TrainState,
    abstract_state,
    blueprint,
    create,
    fresh_state,
)
from dsjax.train.step import make_train_step
from dsjax.train.stop import StopRequest
from dsjax.workdir import Run, WorkdirLock, check_workdir, prepare_workdir
from sharding.rules import AxisRules


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """How a run went.

    Attributes:
        step: steps taken in all, skipped ones included.
        before: held-out `eval_loss` and `bits_per_byte` of the untrained model.
        after: the same at the end, over the whole held-out split; None if the run was stopped.
        tokens_per_s: positions a second in this process, compilation left out; None if no step ran.
        stopped_by: the name of the signal that stopped the run before its end, or None.
        shares: of this process's wall time, by what it went into.
    """

    step: int
    before: dict[str, float]
    after: dict[str, float] | None
    tokens_per_s: float | None
    stopped_by: str | None
    shares: dict[str, float]


def pretrain(
    config: Config,
    workdir: str | os.PathLike,
    *,
    seed: int = 0,
    init: str | os.PathLike | None = None,
    age_s: float = 0.0,
    stop_at_step: int | None = None,
) -> PretrainResult:
    """Trains, or goes on training, the run of a folder.

    SIGTERM or Ctrl-C lets the step end, saves and returns.

    Args:
        config: what to train, and on what.
        workdir: written only once configuration, folder and text are known to be good.
        seed: decides the parameters and the order of the text.
        init: folder of a run whose newest weights and tokenizer this one begins with.
        age_s: what the process spent before this call, which goodput counts.
        stop_at_step: stops, with a checkpoint, at this step of the schedule; for tests.

    Returns:
        How it went.

    Raises:
        InputError: for a folder that cannot be used or holds another run, and for unusable text.
        RunError: if too many steps in a row are not finite, a checkpoint cannot be written, or text
            is lost on the way; the last checkpoint stays.
    """
    entered = time.monotonic()
    run = Run(config=config, seed=seed, init=None if init is None else os.fspath(init))
    known = check_workdir(workdir, run)
    plan = stages(config)
    if known:
        tokenizer, corpus = Tokenizer.load(os.path.join(workdir, "tokenizer")), None
    else:
        tokenizer = _first_tokenizer(config, init)
        corpus = _open(plan[0], tokenizer, seed)  # before anything is written: is the text good?
    with contextlib.ExitStack() as stack:
        stack.enter_context(WorkdirLock(workdir))
        if not known:
            prepare_workdir(workdir, run, tokenizer.save)
        checkpoints = Checkpoints(workdir, keep=config.train.keep_checkpoints, tell=_tell)
        stack.callback(checkpoints.close)
        restored = checkpoints.restore_newest(_as_dict(abstract_state(config, AxisRules())))
        number = _stage_number(plan, restored.step if restored else 0)
        if corpus is None:
            corpus = _open(plan[number], tokenizer, seed + number)
        stack.callback(corpus.train.close)
        if restored is not None and restored.step > plan[number].first_step:
            corpus.train.set_state(restored.data)
        if known:  # only now is it certain that the run can go on
            prepare_workdir(workdir, run, tokenizer.save)
        trainer = _Trainer(run, plan, workdir, tokenizer, checkpoints, restored, entered - age_s)
        stack.callback(trainer.close)
        return trainer.go(corpus, number, stop_at_step)


def _stage_number(plan: tuple[Stage, ...], step: int) -> int:
    """The stage that the next step belongs to; the last one of a finished run."""
    return next((i for i, stage in enumerate(plan) if step < stage.last_step), len(plan) - 1)


class _Trainer:
    """A run in progress: its state, where it is, and what it tells."""

    def __init__(
        self,
        run: Run,
        plan: tuple[Stage, ...],
        workdir: str | os.PathLike,
        tokenizer: Tokenizer,
        checkpoints: Checkpoints,
        restored: Restored | None,
        started: float,
    ):
        self.run, self.plan, self.workdir, self.tokenizer = run, plan, workdir, tokenizer
        self.checkpoints = checkpoints
        self.step, self.tokens, self.before = 0, 0, None
        if restored is not None:
            self.state, self.step = TrainState(**restored.state), restored.step
            self.tokens, self.before = restored.meta["tokens"], restored.meta["before"]
        else:
            self.state = _first_state(run, plan[0].config)
        self.writer = MetricsWriter(workdir, after_step=self.step)
        self.clock = Clock(
            self.writer.wall_s_before,
            self.writer.productive_s_before,
            age_s=time.monotonic() - started,
        )
        self.profiler = Profiler(workdir, run.config.train.profile_steps)
        device = jax.devices()[0]
        self.peak = peak_flops_per_s(device, run.config.precision.compute_dtype)
        if device.platform != "cpu":  # virtual ones share the cores
            self.peak *= jax.device_count()
        self.bar = tqdm(
            total=plan[-1].last_step,
            initial=self.step,
            desc="pretrain",
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def close(self) -> None:
        """Ends what it tells."""
        self.bar.close()
        self.profiler.close()
        self.writer.close()

    def go(self, corpus: Corpus, number: int, stop_at_step: int | None) -> PretrainResult:
        """Takes every step that is left, from stage `number` on, up to `stop_at_step`."""
        end = self.plan[-1].last_step
        last_step = end if stop_at_step is None else min(stop_at_step, end)
        plot_schedule(self.workdir, schedule_rows(self.run.config))
        while True:
            stage = self.plan[number]
            evaluate = _Evaluate(stage.config, corpus)
            if self.before is None:
                self.before = evaluate(self.state, None)
            if self.step == 0 and not self.writer.has(0, "eval_loss"):
                self._tell_evaluation(self.before)
            stopped_by = self._train(stage, corpus, evaluate, min(last_step, stage.last_step))
            after = None
            if stopped_by is None:
                after = evaluate(self.state, None)
                if not self.writer.has(self.step, "eval_loss"):  # a finished run may run again
                    self._tell_evaluation(after)
            corpus.train.close()
            if stopped_by is not None or self.step >= last_step:
                break
            number += 1
            corpus = _open(self.plan[number], self.tokenizer, self.run.seed + number)
        self.checkpoints.wait()
        self.bar.close()
        plot_loss(self.workdir)
        plot_router(self.workdir)
        return PretrainResult(
            step=self.step,
            before=self.before,
            after=after,
            tokens_per_s=self.clock.tokens_per_s(),
            stopped_by=stopped_by,
            shares=self.clock.shares(),
        )

    def _tell_evaluation(self, figures: dict[str, float]) -> None:
        row = {"step": self.step, "tokens": self.tokens, **figures}
        self.writer.write(row | self.clock.totals())

    def _train(
        self, stage: Stage, corpus: Corpus, evaluate: "_Evaluate", last_step: int
    ) -> str | None:
        """Takes the steps of a stage; returns the name of the signal that ended it early."""
        config, train = stage.config, stage.config.train
        graphdef, optimizer = blueprint(config, AxisRules())
        train_step = make_train_step(
            graphdef,
            PretrainLoss.of(config),
            optimizer,
            bias_speed=train.bias_speed,
            ema_decay=train.ema_decay,
        )
        micro_batch_size = train.micro_batch_size or train.batch_size
        flops = sum(train_flops_per_token(config).values())
        self.clock.begin_stage()
        with StopRequest() as stop:
            while self.step < last_step and stop.signal_name is None:
                batch_size = stage.batches[self.step - stage.first_step]
                with self.clock.waiting():
                    batch = _draw(corpus, batch_size // micro_batch_size)
                progress = stage.progress(self.step)
                self.profiler.before(self.step + 1)
                self.state, metrics = train_step(
                    self.state, batch, progress=progress, micro_batch_size=micro_batch_size
                )
                row = jax.device_get(metrics)
                self.profiler.after(self.step + 1)
                self.step += 1
                self.tokens += batch_size * train.seq_len
                finite = math.isfinite(row["loss_total"]) and math.isfinite(row["grad_norm"])
                row |= self.clock.step(batch_size * train.seq_len, skipped=not finite)
                row |= {
                    "step": self.step,
                    "tokens": self.tokens,
                    "batch_size": batch_size,
                    "seq_len": train.seq_len,
                    "memory_bytes": memory_bytes(),
                    **_schedules(config, progress),
                }
                if "tokens_per_s" in row:
                    row["share_of_peak"] = row["tokens_per_s"] * flops / self.peak
                if self.step % train.router_every_steps and self.step != last_step:
                    row = {k: v for k, v in row.items() if not k.startswith(("load/", "bias/"))}
                if self.step % train.eval_every_steps == 0 and self.step < last_step:
                    with self.clock.pause():
                        row |= evaluate(self.state, train.eval_batches)
                self.writer.write(row)
                self._show(row)
                if not finite:
                    self._check_skipped(row)
                self._save_if_due(corpus, self.step == last_step or stop.signal_name is not None)
            return stop.signal_name if self.step < last_step else None

    def _show(self, row: dict[str, Any]) -> None:
        text = f"loss {row['loss']:.3f}, {row.get('tokens_per_s', 0):,.0f} tok/s"
        if row["skipped_steps"]:
            text += f", {row['skipped_steps']} skipped"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def _check_skipped(self, row: dict[str, Any]) -> None:
        in_a_row = int(self.state.extra["skipped_in_a_row"])
        most = self.run.config.train.max_skipped_steps
        told = f"loss {row['loss_total']}, gradient norm {row['grad_norm']}"
        _tell(f"step {self.step} is not finite ({told}): skipped")
        if in_a_row > most:
            raise RunError(
                f"{in_a_row} steps in a row are not finite, the last one {self.step} ({told}); "
                f"train.max_skipped_steps is {most}"
            )

    def _save_if_due(self, corpus: Corpus, at_the_end: bool) -> None:
        """Saves at the interval, at the end, and again after a save that failed."""
        error = self.checkpoints.poll()
        if error is not None:
            _tell(f"{error}; it is tried again")
        if at_the_end or error or self.step % self.run.config.train.save_every_steps == 0:
            with self.clock.saving():
                self.checkpoints.save(
                    self.step,
                    _as_dict(self.state),
                    data=corpus.train.get_state(),
                    meta={"tokens": self.tokens, "before": self.before},
                )


def _first_tokenizer(config: Config, init: str | os.PathLike | None) -> Tokenizer:
    if init is not None:
        return Tokenizer.load(os.path.join(init, "tokenizer"))
    return find_tokenizer(config.data, config.model.vocab_size)


def _open(stage: Stage, tokenizer: Tokenizer, seed: int) -> Corpus:
    train = stage.config.train
    micro_batch_size = train.micro_batch_size or train.batch_size
    return open_corpus(
        stage.config.data,
        tokenizer,
        seq_len=train.seq_len,
        micro_batch_size=micro_batch_size,
        eval_batch_size=micro_batch_size,
        seed=seed,
    )


def _first_state(run: Run, config: Config) -> TrainState:
    if run.init is None:
        return create(config, jax.random.key(run.seed), AxisRules())
    like = abstract_state(config, AxisRules())
    weights, _ = read_params(run.init, {"params": like.params, "bias": like.bias})
    _, optimizer = blueprint(config, AxisRules())
    return fresh_state(
        config, weights["params"], weights["bias"], jax.jit(optimizer.init)(weights["params"])
    )


def _draw(corpus: Corpus, count: int) -> dict[str, np.ndarray]:
    """A batch of so many micro-batches."""
    micro_batches = [next(corpus.train) for _ in range(count)]
    return {
        name: np.concatenate([batch[name] for batch in micro_batches]) for name in micro_batches[0]
    }


def _schedules(config: Config, progress: float) -> dict[str, float]:
    train = config.train
    rate = train.optimizer.learning_rate * float(value_at(train.optimizer.schedule, progress))
    return {
        "learning_rate": rate,
        "bias_speed": float(value_at(train.bias_speed, progress)),
        "mtp_loss_weight": float(value_at(train.mtp_loss_weight, progress)),
    }


class _Evaluate:
    """Held-out figures of a state: `eval_loss`, `bits_per_byte`, and those of its average."""

    def __init__(self, config: Config, corpus: Corpus):
        graphdef, _ = blueprint(config, AxisRules())
        self._corpus = corpus
        self._total_weight = sum(float(batch["weights_BT"].sum()) for batch in corpus.held_out)

        @jax.jit
        def nats(params, bias, batch):
            return next_token_loss(merge(graphdef, params, bias), batch)

        self._nats = nats

    def __call__(self, state: TrainState, count: int | None) -> dict[str, float]:
        """Over `count` batches spread over the split, so that a part stands for it; None: all."""
        batches = self._corpus.held_out
        if count is not None and count < len(batches):
            batches = [batches[i * len(batches) // count] for i in range(count)]
        figures = self._figures(state.params, state.bias, batches)
        if "ema" in state.extra:
            average = self._figures(state.extra["ema"], state.bias, batches)
            figures |= {f"{name}_ema": value for name, value in average.items()}
        return figures

    def _figures(self, params: Any, bias: Any, batches: list[dict]) -> dict[str, float]:
        total = sum(float(self._nats(params, bias, batch)) for batch in batches)
        weight = sum(float(batch["weights_BT"].sum()) for batch in batches)
        loss = total / max(weight, 1.0)
        bits = loss * self._total_weight / math.log(2.0) / self._corpus.held_out_bytes
        return {"eval_loss": loss, "bits_per_byte": bits}


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _tell(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # above the bar, not through it
