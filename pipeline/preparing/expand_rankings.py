"""From a record to its examples: rankings become pairs, pairs become labels where asked for, and each is checked."""

from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Literal

from prefcache.pipeline.preparing.example import Candidate, Example, Label, Pair, Ranking, Turns, Unusable

_MOST_ANSWERS = 64  # 2,016 pairs
Pairing = Literal["best_worst", "best_rest", "adjacent", "all"]


def expand(record: Pair | Label | Ranking, *, pairing: Pairing, ties: bool, as_labels: bool) -> list[Example]:
    """Return the examples of one record: at least one, or raise Unusable."""
    examples: list[Example] = list(_to_pairs(record, pairing, ties)) if isinstance(record, Ranking) else [record]
    return list(_to_labels(examples)) if as_labels else examples


def _to_pairs(ranking: Ranking, pairing: Pairing, ties: bool) -> Iterator[Pair]:
    n = len(ranking.answers)
    if n < 2:
        raise Unusable("nothing to compare", "answers, of which a ranking needs two", n_found=n, n_limit=2)
    if pairing == "all" and n > _MOST_ANSWERS:
        raise Unusable("too many answers", "answers, for prepare.pairing: all", n_found=n, n_limit=_MOST_ANSWERS)
    # Stable: answers that tie stay in the record's order.
    ordered = sorted(ranking.answers, key=lambda answer: -answer.standing)
    compared: dict[str, list[tuple[Candidate, Candidate]]] = {
        "best_worst": [(ordered[0], ordered[-1])],
        "best_rest": [(ordered[0], other) for other in ordered[1:]],
        "adjacent": list(pairwise(ordered)),
        "all": list(combinations(ordered, 2)),
    }
    decided = [(a, b) for a, b in compared[pairing] if ties or a.standing != b.standing]
    if not decided:
        raise Unusable("tie", "answers of equal standing", n_found=n)
    for better, worse in decided:
        scores = {"chosen_score": better.score, "rejected_score": worse.score}
        pair = Pair(**ranking.context(), chosen=better.turns, rejected=worse.turns)
        pair.columns = pair.columns | {name: score for name, score in scores.items() if score is not None}
        yield pair


def _to_labels(examples: list[Example]) -> Iterator[Example]:
    """Take pairs apart. An answer that is in several pairs of a ranking gives one label."""
    seen: set[tuple[int, bool]] = set()
    for example in examples:
        if isinstance(example, Label):
            yield example
            continue
        if _are_same(example.chosen, example.rejected):
            # One answer would be labelled both good and bad, whatever prepare.ties says.
            raise Unusable("chosen equals rejected")
        for answer, label in ((example.chosen, True), (example.rejected, False)):
            if (id(answer), label) not in seen:
                seen.add((id(answer), label))
                yield Label(completion=answer, label=label, **example.context())


def check(example: Example, *, ties: bool) -> None:
    """Raise Unusable for an example that holds nothing to learn from."""
    if not has_content(example.prompt):
        raise Unusable("empty prompt")
    columns = ("completion",) if isinstance(example, Label) else ("chosen", "rejected")
    for column, answer in zip(columns, example.answers, strict=True):
        if not has_content(answer):
            raise Unusable("empty answer", column)
        if not example.rendered and isinstance(answer, list):
            roles = [turn["role"] for turn in answer]
            if "assistant" not in roles:
                raise Unusable("no assistant turn", f"{column} has turns of {', '.join(roles)}")
    if isinstance(example, Pair) and not ties and _are_same(example.chosen, example.rejected):
        raise Unusable("chosen equals rejected")


def has_content(turns: Turns) -> bool:
    if isinstance(turns, str):
        return bool(turns) and not turns.isspace()
    for turn in turns:
        content = turn.get("content")
        if (isinstance(content, str) and content and not content.isspace()) or turn.get("tool_calls"):
            return True
    return False


def _are_same(chosen: Turns, rejected: Turns) -> bool:
    if isinstance(chosen, str) != isinstance(rejected, str):
        chosen, rejected = (
            [{"role": "assistant", "content": turns}] if isinstance(turns, str) else turns
            for turns in (chosen, rejected)
        )
    return chosen == rejected
