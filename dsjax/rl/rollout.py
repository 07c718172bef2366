"""A rollout: completions of some prompts, their rewards and advantages, as arrays to learn from.

Knows nothing about optimizers or files. Sampler and trainer are one model: weights go over as they
are (`Batcher.prepare`), once a version, and each sample carries the version it was drawn from.

N = prompts * G sequences of at most Y tokens, G completions a prompt, C new tokens at most.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsjax.config import RlConfig
from dsjax.data.packing import document_order
from dsjax.infer.batcher import Batcher, Request
from dsjax.infer.sampler import Sampling
from dsjax.interop.tokenizer import Tokenizer
from dsjax.rl.groups import advantages, all_equal, overlong_penalty
from dsjax.rl.rows import Sequences
from dsjax.rl.tasks import Problem, Problems
from dsjax.verify.rewards import Sample, Scorer, Scores


@dataclasses.dataclass(frozen=True)
class Shown:
    """A completion as a person reads it.

    Attributes:
        prompt: its prompt's text.
        completion: what was sampled, without a stop token.
        rewards: of each function; NaN where masked.
        advantage: relative to its group.
        tokens: of the completion.
        stopped: whether it ended by itself.
    """

    prompt: str
    completion: str
    rewards: dict[str, float]
    advantage: float
    tokens: int
    stopped: bool


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What the steps until the next rollout learn from.

    Attributes:
        sequences: prompts and completions; a count of 0 marks a sample that is not learned from.
        log_sample_NC: float32 the sampler's log probabilities.
        advantage_N: float32.
        version: optimizer steps of the weights that it was drawn from.
        position: in the order of problems, behind those that were drawn.
        metrics: what is logged of it.
        shown: some completions.
        first_errors: of rewards that failed, what the first failure said.
        ranges: of each reward, its least and its greatest.
    """

    sequences: Sequences
    log_sample_NC: np.ndarray
    advantage_N: np.ndarray
    version: int
    position: int
    metrics: dict[str, float]
    shown: list[Shown]
    first_errors: dict[str, str]
    ranges: dict[str, tuple[float, float]]


class Roller:
    """Samples and rewards rollouts."""

    def __init__(
        self,
        config: RlConfig,
        batcher: Batcher,
        problems: Problems,
        scorer: Scorer,
        tokenizer: Tokenizer,
    ):
        """Takes what a rollout needs beside weights."""
        self.config, self.batcher, self.problems = config, batcher, problems
        self.scorer, self.tokenizer = scorer, tokenizer
        self.weights = {reward.name: reward.weight for reward in config.rewards}

    def __call__(
        self,
        weights: tuple[Any, Any],
        *,
        version: int,
        position: int,
        on_finished: Callable[[int], object] = lambda count: None,
        show: int = 8,
    ) -> Rollout:
        """Samples groups and rewards them.

        Groups of equal rewards are replaced by others, up to `dynamic_sampling` times; those that
        are still needed then are kept as they are, with advantages of 0.

        Args:
            weights: (params, bias), prepared.
            version: of them.
            position: in the order of problems.
            on_finished: told how many more completions have ended.
            show: so many completions are kept as text.
        """
        config, start, first = self.config, time.monotonic(), position
        rewarding_s, sampled_tokens, tried, useless = 0.0, 0, 0, 0
        failed, first_errors = collections.Counter(), {}
        kept: list[_Group] = []
        spare: collections.deque[_Group] = collections.deque()
        for attempt in range(1 + config.dynamic_sampling):
            wanted = config.prompts - len(kept)
            problems, position = self.problems.take(position, wanted)
            groups, scores, seconds = self._groups(weights, problems, first + tried, on_finished)
            rewarding_s += seconds
            failed["reward_errors"] += sum(scores.errors.values())
            failed["reward_timeouts"] += sum(scores.timeouts.values())
            first_errors = scores.first_error | first_errors
            tried += len(groups)
            sampled_tokens += sum(int(group.count_G.sum()) for group in groups)
            teaches = ~all_equal(np.stack([group.total_G for group in groups]))
            useless += int((~teaches).sum())
            if config.dynamic_sampling == 0:
                kept = groups
                break
            kept += [g for g, is_useful in zip(groups, teaches, strict=True) if is_useful]
            spare += [g for g, is_useful in zip(groups, teaches, strict=True) if not is_useful]
            if len(kept) == config.prompts or attempt == config.dynamic_sampling:
                break
        while len(kept) < config.prompts:
            kept.append(spare.popleft())
        rollout_s = time.monotonic() - start - rewarding_s
        metrics = {
            "rollout_s": rollout_s,
            "reward_s": rewarding_s,
            "rollout_tokens_per_s": sampled_tokens / max(rollout_s, 1e-9),
            "zero_std_share": useless / tried,
            "resampled_groups": float(tried - config.prompts),
            "too_long": float(position - first - tried),
            **{name: float(count) for name, count in failed.items()},
        }
        return self._rollout(kept, version, position, metrics, first_errors, show)

    def _groups(
        self, weights, problems, first, on_finished
    ) -> tuple[list["_Group"], Scores, float]:
        """Completions of some problems, what rewards said, and the seconds that this took."""
        size = self.config.group_size
        requests = [
            Request(problem.ids, (first + i) * size + j)
            for i, problem in enumerate(problems)
            for j in range(size)
        ]
        sampling = Sampling(temperature=self.config.temperature)
        params, bias = weights
        found = self.batcher(params, bias, requests, sampling, on_finished=on_finished)
        texts = decoded(self.tokenizer, found.tokens_NG, found.count_N, found.stopped_N)
        began = time.monotonic()
        scores = self.scorer(
            [
                Sample(problems[n // size].prompt, text, problems[n // size].record)
                for n, text in enumerate(texts)
            ]
        )
        seconds = time.monotonic() - began
        longest = self.config.max_completion_tokens
        total_N = overlong_penalty(found.count_N, longest, self.config.overlong_tokens)
        for name, values in scores.values.items():
            total_N = total_N + self.weights[name] * np.asarray(values, np.float64)
        groups = []
        for i, problem in enumerate(problems):
            own = slice(i * size, (i + 1) * size)
            groups.append(
                _Group(
                    problem=problem,
                    tokens_GC=found.tokens_NG[own],
                    log_probs_GC=found.log_probs_NG[own],
                    count_G=found.count_N[own],
                    stopped_G=found.stopped_N[own],
                    routing={name: kept[own] for name, kept in found.routing.items()},
                    texts=texts[own],
                    rewards={n: np.asarray(v, np.float64)[own] for n, v in scores.values.items()},
                    total_G=total_N[own],
                )
            )
        return groups, scores, seconds

    def _rollout(self, groups, version, position, metrics, first_errors, show) -> Rollout:
        config = self.config
        total_PG = np.stack([group.total_G for group in groups])
        advantage_PG = advantages(self._in_places(total_PG, version), config.advantage)
        count_PG = np.stack([group.count_G for group in groups])
        stopped_PG = np.stack([group.stopped_G for group in groups])
        learned_PG = np.isfinite(total_PG)
        if config.mask_truncated:
            learned_PG &= stopped_PG
        n, width = total_PG.size, config.max_prompt_tokens + config.max_completion_tokens
        tokens_NY = np.zeros((n, width), np.int32)
        prompt_N = np.zeros(n, np.int32)
        for i, group in enumerate(groups):
            length = len(group.problem.ids)
            for j in range(config.group_size):
                row, count = i * config.group_size + j, group.count_G[j]
                tokens_NY[row, :length] = group.problem.ids
                tokens_NY[row, length : length + count] = group.tokens_GC[j, :count]
                prompt_N[row] = length
        routing = {
            name: np.concatenate([group.routing[name] for group in groups])
            for name in groups[0].routing
        }
        sequences = Sequences(
            tokens_NY, prompt_N, np.where(learned_PG, count_PG, 0).reshape(-1), routing
        )
        metrics |= self._metrics(groups, total_PG, count_PG, stopped_PG)
        shown = [
            Shown(
                groups[i].problem.prompt,
                groups[i].texts[j],
                {name: float(values[j]) for name, values in groups[i].rewards.items()},
                float(advantage_PG[i, j]),
                int(count_PG[i, j]),
                bool(stopped_PG[i, j]),
            )
            for i, j in _spread_over(total_PG.shape, show)
        ]
        return Rollout(
            sequences=sequences,
            log_sample_NC=np.concatenate([group.log_probs_GC for group in groups]),
            advantage_N=advantage_PG.reshape(-1).astype(np.float32),
            version=version,
            position=position,
            metrics=metrics,
            shown=shown,
            first_errors=first_errors,
            ranges={name: self._range(groups, name) for name in self.weights},
        )

    def _range(self, groups, name) -> tuple[float, float]:
        values = np.concatenate([group.rewards[name] for group in groups])
        values = values[np.isfinite(values)]
        return (float(values.min()), float(values.max())) if values.size else (math.nan, math.nan)

    def _in_places(self, total_PG: np.ndarray, version: int) -> np.ndarray:
        """The rewards that are learned from; in the control they have changed places."""
        if not self.config.shuffle_rewards:
            return total_PG
        known_PG, moved_PG = np.isfinite(total_PG), total_PG.copy()
        known_N = total_PG[known_PG]
        moved_PG[known_PG] = known_N[document_order(known_N.size, version)]
        return moved_PG

    def _metrics(self, groups, total_PG, count_PG, stopped_PG) -> dict[str, float]:
        ended, known_N = count_PG[stopped_PG], total_PG[np.isfinite(total_PG)]
        told = {
            "reward": _mean(total_PG),
            "reward_std": float(known_N.std()) if known_N.size else math.nan,
            "completion_tokens": float(count_PG.mean()),
            "completion_tokens_min": float(count_PG.min()),
            "completion_tokens_max": float(count_PG.max()),
            "ended_tokens": float(ended.mean()) if ended.size else 0.0,
            "truncated_share": float(1.0 - stopped_PG.mean()),
            "masked_samples": float((~np.isfinite(total_PG)).sum()),
        }
        for name in self.weights:
            values_PG = np.stack([group.rewards[name] for group in groups])
            told[f"reward/{name}"] = _mean(values_PG)
        return told


@dataclasses.dataclass(frozen=True)
class _Group:
    """Completions of one problem."""

    problem: Problem
    tokens_GC: np.ndarray
    log_probs_GC: np.ndarray
    count_G: np.ndarray
    stopped_G: np.ndarray
    routing: dict[str, np.ndarray]
    texts: Sequence[str]
    rewards: dict[str, np.ndarray]
    total_G: np.ndarray


def decoded(
    tokenizer: Tokenizer, tokens_NG: np.ndarray, count_N: np.ndarray, stopped_N: np.ndarray
) -> list[str]:
    """The texts of completions, without the token that stopped them."""
    lengths = count_N - stopped_N
    return [
        tokenizer.decode(tokens[:length].tolist())
        for tokens, length in zip(tokens_NG, lengths, strict=True)
    ]


def _mean(values: np.ndarray) -> float:
    """Of those that are numbers; NaN of none, which is logged as null."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else math.nan


def _spread_over(shape: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """Some completions: one of as many groups as there are."""
    groups, size = shape
    count = min(count, groups * size)
    step = max(1, groups // max(count, 1))
    return [((i * step) % groups, (i * step) // groups % size) for i in range(count)]
