"""pass@k of a problem from more answers than k. Knows nothing about models."""

import math


def pass_at_k(answers: int, right: int, k: int) -> float:
    """Probability that of k answers, drawn without replacement, at least one is right.

    Source: Chen et al. 2021, arXiv 2107.03374, equation 1 (unbiased). With k = 1 the share of right
    answers, as R1 reports it.

    Args:
        answers: given.
        right: of them.
        k: at most `answers`.

    Raises:
        ValueError: for numbers that do not fit together.
    """
    if not 0 <= right <= answers or not 1 <= k <= answers:
        raise ValueError(f"pass@{k} of {right} right ones among {answers} answers")
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)
