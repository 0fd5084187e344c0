"""Assign sequences to forward passes.

Longest first everywhere, so that running out of memory shows in the first seconds. All functions return indices.

Sequences of one prompt are a group. In a row they are a tree: what several of them begin with is there once (packed_row.py).
"""

from collections.abc import Sequence

import numpy as np

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
    groups: dict[tuple[bytes, tuple[bytes, ...]], list[int]] = {}
    for i, sequence in enumerate(sequences):
        groups.setdefault(sequence.prompt, []).append(i)
    return list(groups.values())


def order_tree(group: Sequence[TokenSequence]) -> list[tuple[int, int]]:
    """Order a group so that each sequence shares as much with the one before it as with any before it.

    Returns the place in the group of each, and how many of its inputs it shares. The order is that of the ids, descending: a
    sequence with which another one begins comes after that one, and adds nothing.
    """
    by_ids = sorted(range(len(group)), key=lambda i: group[i].completion_ids.astype(">u4").tobytes(), reverse=True)
    order, before = [(by_ids[0], 0)], group[by_ids[0]]
    for i in by_ids[1:]:
        # The last token is never an input.
        n_shared = min(_count_common(before.completion_ids, group[i].completion_ids), len(group[i].completion_ids) - 1)
        order.append((i, len(before.prompt_ids) + n_shared))
        before = group[i]
    return order


def _count_common(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids both begin with."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


def pack_rows(sequences: Sequence[TokenSequence], groups: Sequence[list[int]], budget: int) -> list[list[list[int]]]:
    """Rows of groups, each row within `budget` tokens. A larger group is split, and what its parts share is repeated."""
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
    """Tokens that a group takes in a row: the inputs that each sequence does not share with one before it."""
    members = [sequences[i] for i in group]
    return sum(members[i].n_tokens - 1 - n_shared for i, n_shared in order_tree(members))


def _split_group(sequences: Sequence[TokenSequence], group: list[int], budget: int) -> list[list[int]]:
    """Cut the group, in the order of its tree, where the budget ends."""
    parts: list[list[int]] = []
    room = 0
    for place, n_shared in order_tree([sequences[i] for i in group]):
        n_inputs = sequences[group[place]].n_tokens - 1
        if not parts or n_inputs - n_shared > room:
            parts.append([])
            room, n_shared = budget, 0
        parts[-1].append(group[place])
        room -= n_inputs - n_shared
    return parts
