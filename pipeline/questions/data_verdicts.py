"""Verdicts about the data: what is in it, what was left out, and what it costs to read."""

from prefcache.pipeline.questions.verdict import (
    Numbers,
    Share,
    Values,
    Verdict,
    conclude,
    find_worst,
    judge,
    without_pairs,
)
from prefcache.pipeline.visible_text import count

_LEAVE_OUT = "leave them out with train.where, as example_id not in ('...', '...')"


@judge
def length_bias(numbers: Numbers, values: Values) -> Verdict:
    if verdict := without_pairs(numbers):
        return verdict
    if not numbers["differ"]:
        pairs = count(numbers["pairs"], "pair")
        return conclude(numbers, f"Both answers have the same length in all {pairs}: there is no length bias.")
    longer = Share(numbers["longer"], numbers["differ"])
    n_equal = numbers["pairs"] - numbers["differ"]
    equal = f", not counting {n_equal:,} whose answers are equally long" if n_equal else ""
    found, facts = f"The longer answer wins in {longer.of('pair')}{equal}", longer.numbers("longer_wins")
    if longer.is_too_few:
        return conclude(numbers, f"{found}: too few to say whether there is a length bias.", **facts)
    most_biased = _name_most_biased(numbers["sources"], longer)
    # Twice the distance from one half is the share of pairs that length decides beyond chance.
    beyond_chance, at_most = (
        2 * max(abs(value - 0.5) for value in values)
        for values in ([longer.estimate.value], [longer.estimate.low, longer.estimate.high])
    )
    if not longer.excludes(0.5) and at_most >= 0.1:
        return conclude(numbers, f"{found}: no length bias can be told from so few.", most_biased, **facts)
    if beyond_chance < 0.1:
        return conclude(numbers, f"{found}: no length bias worth acting on.", most_biased, **facts)
    strength = "strong" if beyond_chance >= 0.3 else "clear"
    which = "longer" if longer.estimate.value > 0.5 else "shorter"
    return conclude(
        numbers,
        f"{found}: the bias towards {which} answers is {strength}.",
        most_biased,
        "Try train.loss=sigmoid_norm, which divides by length, or train.loss=r_dpo, which takes the difference in length off the margin, and "
        "see after training whether rewards follow length (prefcache ask reward-hacking).",
        **facts,
    )


def _name_most_biased(sources: list[Numbers], longer: Share) -> str:
    worst = find_worst(
        sources,
        lambda source, n: Share(source["longer"], source["differ"], n),
        longer,
        high_is_worse=longer.estimate.value >= 0.5,
    )
    return f"It is most so in {worst[0]['source']}: {worst[1].of('pair')}." if worst else ""


@judge
def contradictions(numbers: Numbers, values: Values) -> Verdict:
    if verdict := without_pairs(numbers):
        return verdict
    pairs, found = numbers["pairs"], numbers["contradictory"]
    if not found:
        return conclude(numbers, f"No pair contradicts another among {pairs:,}.")
    share = Share(found, pairs)
    return conclude(
        numbers,
        f"{found:,} of {count(pairs, 'pair')} ({share.percent}) contradict another one: the same prompt and answers, preferred the other "
        "way round. Together they teach nothing. Find out which side is right and remove the other from the data, or "
        f"{_LEAVE_OUT}.",
        share=share.estimate.value,
    )


@judge
def duplicates(numbers: Numbers, values: Values) -> Verdict:
    examples, copies = numbers["examples"], numbers["copies"]
    if not copies:
        return conclude(numbers, f"No example occurs twice among {examples:,}.")
    share = Share(copies, examples)
    return conclude(
        numbers,
        f"{count(copies, 'example')} of {examples:,} ({share.percent}) {'repeats' if copies == 1 else 'repeat'} an earlier one, ignoring "
        "case and surrounding blanks. Each is trained on as often as it occurs; prepare.duplicates=drop keeps one of those with the same "
        "tokens.",
        share=share.estimate.value,
    )


@judge
def near_identical(numbers: Numbers, values: Values) -> Verdict:
    if verdict := without_pairs(numbers):
        return verdict
    pairs, alike = numbers["pairs"], numbers["alike"]
    words = f"at least {values['similarity']:.0%} of their words in common"
    if not alike:
        return conclude(numbers, f"In none of {count(pairs, 'pair')} do the answers have {words}.")
    share = Share(alike, pairs)
    return conclude(
        numbers,
        f"In {share.count_of('pair')} the answers have {words}. What differs may be noise: read the pairs (prefcache show EXAMPLE) and "
        f"{_LEAVE_OUT}. If the small difference is what matters, as in corrected code, train.loss=dpop is made for such pairs: other "
        "losses can make both answers less likely.",
        **share.numbers("share"),
    )


@judge
def truncation(numbers: Numbers, values: Values) -> Verdict:
    n_cut = numbers["prompts_cut"] + numbers["chosen_cut"] + numbers["rejected_cut"]
    if not numbers["dropped"] and not n_cut:
        return conclude(
            numbers, f"Nothing was removed: all {count(numbers['examples'], 'example')} are within the length limits."
        )
    return conclude(numbers, _describe_dropped(numbers), _describe_cut(numbers) if n_cut else "")


def _describe_dropped(numbers: Numbers) -> str:
    if not (dropped := numbers["dropped"]):
        return ""
    share = Share(dropped, numbers["examples"] + dropped)
    found = f"{count(dropped, 'record')} of {share.n:,} ({share.percent}) {'is' if dropped == 1 else 'are'} left out as too long."
    worst = find_worst(numbers["groups"], lambda source, n: Share(source["n_dropped"], source["n"], n), share)
    where = f"Most are lost in {worst[0]['source']}: {worst[1].of('record')}." if worst else ""
    limit = numbers["n_limit"]
    raised = (
        f"A limit of {2 * limit:,} tokens instead of {limit:,} would keep {numbers['kept_at_twice']:,} of them; the longest that was "
        f"counted has {numbers['longest']:,}."
        if limit
        else ""
    )
    of_prompts = numbers["dropped_by_prompt_limit"]
    prompts = (
        f"The prompt alone is longer than prepare.max_prompt_length={numbers['n_prompt_limit']:,} in {count(of_prompts, 'record')}: raise it."
        if of_prompts
        else ""
    )
    advice = (
        "Raise prepare.max_length, or cut the ends of answers (prepare.too_long=keep_start) or the oldest turns (keep_end)."
        if dropped > of_prompts
        else ""
    )
    return " ".join(filter(None, (found, where, prompts, raised, advice)))


def _describe_cut(numbers: Numbers) -> str:
    parts = [
        count(numbers["prompts_cut"], "prompt") if numbers["prompts_cut"] else "",
        count(numbers["chosen_cut"], "chosen answer") if numbers["chosen_cut"] else "",
        count(numbers["rejected_cut"], "rejected answer") if numbers["rejected_cut"] else "",
    ]
    cut = " and ".join(filter(None, parts))
    ends = (
        " An answer without its end teaches the model to go on: raise prepare.max_length."
        if numbers["chosen_cut"] or numbers["rejected_cut"]
        else ""
    )
    return f"{cut} of {count(numbers['examples'], 'example')} lost {count(numbers['tokens_cut'], 'token')}.{ends}"


@judge
def turns(numbers: Numbers, values: Values) -> Verdict:
    examples, several = numbers["examples"], numbers["of_several_turns"]
    if not examples:
        return conclude(numbers, "Nothing is prepared.")
    if not several:
        return conclude(
            numbers,
            f"Every answer of {count(examples, 'example')} counts as one turn; {numbers['share_counted']:.0%} of the answers' tokens count.",
        )
    share = Share(several, examples)
    return conclude(
        numbers,
        f"{count(several, 'example')} of {examples:,} ({share.percent}) {'has an answer' if several == 1 else 'have answers'} of several "
        f"turns, up to {numbers['most_turns']}; {numbers['share_counted_of_these']:.0%} of their tokens count. Check with prefcache show "
        "EXAMPLE that these are the model's own words; prepare.train_on=last_turn counts the last turn alone and scores nothing again.",
        share=share.estimate.value,
    )


@judge
def cost(numbers: Numbers, values: Values) -> Verdict:
    if not numbers["examples"]:
        return conclude(numbers, "Nothing is prepared.")
    saved = 1 - numbers["tokens_to_read"] / numbers["tokens"]
    return conclude(
        numbers,
        f"Scoring {count(numbers['sequences'], 'sequence')} reads {numbers['tokens_to_read']:,} tokens{_count_image_tokens(numbers)} once, for every run, loss and seed: {saved:.0%} "
        f"less than the {numbers['tokens']:,} of all prompts and answers, because shared prompts and repeated sequences count once. prefcache "
        "score CONFIG --dry-run says how many of them the cache has already.",
        saved=saved,
    )


def _count_image_tokens(numbers: Numbers) -> str:
    return f" ({numbers['image_tokens']:,} of them stand for images)" if numbers["image_tokens"] else ""


@judge
def training_cost(numbers: Numbers, values: Values) -> Verdict:
    if not numbers["examples"]:
        return conclude(numbers, "There are no training examples.")
    saved = 1 - numbers["tokens_shared"] / numbers["tokens_unshared"]
    n_epochs = f"{values['epochs']:g} epoch{'' if values['epochs'] == 1 else 's'}"
    kl = (
        f" Losses that read mismatched answers (kto) read {numbers['kl_tokens']:,} more."
        if numbers["kl_tokens"]
        else ""
    )
    sharing = (
        f"; {numbers['tokens_unshared']:,} without sharing prompts, which saves {saved:.0%}"
        if numbers["tokens_unshared"] > numbers["tokens_shared"]
        else ""
    )
    return conclude(
        numbers,
        f"Training for {n_epochs} on {count(numbers['examples'], 'example')} reads {numbers['tokens_shared']:,} tokens"
        f"{_count_image_tokens(numbers)}{sharing}. {numbers['tokens_counted']:,} of the answers' tokens count in the loss.{kl} Evaluation comes on top. prefcache train CONFIG --dry-run "
        "turns this into memory and time.",
        saved=saved,
    )
