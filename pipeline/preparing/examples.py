"""From a record to its examples: rankings become pairs, pairs become labels where asked for, and each is checked."""

from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Literal

from pipeline.preparing.example import Example, Label, Message, Pair, Ranked, Ranking, Turns, Unusable

_MOST_ANSWERS = 64  # 2,016 pairs
Pairing = Literal["best_worst", "best_rest", "adjacent", "all"]


def expand(read: Pair | Label | Ranking, *, pairing: Pairing, ties: bool, as_labels: bool) -> list[Example]:
    """The examples of one record: at least one, or Unusable."""
    pairs = [read] if not isinstance(read, Ranking) else list(_pairs(read, pairing, ties))
    return _apart(pairs) if as_labels else list(pairs)


def _apart(found: list[Pair] | list[Label] | list[Pair | Label]) -> list[Example]:
    """Pairs as labels. An answer of a ranking that is in several pairs gives one."""
    labels: list[Example] = []
    taken: set[tuple[int, bool]] = set()
    for each in found:
        if isinstance(each, Label):
            labels.append(each)
            continue
        if _same(each.chosen, each.rejected):
            # Taken apart they would say yes and no to one answer, whatever is done with ties.
            raise Unusable("chosen equals rejected")
        for label in _labels(each):
            if (this := (id(label.completion), label.label)) not in taken:
                taken.add(this)
                labels.append(label)
    return labels


def check(example: Example, *, ties: bool) -> None:
    """Whether there is something to learn from it."""
    if not _says(example.prompt):
        raise Unusable("empty prompt")
    if isinstance(example, Label):
        _check_answer(example.completion, "completion", example.rendered)
        return
    _check_answer(example.chosen, "chosen", example.rendered)
    _check_answer(example.rejected, "rejected", example.rendered)
    if not ties and _same(example.chosen, example.rejected):
        raise Unusable("chosen equals rejected")


def _check_answer(turns: Turns, column: str, rendered: bool) -> None:
    if not _says(turns):
        raise Unusable("empty answer", column)
    if not rendered and isinstance(turns, list) and not any(turn["role"] == "assistant" for turn in turns):
        raise Unusable("no assistant turn", f"{column} has turns of {', '.join(turn['role'] for turn in turns)}")


def _says(turns: Turns) -> bool:
    if isinstance(turns, str):
        return bool(turns) and not turns.isspace()
    for turn in turns:
        content = turn.get("content")
        if turn.get("tool_calls") or (isinstance(content, str) and content and not content.isspace()):
            return True
    return False


def _same(chosen: Turns, rejected: Turns) -> bool:
    """A text is one turn of the assistant's."""
    return _as_answer(chosen) == _as_answer(rejected)


def _as_answer(turns: Turns) -> list[Message]:
    return [{"role": "assistant", "content": turns}] if isinstance(turns, str) else turns


def _pairs(ranking: Ranking, pairing: Pairing, ties: bool) -> Iterator[Pair]:
    if len(ranking.answers) < 2:
        raise Unusable("nothing to compare", f"{len(ranking.answers)} answers; a ranking needs two")
    if pairing == "all" and len(ranking.answers) > _MOST_ANSWERS:
        raise Unusable(
            "too many answers", f"{len(ranking.answers)}; of all pairs, {_MOST_ANSWERS} answers are the most"
        )
    # Stable: answers that tie stay in the record's order.
    ordered = sorted(ranking.answers, key=lambda answer: -answer.standing)
    compared: dict[str, list[tuple[Ranked, Ranked]]] = {
        "best_worst": [(ordered[0], ordered[-1])],
        "best_rest": [(ordered[0], other) for other in ordered[1:]],
        "adjacent": list(pairwise(ordered)),
        "all": list(combinations(ordered, 2)),
    }
    decided = [(a, b) for a, b in compared[pairing] if ties or a.standing != b.standing]
    if not decided:
        raise Unusable("tie", f"{len(ordered)} answers of equal standing")
    for better, worse in decided:
        yield Pair(
            **ranking.asked(),
            chosen=better.turns,
            rejected=worse.turns,
            chosen_score=better.score,
            rejected_score=worse.score,
        )


def _labels(pair: Pair) -> list[Label]:
    judged = ((pair.chosen, True), (pair.rejected, False))
    return [Label(completion=turns, label=good, **pair.asked()) for turns, good in judged]
