"""Which sequences share a forward pass.

Longest first everywhere, so that what does not fit in memory shows in the first seconds.
"""

from collections.abc import Sequence as SequenceOf

from pipeline.schema import Sequence


def token_budget_batches(lengths: SequenceOf[int], budget: int) -> list[list[int]]:
    """Indices into `lengths` in batches whose padded size stays within `budget` tokens.

    A length above the budget gets a batch to itself.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for i in order:
        longest = lengths[batches[-1][0]] if batches else 0
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def balanced(sizes: SequenceOf[int], budget: int) -> list[list[int]]:
    """Indices into `sizes` in as few parts of at most `budget` as need be, all of about the same size.

    A size above the budget gets a part to itself.
    """
    n = max(1, -(-sum(sizes) // budget))
    while True:
        parts = [part for part in shares(sizes, n) if part]
        if len(parts) < n or all(len(part) == 1 or sum(sizes[i] for i in part) <= budget for part in parts):
            return parts
        n += 1


def shares(sizes: SequenceOf[int], n: int) -> list[list[int]]:
    """Indices into `sizes` in `n` parts of about the same size, some of them empty where there are too few."""
    parts: list[list[int]] = [[] for _ in range(n)]
    filled = [0] * n
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = filled.index(min(filled))
        parts[least].append(i)
        filled[least] += sizes[i]
    return parts


def by_prompt(sequences: SequenceOf[Sequence]) -> list[list[int]]:
    """Indices of the sequences that have the same prompt."""
    groups: dict[bytes, list[int]] = {}
    for i, sequence in enumerate(sequences):
        groups.setdefault(sequence.prompt_ids.tobytes(), []).append(i)
    return list(groups.values())


def packed_rows(sequences: SequenceOf[Sequence], groups: SequenceOf[list[int]], budget: int) -> list[list[list[int]]]:
    """Rows of groups, each of at most `budget` tokens; a group that is larger is cut, and its prompt repeated."""
    sized = [(n_in_row(sequences, part), part) for group in groups for part in _cut(sequences, group, budget)]
    rows: list[list[list[int]]] = []
    room = 0
    for n, part in sorted(sized, key=lambda each: -each[0]):
        if not rows or n > room:
            rows.append([])
            room = budget
        rows[-1].append(part)
        room -= n
    return rows


def n_in_row(sequences: SequenceOf[Sequence], group: SequenceOf[int]) -> int:
    """Tokens that a group takes: its prompt once, and every answer but for its last token, which is never an input."""
    return len(sequences[group[0]].prompt_ids) + sum(len(sequences[i].completion_ids) - 1 for i in group)


def _cut(sequences: SequenceOf[Sequence], group: list[int], budget: int) -> list[list[int]]:
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
