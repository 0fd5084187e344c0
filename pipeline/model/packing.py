"""Assign sequences to forward passes.

Longest first everywhere, so that running out of memory shows in the first seconds. All functions return indices.
"""

from collections.abc import Sequence

from prefcache.pipeline.schema import TokenSequence


def token_budget_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Batches whose padded size stays within `budget` tokens; a longer sequence gets a batch to itself."""
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
    return batches


def balanced_batches(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """As few batches within `budget` as possible, all of about the same size; a larger item gets a batch to itself."""
    n = max(1, -(-sum(sizes) // budget))
    while True:
        batches = [batch for batch in split_evenly(sizes, n) if batch]
        if len(batches) < n or all(len(batch) == 1 or sum(sizes[i] for i in batch) <= budget for batch in batches):
            return batches
        n += 1


def split_evenly(sizes: Sequence[int], n: int) -> list[list[int]]:
    """`n` parts of about the same size; some are empty if there are too few items."""
    parts: list[list[int]] = [[] for _ in range(n)]
    totals = [0] * n
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        smallest = totals.index(min(totals))
        parts[smallest].append(i)
        totals[smallest] += sizes[i]
    return parts


def group_by_prompt(sequences: Sequence[TokenSequence]) -> list[list[int]]:
    groups: dict[bytes, list[int]] = {}
    for i, sequence in enumerate(sequences):
        groups.setdefault(sequence.prompt_ids.tobytes(), []).append(i)
    return list(groups.values())


def pack_rows(sequences: Sequence[TokenSequence], groups: Sequence[list[int]], budget: int) -> list[list[list[int]]]:
    """Rows of groups, each row within `budget` tokens. A larger group is split, and its prompt repeated."""
    parts = [part for group in groups for part in _split_group(sequences, group, budget)]
    sizes = [row_tokens(sequences, part) for part in parts]
    rows: list[list[list[int]]] = []
    room = 0
    for i in sorted(range(len(parts)), key=lambda i: -sizes[i]):
        if not rows or sizes[i] > room:
            rows.append([])
            room = budget
        rows[-1].append(parts[i])
        room -= sizes[i]
    return rows


def row_tokens(sequences: Sequence[TokenSequence], group: Sequence[int]) -> int:
    """Tokens that a group takes in a row: its prompt once, and each answer without its last token, which is never an input."""
    return len(sequences[group[0]].prompt_ids) + sum(len(sequences[i].completion_ids) - 1 for i in group)


def _split_group(sequences: Sequence[TokenSequence], group: list[int], budget: int) -> list[list[int]]:
    parts: list[list[int]] = []
    room = 0
    for i in sorted(group, key=lambda i: -len(sequences[i].completion_ids)):
        n = len(sequences[i].completion_ids) - 1
        if not parts or n > room:
            parts.append([])
            room = budget - len(sequences[i].prompt_ids)
        parts[-1].append(i)
        room -= n
    return parts
