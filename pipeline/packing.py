"""Which sequences share a forward pass."""

from collections.abc import Sequence


def token_budget_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices into `lengths` in batches, longest first, whose padded size stays within `budget` tokens.

    Longest first, so that a batch that does not fit in memory shows in the first seconds. A length above the budget
    gets a batch to itself.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for i in order:
        longest = lengths[batches[-1][0]] if batches else 0
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(i)
    return batches
