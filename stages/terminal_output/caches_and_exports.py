"""Caches and the files made from them or read into them."""

from prefcache import command_results
from prefcache.pipeline.stored.cache_maintenance import CollectedCache
from prefcache.pipeline.visible_text import count, format_bytes
from prefcache.row_layout import print_table
from prefcache.terminal_output.console import open_console, say


def print_export(result: command_results.ExportResult) -> None:
    say(f"{result.output}: {count(result.rows, 'row')}, {result.scored:,} with all log-probs")
    for reason, n in result.without.items():
        say(f"  {n:,} {reason}")


def print_trl_export(result: command_results.TrlExportResult) -> None:
    say(f"{result.output}: {count(result.rows, 'row')}, of which TRL makes the ids that were scored")
    for reason, n in result.left_out.items():
        first = f" (the first: {result.first[reason]})" if reason in result.first else ""
        say(f"  {n:,} left out: {reason}{first}")
    for reason, n in result.quarantined.items():
        say(f"  {n:,} in quarantine: {reason}")
    if result.kl_scored is not None:
        say(f"  {result.kl_scored:,} have a mismatched answer that is scored, as KTOTrainer makes it")
    say(f"TRL's settings: {', '.join(f'{name}={value!r}' for name, value in result.settings.items())}")
    if result.chat_template:
        say(f"TRL's tokenizer needs this chat template: {result.chat_template}")


def print_import(result: command_results.ImportResult) -> None:
    per_token = f", {result.with_tokens:,} of them per token" if result.with_tokens else ""
    say(f"{result.cache}: {count(result.imported, 'sequence')} imported as {result.numerics_id}{per_token}")
    for reason, n in result.refused.items():
        say(f"  {n:,} refused, {reason}")
    left = f", which computes {result.left:,} others" if result.left else ""
    say(f"Score and train with them: {result.use}{left}")


def print_parity(result: command_results.ParityResult) -> None:
    console, deviations, margins = open_console(), result.deviations, result.margins
    say(f"{result.a} and {result.b}: {deviations.tokens:,} tokens of {deviations.sequences:,} sequences, in nats")
    rows = []
    for label, quantiles in (("per token", deviations.token), ("per sequence (sum)", deviations.sequence)):
        values = (quantiles.p50, quantiles.p99, quantiles.max)
        rows.append([label, *("-" if value is None else f"{value:.2e}" for value in values)])
    print_table(console, ["deviation", ">p50", ">p99", ">max"], rows)
    if deviations.bias is not None:
        say(f"bias: {deviations.bias:+.2e} nats per token (the first minus the second)")
    if deviations.not_finite:
        say(f"{deviations.not_finite:,} tokens have no finite value on one side")
    if margins.pairs:
        say(f"margins: {margins.flipped:,} of {margins.pairs:,} change sign")
    rows = [
        [each.example_id, each.answer, str(each.position), repr(each.token), f"{each.a:.6f}", f"{each.b:.6f}"]
        for each in result.worst
    ]
    print_table(console, ["furthest apart", "answer", ">position", "token", ">first", ">second"], rows)


def print_verify(result: command_results.VerifyResult) -> None:
    for cache in result.caches:
        # On a line of its own, so that a long name can be copied whole.
        say(cache.place)
        counts = {
            "shards": cache.shards,
            "rows": cache.rows,
            "failed": cache.failed,
            "doubled": cache.doubled,
            "bytes": cache.n_bytes,
            "orphans": cache.orphans,
            "leftovers": cache.leftovers,
            "damaged": len(cache.damaged),
        }
        print_table(open_console(), [f">{name}" for name in counts], [[f"{n:,}" for n in counts.values()]])
    _print_damage(result)


def print_gc(result: command_results.GcResult) -> None:
    would = "would be " if result.dry_run else ""
    for cache in result.caches:
        if cache.features_bytes is not None:
            _print_features(cache, would)
        if not (cache.merged or cache.superseded or cache.orphans or cache.leftovers):
            if cache.features_bytes is None:
                say(f"{cache.place}: nothing to do, {count(cache.shards, 'shard')}")
            continue
        say(
            f"{cache.place}: {count(cache.merged, 'shard')} {would}merged into {cache.into:,}; {would}removed: "
            f"{cache.superseded:,} that others replace, {cache.orphans:,} without a record, "
            f"{count(cache.leftovers, 'leftover')}, {count(cache.doubled, 'doubled row')}. "
            f"{count(cache.shards, 'shard')} in all"
        )
        if cache.kept:
            say(
                f"  {count(cache.kept, 'shard')} without a record {would}kept for a day: a scorer or a reader may still want them"
            )
    _print_damage(result)


def _print_features(cache: CollectedCache, would: str) -> None:
    size, days = format_bytes(cache.features_bytes or 0), count(int(cache.unused_days), "day")
    if cache.removed:
        say(f"{cache.place}: {would}removed, {size} of features of pictures, which no command has opened for {days}")
    else:
        last = f"{days} ago" if cache.unused_days >= 1 else "less than a day ago"
        say(f"{cache.place}: {size} of features of pictures, last opened {last}")


def print_sign(result: command_results.SignResult) -> None:
    for cache in result.caches:
        already = f", {cache.already:,} were already" if cache.already else ""
        say(f"{cache.place}: {count(cache.signed, 'shard')} signed by {result.key}{already}")


def print_publish_plan(plan: command_results.PublishPlan) -> None:
    say(f"{plan.hub}: {count(plan.rows, 'row')} in {count(plan.shards, 'shard')}, {plan.bytes:,} bytes would be sent")
    if plan.rewritten:
        say(f"  {count(plan.rewritten, 'shard')} written anew, without the rows of other data")
    print_table(open_console(), ["file", ">bytes"], [[name, f"{size:,}"] for name, size in plan.files.items()])


def print_publish(result: command_results.PublishResult) -> None:
    plan = result.plan
    say(f"{count(plan.rows, 'row')} in {count(plan.shards, 'shard')}, {plan.bytes:,} bytes: {result.url}")
    say(f"  commit {result.commit}")


def print_fetch_plan(plan: command_results.FetchPlan) -> None:
    has = f"{plan.source} has {plan.rows:,} of {count(plan.needed, 'sequence')} that {plan.cache} lacks"
    say(f"{has}: {count(plan.shards, 'shard')}, {plan.bytes:,} bytes")
    _print_origin(plan)


def print_fetch(result: command_results.FetchResult) -> None:
    plan = result.plan
    if not plan.rows:
        none = (
            f"{plan.source} has none of {count(plan.needed, 'missing sequence')}"
            if plan.needed
            else "nothing is missing"
        )
        say(f"{plan.cache}: {none}")
        return
    say(f"{plan.cache}: {count(plan.rows, 'sequence')} of {plan.needed:,} missing ones taken from {plan.source}")
    _print_origin(plan)
    if result.deviation is not None:
        say(f"  {count(result.compared, 'sequence')} compared: within {result.deviation:.1e} nats per token")
    if result.use:
        say(f"Score and train with them: {result.use}")


def _print_origin(plan: command_results.FetchPlan) -> None:
    for numerics_id, n in plan.numerics.items():
        say(f"  {n:,} computed as {numerics_id}")
    if plan.signers is not None:
        say(f"  signed by {', '.join(plan.signers)}")


def _print_damage(result: command_results.VerifyResult | command_results.GcResult) -> None:
    for cache in result.caches:
        for file, reason in cache.damaged.items():
            names_itself = reason.startswith(cache.place)
            say(f"damaged: {reason if names_itself else f'{cache.place}/{file}: {reason}'}")
