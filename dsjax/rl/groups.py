"""From rewards to advantages: group statistics, masked samples, the overlong penalty.

Knows nothing about models. Everything is a handful of numbers a completion, in float64 on the host.

P groups (one a prompt) of G completions each, N = P * G.
"""

from typing import Literal

import numpy as np

EPS = 1e-6  # beside a deviation; TRL has 1e-4, verl 1e-6, R1's report says nothing


def advantages(
    rewards_PG: np.ndarray, kind: Literal["group", "batch", "mean"] = "group"
) -> np.ndarray:
    """How much better each completion is than the others of its prompt.

    "group" is R1's equation 3, with the sample deviation (ddof=1), as TRL, verl and Tunix take it.
    Masked samples (NaN) are no part of any statistic and get 0, and so does a group of which fewer
    than two are left.

    Args:
        rewards_PG: sums of rewards; NaN for masked samples.
        kind: divides by the group's deviation, by that of all samples (Lite-PPO, as TRL takes it),
            or by nothing (Dr. GRPO).

    Returns:
        float64 [P, G].
    """
    rewards_PG = np.asarray(rewards_PG, np.float64)
    valid_PG = np.isfinite(rewards_PG)
    count_P1 = valid_PG.sum(axis=1, keepdims=True)
    known_PG = np.where(valid_PG, rewards_PG, 0.0)
    mean_P1 = known_PG.sum(axis=1, keepdims=True) / np.maximum(count_P1, 1)
    counts_PG = valid_PG & (count_P1 >= 2)
    centred_PG = np.where(counts_PG, rewards_PG - mean_P1, 0.0)
    if kind == "mean":
        return centred_PG
    if kind == "batch":
        all_N = rewards_PG[counts_PG]
        return centred_PG / ((all_N.std(ddof=1) if all_N.size else 0.0) + EPS)
    squares_P1 = (centred_PG**2).sum(axis=1, keepdims=True)
    return centred_PG / (np.sqrt(squares_P1 / np.maximum(count_P1 - 1, 1)) + EPS)


def all_equal(rewards_PG: np.ndarray) -> np.ndarray:
    """Which groups teach nothing: whose rewards, masked ones left out, do not differ.

    Returns:
        bool [P].
    """
    rewards_PG = np.asarray(rewards_PG, np.float64)
    valid_PG = np.isfinite(rewards_PG)
    low_P = np.where(valid_PG, rewards_PG, np.inf).min(axis=1)
    high_P = np.where(valid_PG, rewards_PG, -np.inf).max(axis=1)
    return ~(high_P > low_P)


def overlong_penalty(lengths_N: np.ndarray, longest: int, soft: int) -> np.ndarray:
    """0 up to `longest - soft` tokens, falling to -1 at `longest` (DAPO, equation 13).

    Args:
        lengths_N: in tokens.
        longest: the budget.
        soft: its last tokens, over which the penalty grows; 0 for no penalty.
    """
    lengths_N = np.asarray(lengths_N, np.float64)
    if soft == 0:
        return np.zeros_like(lengths_N)
    return np.clip((longest - soft - lengths_N) / soft, -1.0, 0.0)
