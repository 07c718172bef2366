"""A run as its stages, and a stage as its steps: how many, of which batch, after how many tokens.

Knows nothing about arrays or text. A stage is itself a `Config`, of a run with one stage, so that
whatever trains one trains them all. Source: V3 report, 4.2 (batch ramp) and 4.3 (longer contexts).
"""

import dataclasses
from bisect import bisect_right

from dsjax.config import Config, ModelConfig, TrainConfig, constant
from dsjax.errors import InputError

MAX_STEPS = 5_000_000  # V3 took 246,108


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run with one sequence length, one rope and one set of schedules.

    Attributes:
        config: of a run with this stage alone.
        first_step: steps of the run before it.
        batches: sequences of each of its steps.
        tokens_before: positions that the stage has seen before each of its steps; one entry more,
            all of them.
    """

    config: Config
    first_step: int
    batches: tuple[int, ...]
    tokens_before: tuple[int, ...]

    @property
    def last_step(self) -> int:
        """Steps of the run after it."""
        return self.first_step + len(self.batches)

    def progress(self, step: int) -> float:
        """Share of the stage's tokens seen after `step` steps of the run."""
        return self.tokens_before[step - self.first_step] / self.tokens_before[-1]


def batch_at(train: TrainConfig, tokens: int) -> int:
    """Sequences in the step that starts after so many tokens; whole micro-batches.

    V3's batch grows from 3,072 to 15,360 over 469B tokens; here it does so linearly.
    """
    ramp = train.batch_ramp
    if ramp is None or tokens >= ramp.tokens:
        return train.batch_size
    micro = train.micro_batch_size or train.batch_size
    grown = ramp.start + (train.batch_size - ramp.start) * tokens / ramp.tokens
    return min(max(int(grown) // micro * micro, ramp.start), train.batch_size)


def stages(config: Config) -> tuple[Stage, ...]:
    """Takes a run apart: the main stage, then `train.context_stages`.

    Raises:
        InputError: for a run of more steps than can be planned one by one.
    """
    train = config.train
    if train.total_tokens // train.tokens_per_step > MAX_STEPS:
        raise InputError(
            f"train.total_tokens {train.total_tokens:,} makes "
            f"{train.total_tokens // train.tokens_per_step:,} steps; at most {MAX_STEPS:,}"
        )
    batches, seen = [], [0]
    while seen[-1] < train.total_tokens:
        batches.append(batch_at(train, seen[-1]))
        seen.append(seen[-1] + batches[-1] * train.seq_len)
    main = dataclasses.replace(
        config,
        model=config.model if train.yarn else without_yarn(config.model),
        train=dataclasses.replace(train, context_stages=()),
    )
    found = [Stage(main, 0, tuple(batches), tuple(seen))]
    for stage in train.context_stages:
        per_step = stage.batch_size * stage.seq_len
        stage_train = dataclasses.replace(
            train,
            seq_len=stage.seq_len,
            batch_size=stage.batch_size,
            micro_batch_size=stage.micro_batch_size,
            total_tokens=stage.steps * per_step,
            batch_ramp=None,
            optimizer=dataclasses.replace(
                train.optimizer, learning_rate=stage.learning_rate, schedule=constant(1.0)
            ),
            bias_speed=constant(train.bias_speed.phases[-1].value),
            mtp_loss_weight=constant(train.mtp_loss_weight.phases[-1].value),
            yarn=stage.yarn,
            context_stages=(),
        )
        model = config.model if stage.yarn else without_yarn(config.model)
        found.append(
            Stage(
                dataclasses.replace(config, model=model, train=stage_train),
                found[-1].last_step,
                (stage.batch_size,) * stage.steps,
                tuple(n * per_step for n in range(stage.steps + 1)),
            )
        )
    return tuple(found)


def stage_of(config: Config, step: int) -> Stage:
    """The stage whose weights a checkpoint after `step` steps holds.

    Raises:
        InputError: if the run is shorter than that.
    """
    found = stages(config)
    if not 0 <= step <= found[-1].last_step:
        raise InputError(f"step {step} is outside the run of {found[-1].last_step} steps")
    starts = [stage.first_step for stage in found]
    return found[max(bisect_right(starts, step - 1) - 1, 0)]


def without_yarn(model: ModelConfig) -> ModelConfig:
    """The same model with plain rotary embeddings."""

    def plain(block):
        rope = dataclasses.replace(block.attention.rope, yarn=None)
        return dataclasses.replace(block, attention=dataclasses.replace(block.attention, rope=rope))

    stacks = tuple(
        dataclasses.replace(stack, blocks=tuple(map(plain, stack.blocks))) for stack in model.stacks
    )
    mtp = model.mtp and dataclasses.replace(model.mtp, block=plain(model.mtp.block))
    return dataclasses.replace(model, stacks=stacks, mtp=mtp)
