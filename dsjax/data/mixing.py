"""Which source each row of the training stream is drawn from.

Knows nothing about what a source holds: it deals out numbers.
"""

from collections.abc import Sequence


def deal(row: int, shares: Sequence[int]) -> tuple[int, int]:
    """Deals rows to sources evenly, in proportion to their shares, with random access.

    Among the first n rows a source has n times its share, within one row for each other source;
    among the first sum(shares) it has exactly its share. Source: `grain.MapDataset.mix`, whose
    schedule this is; that one rounds weights to hundredths of the smallest.

    Args:
        row: from 0.
        shares: how much of each source, positive.

    Returns:
        (source, how many rows it had before).
    """
    begin, end, rest = row, row + 1, sum(shares)
    for source, share in enumerate(shares):
        # What is left for the sources that follow, of `begin` rows and of `end` rows.
        begin_left, end_left = (n * (rest - share) // rest for n in (begin, end))
        if end - end_left > begin - begin_left:
            return source, begin - begin_left
        begin, end, rest = begin_left, end_left, rest - share
    raise AssertionError("the last source takes what is left")


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers in the same proportions, to one part in 2**40."""
    total = sum(weights)
    return [max(1, round(weight / total * 2**40)) for weight in weights]
