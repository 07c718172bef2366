"""What a configuration will do, step by step, before anything is trained: in words and in numbers.

Knows nothing about text or devices; makes no parameter.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.config import Config, RopeConfig, ScheduleConfig
from dsjax.train.schedule import value_at
from dsjax.train.stages import Stage, stages


def schedule_rows(config: Config, *, points: int = 400) -> list[dict[str, Any]]:
    """The schedules at steps spread over each stage, and wherever a phase begins or ends.

    Returns:
        rows with `stage` (from 0), `step` (taken before), `tokens` (seen before, over all stages),
        `batch_size`, `micro_batches`, `seq_len`, `learning_rate`, `bias_speed`, `mtp_loss_weight`.
    """
    rows, before = [], 0
    for number, stage in enumerate(stages(config)):
        count = len(stage.batches)
        spread = {i * (count - 1) // max(points - 1, 1) for i in range(points)}
        rows += _rows(number, stage, sorted(spread | borders(stage)), before)
        before += stage.tokens_before[-1]
    return rows


def borders(stage: Stage) -> set[int]:
    """Steps of a stage, from 0, at which something changes its course.

    The first one, the last one, those about a phase's end, and those at which a quarter of the
    batch's growth is done.
    """
    train, count = stage.config.train, len(stage.batches)
    total = stage.tokens_before[-1]
    ends = [
        phase.until * total
        for schedule in (train.optimizer.schedule, train.bias_speed, train.mtp_loss_weight)
        for phase in schedule.phases[:-1]
    ]
    if train.batch_ramp is not None:
        ends += [train.batch_ramp.tokens * quarter / 4 for quarter in range(1, 5)]
    found = {0, count - 1}
    for end in ends:
        first = next_step(stage, end)
        found |= {step for step in (first - 1, first) if 0 <= step < count}
    return found


def next_step(stage: Stage, tokens: float) -> int:
    """The first step of a stage, from 0, before which so many of its tokens are seen."""
    low, high = 0, len(stage.batches)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if stage.tokens_before[middle] >= tokens else (middle + 1, high)
    return low


def _rows(number: int, stage: Stage, steps: list[int], tokens: int) -> Iterable[dict[str, Any]]:
    train = stage.config.train
    progress = [stage.tokens_before[step] / stage.tokens_before[-1] for step in steps]
    rates = _values(train.optimizer.schedule, progress)
    speeds = _values(train.bias_speed, progress)
    weights = _values(train.mtp_loss_weight, progress)
    for step, rate, speed, weight in zip(steps, rates, speeds, weights, strict=True):
        batch = stage.batches[step]
        yield {
            "stage": number,
            "step": stage.first_step + step,
            "tokens": tokens + stage.tokens_before[step],
            "batch_size": batch,
            "micro_batches": batch // (train.micro_batch_size or train.batch_size),
            "seq_len": train.seq_len,
            "learning_rate": train.optimizer.learning_rate * rate,
            "bias_speed": speed,
            "mtp_loss_weight": weight,
        }


def _values(schedule: ScheduleConfig, progress: list[float]) -> list[float]:
    of_all = jax.vmap(lambda share: value_at(schedule, share))
    return of_all(jnp.asarray(progress, jnp.float32)).tolist()


def describe(config: Config) -> str:
    """The whole schedule as text: what each stage is, and a line for each change of course."""
    found = stages(config)
    last = found[-1]
    tokens = sum(stage.tokens_before[-1] for stage in found)
    train = config.train
    lines = [f"{last.last_step:,} steps, {tokens:,} tokens, {len(found)} stage(s)", ""]
    for number, stage in enumerate(found):
        of, rope = stage.config.train, stage.config.model.stacks[0].blocks[0].attention.rope
        lines.append(
            f"stage {number}: steps {stage.first_step:,} to {stage.last_step:,}, "
            f"{stage.tokens_before[-1]:,} tokens, rows of {of.seq_len:,}, {_rope(rope)}"
        )
    lines += ["", _line([*_COLUMNS])]
    for number, stage in enumerate(found):
        before = sum(s.tokens_before[-1] for s in found[:number])
        for row in _rows(number, stage, sorted(borders(stage)), before):
            lines.append(_line([_COLUMNS[name].format(row[name]) for name in _COLUMNS]))
    optimizer = train.optimizer
    ema = "no average of the weights" if train.ema_decay is None else f"EMA {train.ema_decay:g}"
    lines += [
        "",
        f"AdamW beta {optimizer.beta1:g} / {optimizer.beta2:g}, decay {optimizer.weight_decay:g}, "
        f"clipped at {optimizer.clip_norm:g}; {ema}",
        f"balance loss {train.balance_loss_weight:g} (expert), "
        f"{train.device_balance_loss_weight:g} (device), "
        f"{train.communication_balance_loss_weight:g} (communication); "
        f"fill-in-the-middle at {config.data.fim_rate:g}",
    ]
    return "\n".join(lines)


def _rope(rope: RopeConfig) -> str:
    if rope.yarn is not None:
        return f"YaRN x{rope.yarn.factor:g}"
    if rope.llama3 is not None:
        return f"Llama 3's rope x{rope.llama3.factor:g}"
    return "plain rope" if rope.linear_factor == 1.0 else f"linear rope x{rope.linear_factor:g}"


_COLUMNS = {
    "stage": "{}",
    "step": "{:,}",
    "tokens": "{:,}",
    "seq_len": "{:,}",
    "batch_size": "{:,}",
    "micro_batches": "{:,}",
    "learning_rate": "{:.3g}",
    "bias_speed": "{:.3g}",
    "mtp_loss_weight": "{:.3g}",
}
_WIDTHS = (5, 9, 20, 8, 10, 13, 13, 10, 15)


def _line(cells: list[str]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True))
