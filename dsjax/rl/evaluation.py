"""How well a policy does on held-out problems: greedy accuracy, pass@1 and pass@k, format.

Knows nothing about training.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsjax.config import RlConfig
from dsjax.errors import InputError
from dsjax.evaluate.pass_at_k import pass_at_k
from dsjax.infer.batcher import Batcher, Request
from dsjax.infer.sampler import Sampling
from dsjax.interop.tokenizer import Tokenizer
from dsjax.rl.rollout import decoded
from dsjax.rl.tasks import Problem, Problems
from dsjax.verify.accuracy import check_record
from dsjax.verify.rewards import Sample, Scorer

FIRST_NUMBER = 2**31  # of sequences that are drawn here: far from those of rollouts


def measured_by(config: RlConfig, held_out: Sequence[Problem]) -> dict[str, str]:
    """What held-out completions are measured by, whatever is rewarded: rewards by name.

    Returns:
        `format`, by the run's own reward of form if it has one; and `accuracy`, where each record
        can be judged.
    """
    form = next((r.name for r in config.rewards if r.name in ("format", "format_think")), "format")
    names = {"format": form}
    with contextlib.suppress(InputError):
        for problem in held_out:
            check_record(problem.record)
        names["accuracy"] = "accuracy"
    return names


class Evaluation:
    """The held-out problems of a run, and what answers are scored with."""

    def __init__(self, config: RlConfig, problems: Problems, scorer: Scorer, tokenizer: Tokenizer):
        """Takes what an evaluation needs beside weights.

        Args:
            config: of the run.
            problems: the held-out ones are asked.
            scorer: of `format`, and of `accuracy` where there are answers.
            tokenizer: reads what is sampled.
        """
        self._config, self._problems = config, problems.held_out
        self._scorer, self._tokenizer = scorer, tokenizer

    def __call__(
        self, batcher: Batcher, weights: tuple[Any, Any], *, sampled: bool
    ) -> dict[str, float]:
        """Asks every problem.

        Args:
            batcher: slots.
            weights: (params, bias), prepared.
            sampled: whether each is also answered `eval_samples` times at the run's temperature.

        What could not be judged counts as wrong.

        Returns:
            `accuracy` and `format` of the best answers, means over problems, and their mean length,
            `tokens`; with `sampled` also `pass_1`, `pass_k`, `format_sampled`.
        """
        values, count_N = self._ask(batcher, weights, 1, 0.0)
        figures = {name: float(np.mean(of)) for name, of in values.items()}
        figures["tokens"] = float(count_N.mean())
        times = self._config.eval_samples
        if sampled and times:
            values, _ = self._ask(batcher, weights, times, self._config.temperature)
            figures["format_sampled"] = float(np.mean(values["format"]))
            if "accuracy" in values:
                right = (values["accuracy"].reshape(-1, times) >= 1.0).sum(axis=1)
                figures["pass_1"] = float(np.mean([pass_at_k(times, int(c), 1) for c in right]))
                figures["pass_k"] = float(np.mean([pass_at_k(times, int(c), times) for c in right]))
        return figures

    def _ask(
        self, batcher, weights, times, temperature
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        asked = [problem for problem in self._problems for _ in range(times)]
        requests = [Request(problem.ids, FIRST_NUMBER + i) for i, problem in enumerate(asked)]
        params, bias = weights
        found = batcher(params, bias, requests, Sampling(temperature=temperature))
        texts = decoded(self._tokenizer, found.tokens_NG, found.count_N, found.stopped_N)
        scores = self._scorer(
            [Sample(p.prompt, text, p.record) for p, text in zip(asked, texts, strict=True)]
        )
        values = {name: np.nan_to_num(np.asarray(of)) for name, of in scores.values.items()}
        return values, found.count_N
