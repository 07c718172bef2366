"""R1-Zero in small: a base that knows the form of an answer, then rewards alone, and two controls.

Knows nothing about how a run is carried out beyond the functions it calls. Each run lies in a
folder of its own and goes on where it was. The base has learnt to work sums out, and then that most
answers are guesses: what it shows is that rewards alone find, and sharpen, what makes them right.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsjax.config import (
    Config,
    DataConfig,
    PhaseConfig,
    RewardConfig,
    ScheduleConfig,
    SourceConfig,
)
from dsjax.durable import write_durably
from dsjax.overrides import override
from dsjax.presets import preset
from dsjax.rl.demonstrations import demonstrations
from dsjax.rl.loop import train_grpo
from dsjax.rl.pictures import plot_runs
from dsjax.rl.recipe import around, r1_zero
from dsjax.train.loop import pretrain
from dsjax.train.metrics import read_metrics
from dsjax.verify import gym

FAMILY = "chain_sum"
TERMS = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
HELD_OUT = 128  # problems a seed
MAX_SEEDS = 4  # whose held-out problems no demonstration has
WORKED_SHARE = 0.2  # of the demonstrations of the second stage; the others guess
OTHERS = ("spell_backward", "letter_counting")  # the rest of the mixture
DEMONSTRATIONS = 20_000
WORKED_STEPS, BASE_STEPS = 800, 100
RL_STEPS = 60


@dataclasses.dataclass(frozen=True)
class Found:
    """What a run came to.

    Attributes:
        name: of the run, "seed 0" or of a control.
        before: held-out figures of the base (`dsjax.rl.evaluation`).
        after: the same at the end.
        cpu_minutes: of this process while it ran; 0 where it had been done before.
    """

    name: str
    before: dict[str, float]
    after: dict[str, float]
    cpu_minutes: float


def base_config(data: str, *, steps: int, batch_size: int, learning_rate: float) -> Config:
    """A stage of the base: `tiny_reasoner` on demonstrations."""
    config = override(
        preset("tiny_reasoner"),
        f"train.batch_size={batch_size}",
        f"train.optimizer.learning_rate={learning_rate}",
        f"train.eval_every_steps={steps}",
    )
    tokens = steps * config.train.tokens_per_step
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, total_tokens=tokens),
        data=DataConfig(
            sources=(SourceConfig(path=data, format="conversations"),),
            held_out_fraction=0.02,
            chat_template="plain",
        ),
    )


def train_base(folder: Path) -> bool:
    """Two stages: solutions that are worked out, then those among guesses; False if stopped."""
    for name, share in (("worked", 1.0), ("mixed", WORKED_SHARE)):
        data = folder / f"{name}.jsonl"
        if not data.exists():
            write_demonstrations(data, worked_share=share)
    first = base_config(
        str(folder / "worked.jsonl"), steps=WORKED_STEPS, batch_size=8, learning_rate=2e-3
    )
    if pretrain(first, folder / "worked").stopped_by is not None:
        return False
    second = base_config(
        str(folder / "mixed.jsonl"), steps=BASE_STEPS, batch_size=16, learning_rate=1e-3
    )
    return pretrain(second, folder / "base", init=folder / "worked").stopped_by is None


def rl_config(base: str | os.PathLike, *, rewards: tuple[str, ...], shuffled: bool) -> Config:
    """R1-Zero's recipe, cut down to the base; on-policy halves of a rollout."""
    rl = dataclasses.replace(
        r1_zero(),
        task=f"reasoning_gym:{FAMILY}{json.dumps(TERMS)}",
        steps=RL_STEPS,
        held_out=HELD_OUT,
        prompts=16,
        group_size=16,
        mini_batches=2,
        max_prompt_tokens=64,
        max_completion_tokens=48,
        row_tokens=256,
        micro_batch_rows=16,
        reference_every_steps=60,
        rewards=tuple(RewardConfig(name=name) for name in rewards),
        shuffle_rewards=shuffled,
        max_logprob_gap=1e-4,
        eval_every_steps=10,
    )
    config = override(around(base, rl), "train.optimizer.learning_rate=3e-4")
    falling = ScheduleConfig(start=1.0, phases=(PhaseConfig(until=1.0, value=0.1, shape="cosine"),))
    optimizer = dataclasses.replace(config.train.optimizer, schedule=falling)
    train = dataclasses.replace(config.train, optimizer=optimizer)
    return dataclasses.replace(config, train=train)


def write_demonstrations(path: Path, *, worked_share: float) -> None:
    """The base's data: no problem that a seed holds out is among them."""
    held_out: list[dict[str, Any]] = []
    for seed in range(MAX_SEEDS):
        held_out += gym.train_and_held_out(
            FAMILY, seed=seed, train=1, held_out=HELD_OUT, config=TERMS
        )[1]
    drawn = gym.problems(FAMILY, seed=2**20, size=DEMONSTRATIONS, config=TERMS)
    records = gym.without_questions(drawn, held_out)
    for family in OTHERS:
        records += gym.problems(family, seed=2**20, size=DEMONSTRATIONS // 20)
    found = demonstrations(records, worked_share=worked_share, seed=0)
    lines = "".join(json.dumps(conversation) + "\n" for conversation in found)
    write_durably(path, lines.encode())


def run_r1zero(
    folder: str | os.PathLike,
    *,
    seeds: int = 3,
    controls: bool = True,
    tell: Callable[[str], None] = print,
) -> list[Found] | None:
    """Trains the base, a run a seed, and the controls; draws `r1zero.png`, writes `results.json`.

    Args:
        folder: of all runs; one that was stopped is gone on with.
        seeds: how many runs; each has problems of its own.
        controls: whether to train one by format alone, and one by shuffled rewards, of seed 0.
        tell: given a line on each run.

    Returns:
        What they came to; None if a signal stopped one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    if not train_base(folder):
        return None
    tell(f"base: {(time.process_time() - began) / 60:.1f} CPU-minutes")
    both = ("accuracy", "format")
    runs = {f"seed {seed}": (seed, both, False) for seed in range(seeds)}
    if controls:
        runs |= {"format alone": (0, ("format",), False), "shuffled": (0, both, True)}
    found: list[Found] = []
    for name, (seed, rewards, shuffled) in runs.items():
        began = time.process_time()
        config = rl_config(folder / "base", rewards=rewards, shuffled=shuffled)
        where = folder / name.replace(" ", "-")
        result = train_grpo(config, where, init=folder / "base", seed=seed)
        if result.before is None or result.after is None:
            return None
        minutes = (time.process_time() - began) / 60
        found.append(Found(name, result.before, result.after, minutes))
        tell(_line(found[-1]))
    content = [dataclasses.asdict(one) for one in found]
    write_durably(folder / "results.json", json.dumps(content, indent=1).encode())
    plot_runs(
        {name: read_metrics(folder / name.replace(" ", "-")) for name in runs},
        folder / "r1zero.png",
    )
    return found


def _line(found: Found) -> str:
    before, after = found.before, found.after
    return (
        f"{found.name}: greedy accuracy {before['accuracy']:.1%} -> {after['accuracy']:.1%}; base "
        f"pass@1 {before['pass_1']:.1%}, pass@16 {before['pass_k']:.1%}, format "
        f"{before['format_sampled']:.1%}; tokens {before['tokens']:.1f} -> {after['tokens']:.1f}; "
        f"{found.cpu_minutes:.1f} CPU-minutes"
    )
