"""Verdicts about the data alone."""

from collections.abc import Mapping
from typing import Any

from prefcache.pipeline.questions.verdict import Numbers, Share, Verdict, find_worst, join, judge, without_pairs
from prefcache.pipeline.visible_text import count


@judge
def length_bias(numbers: Numbers, values: Mapping[str, Any]) -> Verdict:
    if verdict := without_pairs(numbers):
        return verdict
    pairs, differ = numbers["pairs"], numbers["differ"]
    if not differ:
        return Verdict(
            f"Both answers have the same length in all {count(pairs, 'pair')}: length says nothing.", numbers
        )
    longer = Share(numbers["longer"], differ)
    facts = {name: value for name, value in numbers.items() if name != "sources"} | longer.numbers("longer_wins")
    found = f"The longer answer wins in {longer.of('pair')}"
    if longer.is_too_few:
        return Verdict(f"{found}: too few to say whether there is a length bias.", facts)
    # Twice the distance from one half is the share of pairs that length decides beyond chance.
    beyond_chance = 2 * abs(longer.estimate.value - 0.5)
    if not longer.excludes(0.5) or beyond_chance < 0.1:
        worst = _name_most_biased(numbers, longer)
        return Verdict(join([f"{found}: no length bias worth acting on.", worst]), facts)
    strength = "strong" if beyond_chance >= 0.3 else "clear"
    which = "longer" if longer.estimate.value > 0.5 else "shorter"
    return Verdict(
        join(
            [
                f"{found}: the bias towards {which} answers is {strength}.",
                _name_most_biased(numbers, longer),
                "Try train.loss=sigmoid_norm or train.loss=r_dpo, which take length into account, and see after training whether "
                "the rewards follow length (prefcache ask reward-hacking).",
            ]
        ),
        facts,
    )


def _name_most_biased(numbers: Numbers, longer: Share) -> str:
    is_longer = longer.estimate.value >= 0.5
    worst = find_worst(
        numbers["sources"],
        lambda source, n: Share(source["longer"], source["differ"], n),
        longer,
        high_is_worse=is_longer,
    )
    return f"Most so in {worst[0]['source']}: {worst[1].of('pair')}." if worst else ""


@judge
def contradictions(numbers: Numbers, values: Mapping[str, Any]) -> Verdict:
    if verdict := without_pairs(numbers):
        return verdict
    pairs, found = numbers["pairs"], numbers["contradictory"]
    if not found:
        return Verdict(f"No pair contradicts another among {pairs:,}.", numbers)
    share = Share(found, pairs)
    return Verdict(
        f"{count(found, 'pair')} of {pairs:,} ({share.percent}) contradict another: the same prompt and answers, preferred the other way "
        "round. Their gradients cancel, so find out which of each two is right and remove the other from the data, or leave out both.",
        numbers | {"share": share.estimate.value},
    )
