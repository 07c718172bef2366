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
from jax.sharding import PartitionSpec
from tqdm import tqdm

from dsjax.checkpoint import Checkpoints, Restored
from dsjax.config import Config
from dsjax.data.corpus import Corpus, open_corpus
from dsjax.errors import InputError, RunError
from dsjax.interop.tokenizer import Tokenizer
from dsjax.meshes import check_training, spread_of
from dsjax.model.transformer import merge
from dsjax.overrides import to_json
from dsjax.train.begin import first_state, first_tokenizer, read_init, recorded_init, saving
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
)
from dsjax.train.step import make_train_step
from dsjax.train.stop import StopRequest
from dsjax.workdir import (
    Run,
    WorkdirLock,
    check_workdir,
    prepare_workdir,
)
from sharding import distributed, island
from sharding.distributed import Processes
from sharding.spread import Spread


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """How a run went.

    Attributes:
        step: steps taken in all, skipped ones included.
        before: held-out `eval_loss` and `bits_per_byte` of the untrained model; None if the run was
            stopped before it was known.
        after: the same at the end, over the whole held-out split; None if the run was stopped.
        tokens_per_s: positions a second in this process, compilation left out; None if no step ran.
        stopped_by: the name of the signal that stopped the run before its end, or None.
        shares: of this process's wall time, by what it went into.
    """

    step: int
    before: dict[str, float] | None
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
    processes: Processes | None = None,
) -> PretrainResult:
    """Trains, or goes on training, the run of a folder.

    SIGTERM or Ctrl-C lets the step end, saves and returns; with several processes, in any of them.

    Args:
        config: what to train, and on what.
        workdir: written only once configuration, folder and text are known to be good.
        seed: decides the parameters and the order of the text.
        init: folder of a run, whose newest weights and tokenizer this one begins with, or of a
            published model.
        age_s: what the process spent before this call, which goodput counts.
        stop_at_step: stops, with a checkpoint, at this step of the schedule; for tests.
        processes: of the run, all of which call this alike (`sharding.distributed.start`); the
            folder is one that they share. None for this process alone.

    Returns:
        How it went.

    Raises:
        InputError: for a folder that cannot be used or holds another run, for unusable text, for a
            mesh that the run does not fit, and for processes that disagree on what they run.
        RunError: if too many steps in a row are not finite, a checkpoint cannot be written, or text
            is lost on the way; the last checkpoint stays.
    """
    entered = time.monotonic()
    processes = processes or Processes(refusal=InputError, loss=RunError)
    _agree(processes, config, seed, init)
    try:
        spread = dataclasses.replace(spread_of(config.mesh), processes=processes)
        check_training(config)
    except InputError as error:
        raise processes.everywhere(error) from None
    plan = stages(config)

    def look() -> tuple[str | None, bool]:
        began = recorded_init(workdir, init)
        return began, check_workdir(workdir, Run(config=config, seed=seed, init=began))

    began, known = processes.first("look", look)
    run = Run(config=config, seed=seed, init=began)
    corpus, weights = None, None
    if known:
        tokenizer = Tokenizer.load(os.path.join(workdir, "tokenizer"))
    else:  # before anything is written: is what the run begins with good?
        if run.init is not None:
            weights, mark = read_init(
                run.init, None, plan[0].config, config.model, spread, processes
            )
            run = dataclasses.replace(run, init=f"{run.init}@{mark}")
        tokenizer = first_tokenizer(config, init)
        corpus = _open(plan, 0, tokenizer, seed, spread)
    with contextlib.ExitStack() as stack:
        processes.first("lock", lambda: _nothing(stack.enter_context(WorkdirLock(workdir))))
        stop = stack.enter_context(StopRequest(processes))
        if not known:
            save = saving(config, tokenizer, init)
            processes.first("prepare", lambda: prepare_workdir(workdir, run, save))
        checkpoints = Checkpoints(
            workdir, keep=config.train.keep_checkpoints, tell=_tell, processes=processes
        )
        stack.callback(checkpoints.close)
        like = abstract_state(config, spread.rules, spread.mesh)
        restored = checkpoints.restore_newest(_as_dict(like))
        number = _stage_number(plan, restored.step if restored else 0)
        if corpus is None:
            corpus = _open(plan, number, tokenizer, seed, spread)
        stack.callback(corpus.train.close)
        if restored is not None:
            corpus.train.set_state(restored.data)
            state = TrainState(**restored.state)
        else:
            state = first_state(run, plan[0].config, weights, spread, processes)
        if known:  # only now is it certain that the run can go on
            processes.first("renew", lambda: prepare_workdir(workdir, run, tokenizer.save))
        spent_s = time.monotonic() - entered + age_s
        trainer = _Trainer(
            run,
            plan,
            workdir,
            tokenizer,
            checkpoints,
            stop,
            processes,
            spread,
            state,
            restored,
            spent_s,
        )
        stack.callback(trainer.close)
        return trainer.go(corpus, number, stop_at_step)


def _agree(processes: Processes, config: Config, seed: int, init: str | os.PathLike | None) -> None:
    """Refuses processes that would not run the same."""
    if processes.count > 1:
        packages = ("dsjax", "sharding", "pallas_kernels")
        what = {
            "code": distributed.fingerprint(*packages),
            "devices": jax.local_device_count(),
            "seed": seed,
            "init": None if init is None else os.fspath(init),
            "config": to_json(config),
        }
        processes.agree("run", what)


def _place(config: Config, spread: Spread) -> str:
    """One line on where a run goes on."""
    axes = " x ".join(f"{name}={size}" for name, size in config.mesh.axes.items() if size > 1)
    train = config.train
    rows = train.micro_batch_size or train.batch_size
    share = rows // spread.row_devices()
    return (
        f"mesh {axes or 'of one device'} ({config.mesh.rules}): {config.mesh.num_devices} of "
        f"{jax.device_count()} devices, {share} rows of a micro-batch on each"
    )


def _nothing(_: object) -> None:
    """What a function returns that only does something."""


def _stage_number(plan: tuple[Stage, ...], step: int) -> int:
    """The stage that made the state after so many steps; its end may be all that is left of it."""
    return next(i for i, stage in enumerate(plan) if step <= stage.last_step)


class _Trainer:
    """A run in progress: its state, where it is, and what it tells."""

    def __init__(
        self,
        run: Run,
        plan: tuple[Stage, ...],
        workdir: str | os.PathLike,
        tokenizer: Tokenizer,
        checkpoints: Checkpoints,
        stop: StopRequest,
        processes: Processes,
        spread: Spread,
        state: TrainState,
        restored: Restored | None,
        spent_s: float,
    ):
        """Takes up where the state is.

        Args:
            run: what is trained.
            plan: its stages.
            workdir: its folder, which is written from here on.
            tokenizer: its tokenizer.
            checkpoints: of its folder.
            stop: asks it to stop.
            processes: the first of which alone writes and shows how it goes.
            spread: its devices.
            state: what to go on from.
            restored: where that came from; None for a first state.
            spent_s: what this process has spent already.
        """
        self.run, self.plan, self.workdir, self.tokenizer = run, plan, workdir, tokenizer
        self.checkpoints, self.stop, self.spread = checkpoints, stop, spread
        self.processes, self.is_first = processes, processes.index == 0
        self.state, self.step, self.tokens = state, 0, 0
        self.before: dict[str, float] | None = None
        if restored is not None:
            self.step, self.tokens = restored.step, restored.meta["tokens"]
            self.before = restored.meta["before"]
        self.writer = MetricsWriter(workdir, after_step=self.step) if self.is_first else None
        before = (
            (self.writer.wall_s_before, self.writer.productive_s_before) if self.writer else (0, 0)
        )
        self.clock = Clock(float(before[0]), float(before[1]), age_s=spent_s)
        self.profiler = Profiler(workdir, run.config.train.profile_steps)
        device = jax.devices()[0]
        self.peak = peak_flops_per_s(device, run.config.precision.compute_dtype)
        if device.platform != "cpu":  # virtual ones share the cores
            self.peak *= run.config.mesh.num_devices
        self.bar = tqdm(
            total=plan[-1].last_step,
            initial=self.step,
            desc="sft" if run.config.data.has_conversations else "pretrain",
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not self.is_first,
        )
        if self.is_first and spread.mesh is not None:
            _tell(_place(run.config, spread))

    def close(self) -> None:
        """Ends what it tells."""
        self.bar.close()
        self.profiler.close()
        if self.writer is not None:
            self.writer.close()

    def go(self, corpus: Corpus, number: int, stop_at_step: int | None) -> PretrainResult:
        """Takes every step that is left, from stage `number` on, up to `stop_at_step`."""
        end = self.plan[-1].last_step
        last_step = end if stop_at_step is None else min(stop_at_step, end)
        if self.is_first:
            plot_schedule(self.workdir, schedule_rows(self.run.config))
        while True:
            with contextlib.closing(corpus.train):
                stage = self.plan[number]
                after = self._run_stage(stage, corpus, min(last_step, stage.last_step))
            if self.stop.agreed() is not None or self.step >= last_step:
                break
            number += 1
            corpus = _open(self.plan, number, self.tokenizer, self.run.seed, self.spread)
        with self.clock.saving():
            self.checkpoints.wait()
        self.bar.close()
        if self.is_first:
            plot_loss(self.workdir)
            plot_router(self.workdir)
        return PretrainResult(
            step=self.step,
            before=self.before,
            after=after,
            tokens_per_s=self.clock.tokens_per_s(),
            stopped_by=None if after is not None else self.stop.agreed(),
            shares=self.clock.shares(),
        )

    def _run_stage(self, stage: Stage, corpus: Corpus, last_step: int) -> dict[str, float] | None:
        """Trains a stage and evaluates its end; None if a signal came before that was done."""
        evaluate = _Evaluate(stage.config, corpus, self.stop, self.spread)
        if self.before is None and self.step == 0:
            with self.clock.pause():
                self.before = evaluate(self.state, None)
            if self.before is not None and not self._has_told():
                self._tell_evaluation(self.before)
        if self.stop.agreed() is None:
            self._train(stage, corpus, evaluate, last_step)
        told = self._has_told()
        if told and self.step < self.plan[-1].last_step:
            return None  # the end of a stage that another process has evaluated
        with self.clock.pause():
            after = evaluate(self.state, None)
        if after is not None and not told:
            self._tell_evaluation(after)
        return after

    def _has_told(self) -> bool:
        """Whether an earlier process has evaluated this step."""
        return self.processes.first("evaluated", self._find_evaluation)

    def _find_evaluation(self) -> bool:
        return self.writer is not None and self.writer.has(self.step, "eval_loss")

    def _tell_evaluation(self, figures: dict[str, float]) -> None:
        row = {"step": self.step, "tokens": self.tokens, **figures}
        self._write(row | self.clock.totals())

    def _write(self, row: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.write(row)

    def _train(self, stage: Stage, corpus: Corpus, evaluate: "_Evaluate", last_step: int) -> None:
        """Takes the steps of a stage, until a signal comes."""
        config, train = stage.config, stage.config.train
        graphdef, optimizer = blueprint(config, self.spread.rules)
        train_step = make_train_step(
            graphdef,
            PretrainLoss.of(config),
            optimizer,
            bias_speed=train.bias_speed,
            ema_decay=train.ema_decay,
            spread=self.spread,
        )
        micro_batch_size = train.micro_batch_size or train.batch_size
        flops = sum(train_flops_per_token(config).values())
        self.clock.begin_stage()
        while self.step < last_step and self.stop.agreed() is None:
            batch_size = stage.batches[self.step - stage.first_step]
            with self.clock.waiting():
                batch = _draw(corpus, batch_size // micro_batch_size)
            progress = stage.progress(self.step)
            with self.clock.profiling():
                self.profiler.before(self.step + 1)
            self.state, metrics = train_step(
                self.state, batch, progress=progress, micro_batch_size=micro_batch_size
            )
            row = jax.device_get(metrics)
            with self.clock.profiling():
                self.profiler.after(self.step + 1)
            self.step += 1
            self.tokens += batch_size * train.seq_len
            finite = math.isfinite(row["loss_total"]) and math.isfinite(row["grad_norm"])
            finite = finite and row["dispatch_overflow"] == 0
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
                    row |= evaluate(self.state, train.eval_batches) or {}
            self._write(row)
            self._show(row)
            if not finite:
                self._check_skipped(row)
            self._save_if_due(corpus)
        if self.step > stage.first_step:  # the end, or a signal that came at any moment
            self._save(corpus)

    def _show(self, row: dict[str, Any]) -> None:
        text = f"loss {row['loss']:.3f}, {row.get('tokens_per_s', 0):,.0f} tok/s"
        if row["skipped_steps"]:
            text += f", {row['skipped_steps']} skipped"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def _check_skipped(self, row: dict[str, Any]) -> None:
        in_a_row = int(self.state.extra["skipped_in_a_row"])
        most = self.run.config.train.max_skipped_steps
        wrong = "not finite"
        told = f"loss {row['loss_total']}, gradient norm {row['grad_norm']}"
        if row["dispatch_overflow"]:
            wrong, told = (
                "not whole",
                (
                    f"{row['dispatch_overflow']} tokens found no room with mesh.buffer_factor "
                    f"{self.run.config.mesh.buffer_factor}"
                ),
            )
        if self.is_first:
            _tell(f"step {self.step} is {wrong} ({told}): skipped")
        if in_a_row > most:
            raise self.processes.everywhere(
                RunError(
                    f"{in_a_row} steps in a row are {wrong}, the last one {self.step} ({told}); "
                    f"train.max_skipped_steps is {most}"
                )
            )

    def _save_if_due(self, corpus: Corpus) -> None:
        """Saves at the interval, and again after a save that failed."""
        error = self.checkpoints.poll()
        if error is not None:
            _tell(f"{error}; it is tried again")
        if error is not None or self.step % self.run.config.train.save_every_steps == 0:
            self._save(corpus)

    def _save(self, corpus: Corpus) -> None:
        """Starts saving the state; one that is saved already is left as it is."""
        with self.clock.saving():
            self.checkpoints.save(
                self.step,
                _as_dict(self.state),
                data=corpus.train.get_state(),
                meta={"tokens": self.tokens, "before": self.before},
            )


def _open(
    plan: tuple[Stage, ...], number: int, tokenizer: Tokenizer, seed: int, spread: Spread
) -> Corpus:
    train = plan[number].config.train
    micro_batch_size = train.micro_batch_size or train.batch_size
    part, parts = spread.readers(micro_batch_size)
    return open_corpus(
        plan[number].config.data,
        tokenizer,
        seq_len=train.seq_len,
        micro_batch_size=micro_batch_size,
        eval_batch_size=micro_batch_size,
        seed=(seed + number * 0x85EBCA6B) % 2**32,  # far from the seeds that people choose
        process_index=part,
        process_count=parts,
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

    def __init__(self, config: Config, corpus: Corpus, stop: StopRequest, spread: Spread):
        graphdef, _ = blueprint(config, spread.rules)
        self._corpus, self._stop, self._spread = corpus, stop, spread
        self._total_weight = sum(float(batch["weights_BT"].sum()) for batch in corpus.held_out)

        @jax.jit
        def nats(params, bias, batch):
            def local(params, bias, batch):
                told = next_token_loss(merge(graphdef, params, bias), batch)
                return island.sum_tokens(told, spread.rules)

            return island.run(local, PartitionSpec(), params, bias, batch)

        self._nats = nats

    def __call__(self, state: TrainState, count: int | None) -> dict[str, float] | None:
        """Over `count` batches spread over the split, so that a part stands for it; None: all.

        Returns:
            The figures; None if a signal asks the run to stop, which a part does not heed: its
            figures belong to a step's row.
        """
        stoppable = count is None
        batches = self._corpus.held_out
        if count is not None and count < len(batches):
            batches = [batches[i * len(batches) // count] for i in range(count)]
        figures = self._figures(state.params, state.bias, batches, stoppable)
        if figures is not None and "ema" in state.extra:
            average = self._figures(state.extra["ema"], state.bias, batches, stoppable)
            if average is None:
                return None
            figures |= {f"{name}_ema": value for name, value in average.items()}
        return figures

    def _figures(
        self, params: Any, bias: Any, batches: list[dict[str, np.ndarray]], stoppable: bool
    ) -> dict[str, float] | None:
        total, weight, overflow = 0.0, 0.0, 0
        for batch in batches:
            if stoppable and self._stop.agreed() is not None:
                return None
            rows = len(batch["weights_BT"])
            with self._spread.mesh_set():
                placed = self._spread(batch, rows, whole=True)
                nats, lost = self._nats(params, bias, placed)
                total, overflow = total + float(nats), overflow + int(lost)
            weight += float(batch["weights_BT"].sum())
        loss = total / max(weight, 1.0)
        bits = loss * self._total_weight / math.log(2.0) / self._corpus.held_out_bytes
        figures = {"eval_loss": loss, "bits_per_byte": bits}
        if overflow:  # a figure that is not what it says must not look like one
            if jax.process_index() == 0:
                _tell(
                    f"{overflow} held-out tokens found no room with a bounded mesh.buffer_factor: "
                    "no held-out loss"
                )
            figures = dict.fromkeys(figures, math.nan) | {"eval_overflow": overflow}
        return figures


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _tell(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # above the bar, not through it
