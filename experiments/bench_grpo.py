"""Benchmarks a GRPO step, from prompts to the optimizer, against TRL's with transformers.

python -m experiments.bench_grpo --workdir=runs/bench_grpo --out=bench_grpo.json

Both sides have the same weights, prompts of random ids, a reward that reads the text, and a loss
against nothing but the policy itself. The peer runs in an interpreter of its own (`make oracle`),
and both alternate in one run. JSON goes to stdout or to --out.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dsjax.config import Config, OptimizerConfig, RewardConfig, RlConfig, constant
from dsjax.errors import InputError
from dsjax.infer.batcher import Batcher
from dsjax.infer.slots import Drawing, SlotSizes
from dsjax.interop.tokenizer import Tokenizer
from dsjax.language_model import LanguageModel, init
from dsjax.rl.grpo import GrpoLoss, token_weights
from dsjax.rl.rollout import Roller
from dsjax.rl.rows import pack, place
from dsjax.rl.tasks import Problems
from dsjax.train.state import blueprint, fresh_state
from dsjax.train.step import make_train_step
from dsjax.verify.rewards import Scorer
from experiments import command
from experiments.peers import benchmark
from sharding.rules import AxisRules

PEER = Path(benchmark.__file__).with_name("trl_bench.py")
PROBLEMS = 512
COMPILED = "/jax/core/compile/backend_compile_duration"
WARM_STEPS = 2

FLAGS = command.define_flags(default_preset="v3_20m", default_workdir=None)
flags.DEFINE_integer("repeats", 7, "Steps a side.", flag_values=FLAGS)
flags.DEFINE_integer("prompts", 8, "Prompts a step.", flag_values=FLAGS)
flags.DEFINE_integer("group_size", 8, "Completions of each.", flag_values=FLAGS)
flags.DEFINE_integer("prompt_tokens", 32, "Tokens of a prompt.", flag_values=FLAGS)
flags.DEFINE_integer("new_tokens", 64, "Tokens of a completion.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "File for the JSON; stdout if left out.", flag_values=FLAGS)
flags.DEFINE_string(
    "oracle",
    ".venv-oracle/bin/python",
    "The peer's interpreter; empty for our side alone.",
    flag_values=FLAGS,
)
flags.DEFINE_string("variant", "{}", "JSON: changes to the peer's best.", flag_values=FLAGS)


class Numbers:
    """A tokenizer of which token i is written i."""

    def decode(self, ids: Iterable[int]) -> str:
        """Numbers with spaces between them."""
        return " ".join(map(str, ids))


class Step:
    """A step of ours, warm: calling it takes one, and tells what its parts took.

    Attributes:
        spent_s: seconds of each part in the last call: rollout, reward, update.
        gap: greatest difference between sampler's and trainer's log probabilities in it.
    """

    def __init__(self, config: Config, lm: LanguageModel, seed: int):
        """Builds what `dsjax.rl.loop` builds, of the same parts.

        Args:
            config: with `rl`.
            lm: whose weights are trained.
            seed: of prompts and draws.
        """
        assert config.rl is not None  # the caller has made it
        self.config, self.rl, self.steps, self.position = config, config.rl, 0, 0
        self.gap, self.spent_s = 0.0, {}
        graphdef, optimizer = blueprint(config, AxisRules())
        params, bias = jax.tree.map(jnp.copy, (lm.params, lm.bias))  # a step donates its state
        self.state = fresh_state(config, params, bias, jax.jit(optimizer.init)(params))
        self.train_step = make_train_step(
            graphdef, GrpoLoss.of(self.rl), optimizer, bias_speed=config.train.bias_speed
        )
        vocab_size = config.model.vocab_size
        self.batcher = Batcher(
            *(graphdef, self.state.params, self.state.bias),
            sizes=SlotSizes(
                slots=self.rl.completions,
                max_prompt=self.rl.max_prompt_tokens,
                max_tokens=self.rl.max_completion_tokens,
            ),
            drawing=Drawing(allowed=vocab_size, stop_ids=()),
            seed=seed,
        )
        drawn = np.random.default_rng(seed).integers(
            vocab_size, size=(PROBLEMS, self.rl.max_prompt_tokens)
        )
        records = [{"prompt": ids.tolist()} for ids in drawn]

        def reward(prompt: str, completion: str, record: Any) -> float:  # local: it runs here
            del prompt, record
            return small_share(completion)

        self.roller = Roller(
            self.rl,
            self.batcher,
            Problems(
                *(records, records[:1], lambda ids: (tuple(ids), Numbers().decode(ids))),
                max_tokens=self.rl.max_prompt_tokens,
                seed=seed,
            ),
            Scorer({"small": reward}),
            cast(Tokenizer, Numbers()),
        )

    def __call__(self) -> float:
        """Takes a step; returns its seconds."""
        began = time.perf_counter()
        weights = self.batcher.prepare(self.state.params, self.state.bias)
        rollout = self.roller(weights, version=self.steps, position=self.position, show=1)
        self.position = rollout.position
        rolled = time.perf_counter()
        places = place(rollout.sequences.inputs_N.tolist(), self.rl.longest)
        batch = pack(
            *(rollout.sequences, places),
            row_length=self.rl.longest,
            rows=self.rl.completions,
            of_completions={
                "log_sample": rollout.log_sample_NC,
                "log_old": rollout.log_sample_NC,
            },
            of_sequences={"advantages": rollout.advantage_N},
            pad_id=0,
        )
        mask_BT = batch.pop("mask_BT")
        batch["weights_BT"] = token_weights(mask_BT, batch["segments_BT"], self.rl.aggregation)
        self.state, metrics = self.train_step(
            *(self.state, batch), progress=0.0, micro_batch_size=self.rl.micro_batch_rows
        )
        told = jax.device_get(metrics)
        jax.block_until_ready(self.state)
        ended = time.perf_counter()
        self.steps += 1
        self.gap = float(told["logprob_gap_max"])
        reward_s = rollout.metrics["reward_s"]
        self.spent_s = {
            "rollout": rolled - began - reward_s,
            "reward": reward_s,
            "update": ended - rolled,
        }
        return ended - began


def small_share(text: str) -> float:
    """The reward: which part of the tokens, written as numbers, lies in the lower half."""
    numbers = [int(word) for word in text.split()]
    return sum(number < 2048 for number in numbers) / max(len(numbers), 1)


def rl_of(values: flags.FlagValues) -> RlConfig:
    """On-policy, one update a rollout, no reference: what both sides do."""
    return RlConfig(
        prompts=values.prompts,
        group_size=values.group_size,
        mini_batches=1,
        max_prompt_tokens=values.prompt_tokens,
        max_completion_tokens=values.new_tokens,
        micro_batch_rows=values.prompts * values.group_size,
        kl_weight=0.0,
        rewards=(RewardConfig(name="small"),),
    )


def _body(values: flags.FlagValues) -> None:
    if values.repeats < 1:
        raise InputError(f"--repeats is {values.repeats}; it must be at least 1")
    if values.oracle and not Path(values.oracle).exists():
        raise InputError(f"no interpreter at {values.oracle}; `make oracle` makes it")
    rl = rl_of(values)
    config = command.configured(values)
    train = dataclasses.replace(
        config.train,
        bias_speed=constant(0.0),
        optimizer=OptimizerConfig(learning_rate=1e-6, weight_decay=0.0, beta2=0.999),
    )
    config = dataclasses.replace(config, train=train, rl=rl)
    lm = init(config, values.seed)
    result: dict[str, Any] = {"machine": benchmark.machine()}
    with contextlib.ExitStack() as stack:
        folder = values.workdir or stack.enter_context(tempfile.TemporaryDirectory())
        step, compiled_s = Step(config, lm, values.seed), []
        for _ in range(WARM_STEPS):
            step()
        parts: list[dict[str, float]] = []

        def ours() -> float:
            seconds = step()
            parts.append(step.spent_s)
            return seconds

        sides: dict[str, Callable[[], float]] = {"dsjax": ours}
        if values.oracle:
            export = os.path.join(folder, "model")
            if not os.path.exists(export):
                lm.save_pretrained(export, "float32")
            shape = {"prompts": rl.prompts, "group": rl.group_size}
            shape |= {"prompt": rl.max_prompt_tokens, "new": rl.max_completion_tokens}
            arguments = [f"--model={export}", f"--shape={json.dumps(shape)}", "--interactive"]
            arguments.append(f"--variant={values.variant}")
            peer = benchmark.peer([values.oracle, str(PEER), *arguments])
            sides["trl"] = stack.enter_context(peer)

        def on_duration(event: str, duration_secs: float, **_: Any) -> None:
            if event == COMPILED:
                compiled_s.append(duration_secs)

        jax.monitoring.register_event_duration_secs_listener(on_duration)
        seconds = benchmark.alternate(sides, values.repeats)
    tokens = rl.completions * rl.max_completion_tokens
    median = {name: statistics.median(of_side) for name, of_side in seconds.items()}
    spent_s = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    result |= {
        "seconds": median,
        "min_seconds": {name: min(of_side) for name, of_side in seconds.items()},
        "new_tokens_per_s": {name: tokens / s for name, s in median.items()},
        "spent_s": spent_s,
        "shares": {name: s / sum(spent_s.values()) for name, s in spent_s.items()},
        "compilations_when_warm": len(compiled_s),
        "logprob_gap_max": step.gap,
    }
    if "trl" in seconds:
        result["times_as_fast"] = benchmark.ratio(seconds["trl"], seconds["dsjax"])
    result["load_average_after"] = os.getloadavg()
    text = json.dumps(result, indent=1)
    if values.out is None:
        print(text)
    else:
        Path(values.out).write_text(text + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
