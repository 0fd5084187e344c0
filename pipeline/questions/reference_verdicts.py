"""Verdicts about what references say of the pairs."""

from collections import defaultdict

from prefcache.pipeline.questions.verdict import (
    Numbers,
    Share,
    Values,
    Verdict,
    conclude,
    find_worst,
    judge,
    without_pairs,
    without_scores,
)
from prefcache.pipeline.visible_text import count

_SCORE_WITH_ANOTHER = "To compare, score with another reference (prefcache score CONFIG --set model=OTHER), then once more with yours, which computes nothing."


@judge
def agreement(numbers: Numbers, values: Values) -> Verdict:
    groups = numbers["groups"] or []
    used = [group for group in groups if group["used"]]
    n_scored = sum(group["n"] for group in used)
    if verdict := without_pairs(numbers) or without_scores(numbers, n_scored):
        return verdict
    agrees = Share(sum(group["n_agrees"] for group in used), n_scored)
    per_token = Share(sum(group["n_agrees_per_token"] for group in used), n_scored)
    facts = agrees.numbers("agrees") | per_token.numbers("agrees_per_token")
    found = f"The reference already prefers the chosen answer in {agrees.of('pair')}, per token in {per_token.percent}"
    if agrees.is_too_few:
        return conclude(numbers, f"{found}: too few to say more.", **facts)
    worst = find_worst(
        used, lambda source, n: Share(source["n_agrees_per_token"], source["n"], n), per_token, high_is_worse=False
    )
    where = f"It agrees least with {worst[0]['source']}: per token in {worst[1].of('pair')}." if worst else ""
    return conclude(numbers, f"{found}.", _explain_agreement(per_token), where, _name_others(groups), **facts)


def _explain_agreement(per_token: Share) -> str:
    value = per_token.estimate.value
    if not per_token.excludes(0.5):
        return "It has no preference of its own yet, so what a run learns comes from your pairs."
    # Beyond two thirds one answer in three or fewer is left to turn round; below four tenths it leans the other way.
    if value > 2 / 3:
        return "Much of the preference is there before training; the pairs that teach most are the others (prefcache ask disagreements)."
    if value < 0.4:
        return (
            "It leans the other way: check that chosen and rejected are not swapped (prefcache preview CONFIG), then read some pairs "
            "(prefcache ask disagreements)."
        )
    return "It leans little, so what a run learns comes from your pairs."


def _name_others(groups: list[Numbers]) -> str:
    """Name the other references, with their shares."""
    sums = defaultdict[str, list[int]](lambda: [0, 0])
    for group in groups:
        if not group["used"]:
            sums[group["reference"]][0] += group["n_agrees_per_token"]
            sums[group["reference"]][1] += group["n"]
    named = [f"{name} in {Share(*both).of('pair')}" for name, both in sums.items() if both[1]]
    return f"Other references, per token: {'; '.join(named)}." if named else ""


@judge
def disagreements(numbers: Numbers, values: Values) -> Verdict:
    groups = numbers["groups"] or []
    n_scored = sum(group["n"] for group in groups)
    if verdict := without_pairs(numbers) or without_scores(numbers, n_scored):
        return verdict
    share = Share(sum(group["n_disagrees"] for group in groups), n_scored)
    worst = find_worst(groups, lambda source, n: Share(source["n_disagrees"], source["n"], n), share)
    where = f"Most in {worst[0]['source']}: {worst[1].of('pair')}." if worst else ""
    return conclude(
        numbers,
        f"The reference finds the rejected answer likelier per token in {share.count_of('pair')}.",
        where,
        "Training has to turn these round. Read the clearest, which come first: some may be labelled the wrong way round (prefcache ask "
        "label-noise)."
        if share.n_right and not share.is_too_few
        else "",
        "That is too few to say more." if share.is_too_few else "",
        scored=n_scored,
        **share.numbers("disagrees"),
    )


@judge
def label_noise(numbers: Numbers, values: Values) -> Verdict:
    if verdict := without_pairs(numbers) or without_scores(numbers, numbers["scored"]):
        return verdict
    share, n_references = Share(numbers["doubtful"], numbers["scored"]), numbers["n_references"]
    preferring = {1: "the reference", 2: "both references"}.get(n_references, f"all {n_references} references")
    prefer = f"{preferring} clearly {{}} the rejected answer, by {values['nats']:g} nats per token or more"
    alone = f"One reference may have a taste of its own. {_SCORE_WITH_ANOTHER}" if n_references == 1 else ""
    if not numbers["doubtful"]:
        does = "does" if n_references == 1 else "do"
        return conclude(
            numbers, f"In none of {count(numbers['scored'], 'pair')} {does} {prefer.format('prefer')}.", alone
        )
    found = f"In {share.count_of('pair')} {prefer.format('prefers' if n_references == 1 else 'prefer')}."
    # Human labellers disagree with one another on a fifth to a third of such pairs; a larger share says more about the reference.
    if share.estimate.value > 0.3:
        advice = "So many are hardly all mistakes: the references' taste differs from your data's. Ask again with a higher --set nats."
    else:
        advice = (
            "Read some (prefcache show EXAMPLE) and leave out those that are wrong with train.where, as example_id not in ('...'), or train "
            "with train.loss=robust, whose train.loss_args.label_smoothing is the share of wrong labels."
        )
    return conclude(numbers, found, advice, alone, **share.numbers("share"))


@judge
def references(numbers: Numbers, values: Values) -> Verdict:
    if verdict := without_pairs(numbers):
        return verdict
    groups = numbers["groups"] or []
    if not groups:
        return conclude(numbers, f"No other reference has scored these pairs. {_SCORE_WITH_ANOTHER}")
    same = Share(sum(group["n_same_per_token"] for group in groups), sum(group["n"] for group in groups))
    others = "The other reference agrees" if len(groups) == 1 else f"{len(groups)} other references agree"
    worst = find_worst(
        groups, lambda group, n: Share(group["n_same_per_token"], group["n"], n), same, high_is_worse=False
    )
    # Two references that know nothing of the pairs agree on half of them by chance.
    advice = (
        "That is hardly more than chance: at least one of them tells nothing about these pairs."
        if same.estimate.low < 0.6
        else "The pairs on which they differ: prefcache ask reference-conflicts."
    )
    return conclude(
        numbers,
        f"{others} with yours on which answer is likelier per token in {same.of('pair')}.",
        f"Least so {worst[0]['reference']}: {worst[1].percent} ({worst[1].interval})." if worst else "",
        advice,
        **same.numbers("same_sign_per_token"),
    )


@judge
def reference_conflicts(numbers: Numbers, values: Values) -> Verdict:
    if verdict := without_pairs(numbers) or without_scores(numbers, numbers["scored"]):
        return verdict
    groups = numbers["groups"] or []
    if not groups:
        return conclude(numbers, f"No other reference has scored these pairs. {_SCORE_WITH_ANOTHER}")
    share = Share(sum(group["n_conflicts"] or 0 for group in groups), sum(group["n"] for group in groups))
    worst = find_worst(groups, lambda group, n: Share(group["n_conflicts"] or 0, group["n"], n), share)
    return conclude(
        numbers,
        f"Another reference prefers the other answer per token in {share.count_of('pair')}.",
        f"Most often {worst[0]['reference']}: {worst[1].of('pair')}." if worst else "",
        "The clearest come first: there the choice of the reference decides how far training has to go. Pairs on which all agree against "
        "your label: prefcache ask label-noise."
        if share.n_right
        else "",
        **share.numbers("conflicts"),
    )


@judge
def reference_probability(numbers: Numbers, values: Values) -> Verdict:
    if verdict := without_pairs(numbers) or without_scores(numbers, numbers["scored"]):
        return verdict
    return conclude(
        numbers,
        f"{numbers['kept']:,} of {count(numbers['scored'], 'training pair')} are kept, those with a margin of {numbers['lowest']:.3g} nats per "
        "token or more. Save them (--out FILE) and train with train.only=FILE; train once on all pairs too, to see whether it helps.",
    )
