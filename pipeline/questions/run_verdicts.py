"""Verdicts about what runs have learnt."""

from collections import defaultdict
from collections.abc import Callable, Iterable

from prefcache.pipeline import intervals
from prefcache.pipeline.questions.verdict import (
    Numbers,
    Share,
    Values,
    Verdict,
    conclude,
    find_worst,
    judge,
    list_names,
    without_pairs,
    without_runs,
)
from prefcache.pipeline.schema import HELD_OUT, TRAIN
from prefcache.pipeline.visible_text import count

_MORE_VISITS = "Train for more than one epoch (train.epochs), or evaluate along the run (train.eval_every)"
# A mean over fewer answers is mostly noise.
_FEWEST_ANSWERS = 30


def _by_run(groups: list[Numbers]) -> dict[str, list[Numbers]]:
    runs = defaultdict(list)
    for group in groups:
        runs[group["run"]].append(group)
    return runs


def _sum(groups: Iterable[Numbers], name: str) -> int:
    return sum(group[name] for group in groups)


def _in_runs(groups: list[Numbers]) -> str:
    """Return ` in 2 runs`: examples count once for each run."""
    n_runs = len(_by_run(groups))
    return f" in {n_runs} runs" if n_runs > 1 else ""


def _find_worst_run(
    groups: list[Numbers],
    share: Callable[[Numbers, int], Share],
    whole: Share,
    names: tuple[str, ...],
    *,
    high_is_worse: bool,
) -> str:
    """Return `run ipo: 81% of 296 examples (...)` of the run that is worse than the whole, with the sums of these numbers."""
    runs = [{"run": run} | {name: _sum(of_run, name) for name in names} for run, of_run in _by_run(groups).items()]
    worst = find_worst(runs, share, whole, high_is_worse=high_is_worse)
    return f"run {worst[0]['run']}: {worst[1].of('example')}" if worst else ""


@judge
def by_source(numbers: Numbers, values: Values) -> Verdict:
    groups = numbers["groups"] or []
    if verdict := without_runs(numbers):
        return verdict
    if not groups:
        return conclude(numbers, "No run has rewards yet that can be right or wrong.")
    held_out = [group for group in groups if group["split"] != TRAIN]
    shown = [group for group in held_out if group["split"] == HELD_OUT] or held_out or groups
    right = Share(_sum(shown, "n_right"), _sum(shown, "n"))
    what = "held-out example" if shown[0]["split"] != TRAIN else "training example"
    found = f"At their last visit{_in_runs(shown)}, {right.count_of(what)} are right."
    if right.is_too_few:
        return conclude(numbers, found, "That is too few to compare sources.", **right.numbers("correct"))

    def share(group: Numbers, n: int) -> Share:
        return Share(group["n_right"], group["n"], n)

    worst = find_worst(shown, share, right, high_is_worse=False)
    worst_run = _find_worst_run(shown, share, right, ("n", "n_right"), high_is_worse=False)
    n_sources = len({group["source"] for group in shown})
    hardest = (
        f"Hardest is {worst[0]['source']} in run {worst[0]['run']}: {worst[1].of('example')}."
        if worst and n_sources > 1
        else ""
    )
    no_source = "No source differs clearly from the whole." if n_sources > 1 and not worst else ""
    early = (
        "They were visited once, the first of them by a policy that had hardly been trained, so this is not the accuracy of the trained model: "
        "hold examples out (prepare.held_out)."
        if shown[0]["split"] == TRAIN and (numbers["epochs"] or 0) <= 1
        else ""
    )
    return conclude(
        numbers,
        found,
        early,
        hardest,
        no_source,
        f"Worst is {worst_run}." if worst_run else "",
        **right.numbers("correct"),
    )


@judge
def learning(numbers: Numbers, values: Values) -> Verdict:
    groups = numbers["groups"] or []
    if verdict := without_runs(numbers):
        return verdict
    if not groups:
        return conclude(numbers, "No example has been visited yet with a reward that could be right or wrong.")
    several = [
        group
        for of_split in _by_run_and_split(groups)
        if _sum(of_split, "n_visits") > _sum(of_split, "n")
        for group in of_split
    ]
    if not several:
        return conclude(
            numbers,
            f"Each of {count(_sum(groups, 'n'), 'example')}{_in_runs(groups)} was visited once, so that it cannot be said what was learnt or forgotten. "
            f"{_MORE_VISITS}.",
        )
    shown = [group for group in several if group["split"] == TRAIN] or several
    what = "training example" if shown[0]["split"] == TRAIN else "held-out example"
    n = _sum(shown, "n")
    counts = {name: _sum((group for group in shown if group["became"] == name), "n") for name in _BECAME}
    never, forgotten = Share(counts["never right"], n), Share(counts["forgotten"], n)
    shares = [f"{Share(counts[name], n).percent} {phrase}" for name, phrase in _BECAME.items() if counts[name]]
    worst = _find_worst_run(
        [group | {"n_never": group["n"] if group["became"] == "never right" else 0} for group in shown],
        lambda run, n: Share(run["n_never"], run["n"], n),
        never,
        ("n", "n_never"),
        high_is_worse=True,
    )
    return conclude(
        numbers,
        f"Of {count(n, what)}{_in_runs(shown)}, {list_names(shares)}.",
        f"Never right: {never.percent} ({never.interval}).",
        f"Most are never right in {worst}." if worst else "",
        _advise_on_learning(never, forgotten),
        **never.numbers("never_right"),
        **forgotten.numbers("forgotten"),
    )


_BECAME = {
    "always right": "were always right",
    "learnt": "were learnt",
    "back and forth": "went back and forth",
    "forgotten": "were forgotten",
    "never right": "were never right",
}


def _by_run_and_split(groups: list[Numbers]) -> list[list[Numbers]]:
    found = defaultdict(list)
    for group in groups:
        found[group["run"], group["split"]].append(group)
    return list(found.values())


def _advise_on_learning(never: Share, forgotten: Share) -> str:
    # One in ten: more than the few odd pairs that any data has.
    if never.estimate.low > 0.1:
        return "Read those that are never right (prefcache ask unlearned): they are wrongly labelled or too hard, or the run was too short."
    if forgotten.estimate.low > 0.1:
        return "Forgotten examples point to steps that are too large: try a lower train.learning_rate or a larger train.batch_size."
    return ""


@judge
def unlearned(numbers: Numbers, values: Values) -> Verdict:
    if verdict := without_runs(numbers):
        return verdict
    groups = numbers["groups"] or []
    if not groups:
        return conclude(numbers, "No example has been visited yet with a reward that could be right or wrong.")
    visited_again = {group["run"] for group in groups if group["split"] == TRAIN and group["most_visits"] > 1}
    is_once = not visited_again
    groups = [group for group in groups if is_once or group["run"] in visited_again]
    splits = {
        name: Share(_sum(of_split, "n_wrong"), _sum(of_split, "n"))
        for name, of_split in (
            ("training", [group for group in groups if group["split"] == TRAIN]),
            ("held-out", [group for group in groups if group["split"] != TRAIN]),
        )
        if of_split
    }
    wrong = [share.count_of(f"{name} example") for name, share in splits.items()]
    found = f"Wrong at their last visit{_in_runs(groups)}: {list_names(wrong)}."
    if is_once:
        once = "Each training example was visited once, perhaps before the policy had learnt much, so that it cannot be said which are unlearned."
        return conclude(numbers, found, once, f"{_MORE_VISITS}.")
    worst = _find_worst_run(
        groups,
        lambda run, n: Share(run["n_wrong"], run["n"], n),
        Share(_sum(groups, "n_wrong"), _sum(groups, "n")),
        ("n", "n_wrong"),
        high_is_worse=True,
    )
    return conclude(numbers, found, f"Most in {worst}." if worst else "", _advise_on_unlearned(splits))


def _advise_on_unlearned(splits: dict[str, Share]) -> str:
    if not any(wrong.n_right for wrong in splits.values()):
        return ""
    trained, held_out = splits.get("training"), splits.get("held-out")
    if trained and held_out and held_out.estimate.low > trained.estimate.high:
        return (
            "The run is right about its training examples far more often than about others, so it learnt them by heart: try fewer "
            "train.epochs, a lower train.learning_rate, or more data."
        )
    return "Read the worst (prefcache show EXAMPLE); leave out what is wrongly labelled with train.where, as example_id not in ('...')."


@judge
def learned_first(numbers: Numbers, values: Values) -> Verdict:
    if verdict := without_pairs(numbers) or without_runs(numbers):
        return verdict
    groups = numbers["groups"] or []
    if not groups:
        return conclude(numbers, "No run has visited a training pair yet.")
    sentences = [_describe_order(run, of_run) for run, of_run in _by_run(groups).items()]
    return conclude(
        numbers,
        *sentences,
        "A part counts as learnt from the first tenth of the run in which clearly more than half of its visits are right; with train.order_by, "
        "the order of the data shows too.",
    )


def _describe_order(run: str, groups: list[Numbers]) -> str:
    """Say which source and which length is right first, and which last or not at all."""
    described = [
        _describe_parts(name, [group for group in groups if group["kind"] == kind])
        for kind, name in (("source", "{}"), ("length", "answers of {} tokens"))
        if len({group["part"] for group in groups if group["kind"] == kind}) > 1
    ]
    if not any(described):
        return f"Run {run} has too few visits, or got no part of the data right more often than not."
    return f"Run {run}: {'; '.join(filter(None, described))}."


def _describe_parts(name: str, groups: list[Numbers]) -> str:
    learnt_in: dict[str, int | None] = {}
    for group in sorted(groups, key=lambda group: group["tenth"]):
        share = Share(group["n_right"], group["n"], len(groups))
        learnt_in.setdefault(group["part"], None)
        if learnt_in[group["part"]] is None and share.estimate.low > 0.5:
            learnt_in[group["part"]] = group["tenth"]
    learnt = {part: tenth for part, tenth in learnt_in.items() if tenth is not None}
    if not learnt:
        return ""

    def label(part: str) -> str:
        return name.format(part if "{} " not in name else f"{part} to {2 * int(part) - 1}")

    first, last = min(learnt, key=learnt.__getitem__), max(learnt, key=learnt.__getitem__)
    ends = [first, last] if learnt[last] > learnt[first] else [first]
    text = ", ".join(f"{label(part)} from tenth {learnt[part]} on" for part in ends)
    never = [label(part) for part in learnt_in if part not in learnt]
    return text + (f"; not clearly: {list_names(never[:3])}" if never else "")


@judge
def reward_hacking(numbers: Numbers, values: Values) -> Verdict:
    if verdict := without_pairs(numbers) or without_runs(numbers):
        return verdict
    groups = numbers["groups"] or []
    if not groups:
        return conclude(numbers, "No run has visited a training pair yet.")
    last = [max(of_run, key=lambda group: group["tenth"]) for of_run in _by_run(groups).values()]
    right = Share(_sum(last, "n_right"), _sum(last, "n"))
    pushed = Share(_sum(last, "n_pushed"), _sum(last, "n"))
    runs = "the run" if len(last) == 1 else f"{len(last)} runs"
    found = f"In the last tenth of {runs}, {right.percent} of {count(right.n, 'visit')} are right"
    if pushed.is_too_few:
        return conclude(numbers, f"{found}: too few to say why.")
    worst = find_worst(last, lambda run, n: Share(run["n_pushed"], run["n"], n), pushed)
    return conclude(
        numbers,
        f"{found}; in {pushed.percent} ({pushed.interval}) only because the rejected answer lost more than the chosen one, which became less likely "
        "than under the reference.",
        f"Most in run {worst[0]['run']}: {worst[1].of('visit')}." if worst else "",
        # Above one half, most of what is gained comes from pushing answers down.
        "Both answers are pushed down: try train.loss=dpop, which holds the chosen answer up, a sum such as train.loss={sigmoid: 0.8, sft: 0.2}, or a "
        "lower train.learning_rate."
        if pushed.estimate.low > 0.5
        else "",
        _describe_length(last),
        **pushed.numbers("right_by_pushing_down"),
    )


def _describe_length(last: list[Numbers]) -> str:
    measured = [group for group in last if group["margin_with_length"] is not None]
    if not measured:
        return ""
    most = max(measured, key=lambda group: abs(group["margin_with_length"]))
    estimate = intervals.correlation(most["margin_with_length"], most["n"])
    # From 0.3 on, length explains a tenth of what margins differ by.
    if min(abs(estimate.low), abs(estimate.high)) < 0.3 or estimate.low * estimate.high < 0:
        return "Margins do not follow length."
    return (
        f"Margins follow length in run {most['run']} (correlation {estimate.value:.2f}, 95% interval {estimate.low:.2f} to {estimate.high:.2f}): "
        "try train.loss=sigmoid_norm or train.loss=r_dpo."
    )


@judge
def kl_by_length(numbers: Numbers, values: Values) -> Verdict:
    if verdict := without_pairs(numbers) or without_runs(numbers):
        return verdict
    groups = [group for group in numbers["groups"] or [] if group["answers"] >= _FEWEST_ANSWERS]
    ends = defaultdict(list)
    for group in groups:
        ends[group["run"], group["answer"]].append(group)
    pairs = [(buckets[0], buckets[-1]) for buckets in ends.values() if len(buckets) > 1]
    if not pairs:
        return conclude(
            numbers,
            f"No two lengths have {_FEWEST_ANSWERS} answers or more with a reference's log-probs: too few to compare.",
        )
    short, long = max(pairs, key=lambda both: _how_much_farther(*both))
    times = _how_much_farther(short, long)
    found = (
        f"Per token, the policy moved from the reference by {short['log_ratio_per_token']:+.3f} nats on {short['answer']} answers of "
        f"{_lengths(short)} and by {long['log_ratio_per_token']:+.3f} on those of {_lengths(long)} (run {short['run']})"
    )
    # Twice as far is more than lengths alone explain; the sign counts too.
    if times < 2:
        return conclude(numbers, f"{found}: about the same at every length.", times=times)
    return conclude(
        numbers,
        f"{found}: {times:.1f} times as far on one as on the other. A loss over whole answers moves each token of a short answer further; "
        "train.loss=sigmoid_norm divides by length.",
        times=times,
    )


def _how_much_farther(short: Numbers, long: Numbers) -> float:
    a, b = abs(short["log_ratio_per_token"]), abs(long["log_ratio_per_token"])
    return float(max(a, b) / max(min(a, b), 1e-9))


def _lengths(group: Numbers) -> str:
    return f"{group['from_tokens']} to {2 * group['from_tokens'] - 1} tokens"


@judge
def margin_tokens(numbers: Numbers, values: Values) -> Verdict:
    if verdict := without_runs(numbers):
        return verdict
    groups = [group for group in numbers["groups"] or [] if group["share_of_top"] is not None]
    if not groups:
        return conclude(
            numbers,
            "No finished run has log-probs of single tokens: they are stored at the end of a run with held-out examples, if the reference was "
            "scored with score.logps.",
        )
    sentences = [
        f"In run {group['run']}, {group['share_of_top']:.0%} of what moved is on {len(group['top'])} tokens: {list_names([repr(token) for token in group['top']])}."
        for group in groups
    ]
    return conclude(
        numbers,
        *sentences,
        f"This covers only the {count(numbers['examples'], 'held-out example')} that moved most, the right way and the wrong way "
        f"({count(numbers['places'], 'token')}), so take it as a hint. If these are openings, ends and line breaks, the run learns form rather than "
        "content: read the examples (prefcache show EXAMPLE).",
    )


@judge
def large_margin(numbers: Numbers, values: Values) -> Verdict:
    return _describe_selection(numbers, "a preference of {:.3g} or more", numbers["lowest"])


@judge
def small_gap(numbers: Numbers, values: Values) -> Verdict:
    return _describe_selection(numbers, "a gap of {:.3g} or less", numbers["highest"])


def _describe_selection(numbers: Numbers, bound: str, value: float | None) -> Verdict:
    if verdict := without_pairs(numbers) or without_runs(numbers):
        return verdict
    if not numbers["kept"] or value is None:
        return conclude(numbers, f"Run {numbers['run']} has no rewards of training pairs.")
    is_partial = numbers["rewarded"] < numbers["examples"]
    others = f" that run {numbers['run']} has rewards of, among {numbers['examples']:,}," if is_partial else ""
    once = (
        "Each was visited once, the first of them by a policy that had hardly been trained, so their rewards do not compare well: use a run of two "
        "epochs or more."
        if (numbers["epochs"] or 0) <= 1
        else ""
    )
    return conclude(
        numbers,
        f"{numbers['kept']:,} of {count(numbers['rewarded'], 'training pair')}{others} are kept, those with {bound.format(value)} by run "
        f"{numbers['run']}.",
        once,
        "Save them (--out FILE) and train with train.only=FILE; train once on all pairs too, to see whether it helps.",
    )
