"""A run of reinforcement learning, to be rerun until it is done: roll out, score, step.

Knows nothing about HTTP. A step is the same program as in pretraining, with another loss. A
checkpoint holds the rollout that is being learned from and the reference, so that a run goes on in
the middle of a rollout's mini-batches; one that is killed while it samples samples the same again.

N completions a rollout, C new tokens at most, B rows of T positions.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from tqdm import tqdm

from dsjax.checkpoint import Checkpoints, Restored
from dsjax.config import Config, RlConfig
from dsjax.data.packing import document_order
from dsjax.errors import InputError, RunError
from dsjax.infer.batcher import Batcher
from dsjax.infer.generate import prepare
from dsjax.infer.slots import Drawing, SlotSizes
from dsjax.interop.published import GENERATION_BYTES, GENERATION_FILE, ending_ids
from dsjax.interop.tensor_files import read_small
from dsjax.interop.tokenizer import Tokenizer
from dsjax.meshes import blueprint_rules, check_training, move, spread_of
from dsjax.model.transformer import build, merge, split
from dsjax.rl.evaluation import Evaluation, measured_by
from dsjax.rl.grpo import GrpoLoss, score, token_weights
from dsjax.rl.pictures import plot_reinforcement, write_samples
from dsjax.rl.rollout import Roller, Rollout
from dsjax.rl.rows import Sequences, pack, place, unpack
from dsjax.rl.saved import Scored, abstract
from dsjax.rl.tasks import Problems, check_for, open_problems
from dsjax.train.begin import first_state, first_tokenizer, read_init, recorded_init, saving
from dsjax.train.clock import Clock
from dsjax.train.flops import memory_bytes
from dsjax.train.metrics import MetricsWriter, read_metrics
from dsjax.train.schedule import value_at
from dsjax.train.state import TrainState, blueprint
from dsjax.train.step import make_train_step
from dsjax.train.stop import StopRequest
from dsjax.train.vocabulary import Draw
from dsjax.verify import sandbox
from dsjax.verify.rewards import Reward, Scorer
from dsjax.workdir import Run, WorkdirLock, check_workdir, prepare_workdir
from sharding import island
from sharding.distributed import Processes
from sharding.island import CONTEXT, row_order
from sharding.rules import PRESETS
from sharding.spread import Spread

CONSTANT_ROLLOUTS = 20  # after so many alike, a reward is said to be constant


@dataclasses.dataclass(frozen=True)
class GrpoResult:
    """How a run went.

    Attributes:
        step: optimizer steps taken in all.
        before: held-out figures of the first weights (`rl.evaluation`); None if never known.
        after: the same at the end; None if the run was stopped.
        shares: of the time of this process's steps, by phase: rollout, reward, score, update.
        stopped_by: the signal that stopped the run before its end, or None.
    """

    step: int
    before: dict[str, float] | None
    after: dict[str, float] | None
    shares: dict[str, float]
    stopped_by: str | None


def train_grpo(
    config: Config,
    workdir: str | os.PathLike,
    *,
    init: str | os.PathLike,
    seed: int = 0,
    rewards: Mapping[str, Reward] | None = None,
    allow_unsafe_code: bool = False,
    stop_at_step: int | None = None,
    age_s: float = 0.0,
) -> GrpoResult:
    """Trains, or goes on training, the run of a folder.

    SIGTERM or Ctrl-C lets the step end, saves and returns.

    Args:
        config: with `rl`; its model is that of `init`.
        workdir: written only once configuration, folder and task are known to be good.
        init: folder of a run, whose newest weights and tokenizer this one begins with, or of a
            published model.
        seed: decides problems, their order, and what is sampled.
        rewards: functions by the names that `rl.rewards` gives them.
        allow_unsafe_code: runs programs that a model wrote where no sandbox works.
        stop_at_step: stops, with a checkpoint, at this step; for tests.
        age_s: what the process spent before this call.

    Returns:
        How it went.

    Raises:
        InputError: for a folder that cannot be used or holds another run, an unusable task or
            reward, or a mesh that the run does not fit.
        RunError: if too many steps in a row are not finite, sampler and trainer differ by more than
            `rl.max_logprob_gap`, or a checkpoint cannot be written; the last checkpoint stays.
    """
    if config.rl is None:
        raise InputError("the configuration has no rl section")
    if jax.process_count() > 1:
        raise InputError("reinforcement learning over several processes is not here yet")
    if config.precision.recipe == "fp8_per_tensor":
        raise InputError("precision.recipe fp8_per_tensor, a control, is for pretraining alone")
    rl, entered = config.rl, time.monotonic()
    spread = spread_of(config.mesh)
    check_training(_with_rows(config, rl))
    named = {reward.name: (rewards or {}).get(reward.name, reward.name) for reward in rl.rewards}
    began = recorded_init(workdir, init)
    run = Run(config=config, seed=seed, init=began)
    known = check_workdir(workdir, run)
    weights = None
    if not known:
        assert began is not None  # init was given
        weights, mark = read_init(began, None, config, config.model, spread, Processes())
        run = dataclasses.replace(run, init=f"{began}@{mark}")
        tokenizer = first_tokenizer(config, init)
    else:
        tokenizer = Tokenizer.load(os.path.join(workdir, "tokenizer"))
    problems = open_problems(rl, tokenizer, seed, check=check_for(named))
    if not allow_unsafe_code:
        _check_sandbox(problems, named)
    with contextlib.ExitStack() as stack:
        scored = functools.partial(
            Scorer,
            workers=rl.reward_workers,
            timeout_s=rl.reward_timeout_s,
            allow_unsafe_code=allow_unsafe_code,
        )
        scorer = stack.enter_context(scored(named))
        measure = stack.enter_context(scored(measured_by(rl, problems.held_out)))
        stack.enter_context(WorkdirLock(workdir))
        stop = stack.enter_context(StopRequest())
        prepare_workdir(workdir, run, saving(config, tokenizer, init))
        checkpoints = Checkpoints(workdir, keep=config.train.keep_checkpoints, tell=_tell)
        stack.callback(checkpoints.close)
        like = abstract(config, rl, spread)
        restored = checkpoints.restore_newest(like)
        if restored is None:
            state = first_state(run, config, weights, spread, Processes())
        else:
            state = TrainState(
                **{f.name: restored.state[f.name] for f in dataclasses.fields(TrainState)}
            )
        trainer = _Trainer(
            run,
            workdir,
            tokenizer,
            problems,
            scorer,
            Evaluation(rl, problems, measure, tokenizer),
            checkpoints,
            stop,
            spread,
            state,
            restored,
            time.monotonic() - entered + age_s,
        )
        stack.callback(trainer.close)
        return trainer.go(stop_at_step)


def _with_rows(config: Config, rl: RlConfig) -> Config:
    """The configuration with the rows that are trained on, which a mesh is checked for."""
    rows = rl.micro_batch_rows
    length = rl.row_tokens or rl.longest
    train = dataclasses.replace(
        *(config.train,),
        seq_len=length,
        batch_size=rows,
        micro_batch_size=rows,
        batch_ramp=None,
        context_stages=(),
    )
    return dataclasses.replace(config, train=train)


def _check_sandbox(problems: Problems, named: Mapping[str, str | Reward]) -> None:
    """Refuses, before anything is written, programs to judge where nothing can hold them."""
    asked = itertools.chain(problems.train, (problem.record for problem in problems.held_out))
    programs = any(record.get("verify") == "code" for record in asked)
    if programs and "accuracy" in named.values() and (why := sandbox.unavailable()):
        raise InputError(f"there are programs to judge, and no sandbox works: {why}")


# ---- the run ------------------------------------------------------------------------------------


class _Trainer:
    """A run in progress."""

    def __init__(
        self,
        run: Run,
        workdir: str | os.PathLike,
        tokenizer: Tokenizer,
        problems: Problems,
        scorer: Scorer,
        evaluation: Evaluation,
        checkpoints: Checkpoints,
        stop: StopRequest,
        spread: Spread,
        state: TrainState,
        restored: Restored | None,
        spent_s: float,
    ):
        rl = run.config.rl
        assert rl is not None  # the caller has looked
        config = _with_rows(run.config, rl)
        self.run, self.config, self.rl, self.workdir = run, config, rl, workdir
        self.problems, self.checkpoints, self.stop, self.spread = (
            problems,
            checkpoints,
            stop,
            spread,
        )
        self.evaluation = evaluation
        self.state, self.step, self.tokens = state, 0, 0
        self.position, self.before = 0, None
        self.rollout: Scored | None = None
        self.reference: dict[str, Any] | None = None
        if restored is not None:
            self.step, self.tokens = restored.step, restored.meta["tokens"]
            self.position, self.before = restored.data["position"], restored.meta["before"]
            self.rollout = Scored.of_arrays(restored.state["rollout"])
            self.reference = restored.state.get("reference")
        elif rl.kl_weight > 0:
            self.reference = self._copied()
        self.writer = MetricsWriter(workdir, after_step=self.step)
        self.clock = Clock(
            float(self.writer.wall_s_before), float(self.writer.productive_s_before), age_s=spent_s
        )
        self.graphdef, optimizer = blueprint(config, spread.rules)
        allowed = tokenizer.vocab_size
        self.loss = GrpoLoss.of(rl, allowed=allowed)
        self.train_step = make_train_step(
            *(self.graphdef, self.loss, optimizer),
            bias_speed=config.train.bias_speed,
            ema_decay=config.train.ema_decay,
            spread=spread,
        )
        # Rows are whole where tokens are drawn, and so are experts' buffers.
        self.sampling_rules = PRESETS["single" if spread.mesh is None else "decode"]
        by_row = jax.eval_shape(build(config, self.sampling_rules), jax.random.key(0))
        parts = Spread(spread.mesh, self.sampling_rules).row_devices()
        slots = -(-(rl.slots or rl.completions) // parts)
        self.batcher = Batcher(
            split(by_row)[0],
            *self._moved(),
            sizes=SlotSizes(
                slots=slots,
                max_prompt=rl.max_prompt_tokens,
                max_tokens=rl.max_completion_tokens,
                keep_routing=rl.replay_routing,
            ),
            drawing=Drawing(allowed=allowed, stop_ids=_stop_ids(tokenizer, config, workdir)),
            seed=run.seed,
            spread=spread,
            infer=config.infer,
        )
        self.roller = Roller(rl, self.batcher, problems, scorer, tokenizer)
        self.spent_s = dict.fromkeys(("rollout", "reward", "score", "update"), 0.0)
        self._alike: dict[str, tuple[float, int]] = {}
        self.bar = tqdm(
            total=rl.steps,
            initial=self.step,
            desc="grpo",
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def close(self) -> None:
        """Ends what it tells."""
        self.bar.close()
        self.writer.close()

    def go(self, stop_at_step: int | None) -> GrpoResult:
        """Takes every step that is left, up to `stop_at_step`."""
        last = self.rl.steps if stop_at_step is None else min(stop_at_step, self.rl.steps)
        if self.before is None and self.step == 0:
            with self.clock.pause():
                self.before = self._evaluate(sampled=True)
            if not self.writer.has(0, "eval/format"):  # by a process that was killed early
                self._tell_evaluation(self.before)
        self.clock.begin_stage()
        while self.step < last and self.stop.agreed() is None:
            self._take_step(last)
        if self.rollout is not None and self.step > 0:
            self._save()
        after = None
        if self.stop.agreed() is None and self.step == self.rl.steps:
            after = self._told_before() if self.writer.has(self.step, "eval/format") else None
            if after is None:
                with self.clock.pause():
                    after = self._evaluate(sampled=True)
                self._tell_evaluation(after)
        with self.clock.saving():
            self.checkpoints.wait()
        self.bar.close()
        plot_reinforcement(self.workdir)
        total = sum(self.spent_s.values())
        return GrpoResult(
            step=self.step,
            before=self.before,
            after=after,
            shares={name: s / total for name, s in self.spent_s.items()} if total else {},
            stopped_by=self.stop.agreed(),
        )

    def _take_step(self, last: int) -> None:
        rl, part = self.rl, self.step % self.rl.mini_batches
        row: dict[str, Any] = {}
        if part == 0:
            row = self._roll()
        assert self.rollout is not None  # it was made, or restored
        began = time.monotonic()
        batch = self._mini_batch(self.rollout, part)
        progress = self.step / rl.steps
        self.state, metrics = self.train_step(
            *(self.state, batch), progress=progress, micro_batch_size=rl.micro_batch_rows
        )
        told = jax.device_get(metrics)
        update_s = time.monotonic() - began
        self.spent_s["update"] += update_s
        tokens = int((batch["segments_BT"] > 0).sum())
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        if (inverse := float(told.pop("ratio_inverse_max"))) > 0:
            told["ratio_min"] = 1.0 / inverse
        else:  # nothing was learned from
            for name in ("ratio_max", "ratio_mean"):
                told.pop(name)
        if part > 0 or rl.score_rollouts:  # by now the weights differ, too; or it is known of all
            told.pop("logprob_gap"), told.pop("logprob_gap_max")
        finite = np.isfinite(told["loss_total"]) and np.isfinite(told["grad_norm"])
        finite = bool(finite and told["dispatch_overflow"] == 0)
        timing = self.clock.step(tokens, skipped=not finite)
        timing.pop("tokens_per_s", None)
        optimizer = self.config.train.optimizer
        row |= told | timing
        row |= {
            "step": self.step,
            "tokens": self.tokens,
            "weight_version": self.step - 1 - part,
            "reference_age": self.step % rl.reference_every_steps,
            "update_s": update_s,
            "update_tokens_per_s": tokens / update_s,
            "learning_rate": optimizer.learning_rate
            * float(value_at(optimizer.schedule, progress)),
            "memory_bytes": memory_bytes(),
        }
        if self.step % self.config.train.router_every_steps:
            row = {k: v for k, v in row.items() if not k.startswith(("load/", "bias/"))}
        if self.reference is not None and self.step % rl.reference_every_steps == 0:
            self.reference = self._copied()
        if self.step % rl.eval_every_steps == 0 and self.step < rl.steps:
            with self.clock.pause():
                row |= self._named(self._evaluate(sampled=False))
        self.writer.write(row)
        self._show(row)
        self._check(row, finite)
        if self.step % self.config.train.save_every_steps == 0 and self.step < last:
            self._save()

    # ---- rolling out -----------------------------------------------------------------------------

    def _roll(self) -> dict[str, Any]:
        rl = self.rl
        done = tqdm(
            total=rl.completions,
            desc="  rollout",
            unit="completion",
            leave=False,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5,
        )
        with done:
            rollout = self.roller(
                self._moved(),
                version=self.step,
                position=self.position,
                on_finished=done.update,
                show=rl.show,
            )
        self.position = rollout.position
        began = time.monotonic()
        self.rollout, told = self._scored(rollout)
        score_s = time.monotonic() - began
        for name in ("rollout", "reward"):
            self.spent_s[name] += rollout.metrics[f"{name}_s"]
        self.spent_s["score"] += score_s
        for name, error in rollout.first_errors.items():
            _tell(f"reward {name} failed: {error}; such samples are left out")
        self._warn_of_constants(rollout)
        write_samples(self.workdir, self.step, rollout.shown)
        return rollout.metrics | told | {"score_s": score_s}

    def _scored(self, rollout: Rollout) -> tuple[Scored, dict[str, float]]:
        """Adds the trainer's and the reference's log probabilities, where they are wanted."""
        sample_NC, told = rollout.log_sample_NC, {}
        old_NC, ref_NC = sample_NC, np.zeros_like(sample_NC)
        if self.rl.score_rollouts:
            old_NC = self._log_probs(self.state.params, self.state.bias, rollout.sequences)
            there_NC = np.arange(sample_NC.shape[1]) < rollout.sequences.count_N[:, None]
            gaps = np.abs(old_NC - sample_NC)[there_NC]
            told = {"logprob_gap": float(gaps.mean()) if gaps.size else 0.0}
            told["logprob_gap_max"] = float(gaps.max(initial=0.0))
        if self.reference is not None:
            ref_NC = self._log_probs(
                self.reference["params"], self.reference["bias"], rollout.sequences
            )
        arrays = rollout.sequences, sample_NC, old_NC, ref_NC, rollout.advantage_N
        return Scored(*arrays), told

    def _log_probs(self, params: Any, bias: Any, sequences: Sequences) -> np.ndarray:
        """[N, C] log probabilities of new tokens."""
        rl, length = self.rl, self.config.train.seq_len
        places = place(sequences.inputs_N.tolist(), length)
        rows, micro = self._rows(places), rl.micro_batch_rows
        batch = pack(
            *(sequences, places),
            row_length=length,
            rows=rows,
            of_completions={},
            of_sequences={},
            pad_id=0,
        )
        del batch["mask_BT"]
        found = []
        with self.spread.mesh_set():
            for start in range(0, rows, micro):
                part = {name: value[start : start + micro] for name, value in batch.items()}
                part = self.spread(part, micro)
                found.append(self._fetch(_score(params, bias, part, self.graphdef, self.loss.draw)))
        return unpack(np.concatenate(found), sequences, places, rl.max_completion_tokens)

    def _fetch(self, value_BT: jax.Array) -> np.ndarray:
        """Numbers of rows in the order of their positions."""
        found = np.asarray(value_BT)
        if self.spread.mesh is not None and CONTEXT in self.spread.rules.of("seq"):
            order = row_order(found.shape[1], self.spread.mesh.shape[CONTEXT])
            found = found[:, np.argsort(order)]
        return found

    def _rows(self, places: Mapping[int, Any]) -> int:
        """Whole micro-batches that hold the places."""
        used = 1 + max((at.row for at in places.values()), default=0)
        return -(-used // self.rl.micro_batch_rows) * self.rl.micro_batch_rows

    def _mini_batch(self, rollout: Scored, part: int) -> dict[str, np.ndarray]:
        """The rows of one of a rollout's mini-batches, which are drawn at random."""
        rl, n = self.rl, self.rl.completions
        order = document_order(n, self.run.seed, 1 + (self.step - part))
        chosen = np.sort(order[part * n // rl.mini_batches : (part + 1) * n // rl.mini_batches])
        lengths = np.zeros(n, np.int64)
        lengths[chosen] = rollout.sequences.inputs_N[chosen]
        places = place(lengths.tolist(), self.config.train.seq_len)
        batch = pack(
            *(rollout.sequences, places),
            row_length=self.config.train.seq_len,
            rows=self._rows(places),
            of_completions={
                "log_sample": rollout.log_sample_NC,
                "log_old": rollout.log_old_NC,
                "log_ref": rollout.log_ref_NC,
            },
            of_sequences={"advantages": rollout.advantage_N},
            pad_id=0,
        )
        mask_BT = batch.pop("mask_BT")
        batch["weights_BT"] = token_weights(mask_BT, batch["segments_BT"], rl.aggregation)
        return batch

    def _moved(self) -> tuple[Any, Any]:
        """The weights as the sampler takes them."""
        model = self.state.params, self.state.bias
        if self.spread.mesh is not None:
            with self.spread.mesh_set():
                model = move(*model, self.config, self.sampling_rules, self.spread.mesh)
        precision = self.config.precision
        with self.spread.mesh_set():
            return prepare(*model, jnp.dtype(precision.compute_dtype), recipe=precision.recipe)

    def _copied(self) -> dict[str, Any]:
        """The policy as it is now; steps donate what they are given."""
        with self.spread.mesh_set():
            copied = jax.tree.map(jnp.copy, {"params": self.state.params, "bias": self.state.bias})
        return copied

    # ---- telling ---------------------------------------------------------------------------------

    def _evaluate(self, *, sampled: bool) -> dict[str, float]:
        return self.evaluation(self.batcher, self._moved(), sampled=sampled)

    def _told_before(self) -> dict[str, float] | None:
        """The last evaluation of a run that is done."""
        for row in reversed(read_metrics(self.workdir)):
            if row["step"] == self.step and "eval/format" in row:
                return {
                    name.removeprefix("eval/"): math.nan if value is None else value
                    for name, value in row.items()
                    if name.startswith("eval/")
                }
        return None

    def _named(self, figures: dict[str, float]) -> dict[str, float]:
        return {f"eval/{name}": value for name, value in figures.items()}

    def _tell_evaluation(self, figures: dict[str, float]) -> None:
        row = {"step": self.step, "tokens": self.tokens, **self._named(figures)}
        self.writer.write(row | self.clock.totals())

    def _show(self, row: dict[str, Any]) -> None:
        if "reward" in row:
            text = f"reward {row['reward']:.3f}, {row['completion_tokens']:.0f} tokens"
            self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def _warn_of_constants(self, rollout: Rollout) -> None:
        """Rewards that say the same of all completions teach nothing, and it is easy to miss."""
        for name, (low, high) in rollout.ranges.items():
            if low != high:
                self._alike.pop(name, None)
                continue
            value, count = self._alike.get(name, (low, 0))
            count = count + 1 if value == low else 1
            self._alike[name] = low, count
            if count % CONSTANT_ROLLOUTS == 0:
                _tell(
                    f"reward {name} was {low:g} for every completion of the last {count} rollouts: "
                    "it teaches nothing"
                )

    def _check(self, row: dict[str, Any], finite: bool) -> None:
        most = self.config.train.max_skipped_steps
        in_a_row = int(self.state.extra["skipped_in_a_row"])
        if not finite:
            _tell(
                f"step {self.step} is not finite (loss {row['loss_total']}, gradient norm "
                f"{row['grad_norm']}): skipped"
            )
        if in_a_row > most:
            raise RunError(
                f"{in_a_row} steps in a row are not finite, the last one {self.step}; "
                f"train.max_skipped_steps is {most}"
            )
        gap, limit = row.get("logprob_gap_max", 0.0), self.rl.max_logprob_gap
        if limit is not None and not gap <= limit:
            raise RunError(
                f"step {self.step}: a token's log probability differs by {gap:.3g} between sampler "
                f"and trainer; rl.max_logprob_gap is {limit:g}"
            )

    def _save(self) -> None:
        assert self.rollout is not None  # a step was taken
        state = {
            field.name: getattr(self.state, field.name) for field in dataclasses.fields(self.state)
        }
        if self.reference is not None:
            state["reference"] = self.reference
        places = abstract(self.config, self.rl, self.spread)["rollout"]
        state["rollout"] = {
            name: jax.device_put(value, places[name].sharding)
            for name, value in self.rollout.arrays().items()
        }
        with self.clock.saving():
            self.checkpoints.save(
                self.step,
                state,
                data={"position": self.position},
                meta={"tokens": self.tokens, "before": self.before},
            )


@functools.partial(jax.jit, static_argnames=("graphdef", "draw"))
def _score(params: Any, bias: Any, batch: Any, graphdef: Any, draw: Draw) -> jax.Array:
    rules = blueprint_rules(graphdef)
    by_row = PartitionSpec(*(rules.of(axis) or None for axis in ("batch", "seq")))

    def local(params, bias, batch):
        return score(merge(graphdef, params, bias), batch, draw)[0]

    return island.run(local, by_row, params, bias, batch)


def _stop_ids(tokenizer: Tokenizer, config: Config, workdir: str | os.PathLike) -> tuple[int, ...]:
    folder = os.path.join(workdir, "tokenizer")
    generation = read_small(folder, GENERATION_FILE, GENERATION_BYTES)
    return ending_ids(tokenizer.eos_id, generation, config.model.vocab_size)


def _tell(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # above the bar, not through it
