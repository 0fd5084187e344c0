"""What `prepare`, `score` and `report` did, in a few lines each."""

from prefcache import command_results
from prefcache.pipeline.stored.prepared import DONE
from prefcache.pipeline.visible_text import count, format_bytes
from prefcache.terminal_output.caches_and_exports import print_export
from prefcache.terminal_output.console import say


def print_waiting(result: command_results.PrepareWaiting) -> None:
    say(
        f"{result.prepared}: {result.finished:,} of {result.parts:,} parts are finished. The other machines (RANK, WORLD_SIZE) "
        "prepare the rest; whichever finishes last assembles the parts"
    )


def print_prepare(result: command_results.PrepareResult) -> None:
    counts = {"training": result.train, "held-out": result.held_out} | result.evaluation
    *others, last = (f"{n:,} {name}" for name, n in counts.items())
    say(
        f"{result.prepared}: {', '.join(others)} and {last} {result.kind} "
        f"of {result.records:,} records, {sum(result.quarantined.values()):,} in quarantine"
    )
    for reason, n in result.quarantined.items():
        say(f"  {n:,} {reason}")
    for name, n in result.done.items():
        if name in DONE:
            say(f"  {n:,} {DONE[name]}")
    if split := result.boundaries.get("split"):
        say(f"  {split:,} where the tokenizer would merge prompt and answer; the text was cut there (boundary: split)")
    if result.date:
        say(f"  the template prints the date: always {result.date} (prepare.date)")


def _cache_line(result: command_results.ScoreResult | command_results.ScorePlan) -> str:
    line = f"{result.cache}: {count(result.sequences, 'sequence')}, {result.cached_before:,} already cached"
    return line + (f" ({result.cut_from_longer:,} cut from longer ones)" if result.cut_from_longer else "")


def print_score(result: command_results.ScoreResult) -> None:
    others = f", {result.scored_by_others:,} by other scorers meanwhile" if result.scored_by_others else ""
    say(f"{_cache_line(result)}, {result.scored:,} scored now ({count(result.tokens, 'token')}){others}")
    if result.failed:
        say(f"  {result.failed:,} have no finite log-prob; pairs with them are left out of training")


def print_score_plan(plan: command_results.ScorePlan) -> None:
    tokens = f"{count(plan.tokens, 'token')}, at most {plan.bytes:,} bytes"
    say(f"{_cache_line(plan)}, {plan.to_score:,} to score ({tokens})")
    for numerics_id, n in plan.other_numerics.items():
        say(f"  {n:,} of these are cached under other numerics, {numerics_id}")


def print_score_files(result: command_results.ScoreFilesResult) -> None:
    if isinstance(result.scored, command_results.ScorePlan):
        print_score_plan(result.scored)
    else:
        print_score(result.scored)
    print_export(result.exported)


def print_report(result: command_results.ReportResult) -> None:
    say(f"{result.report}: {result.bytes:,} bytes")


def print_upload(result: command_results.UploadResult) -> None:
    say(
        f"{result.prepared}: {count(result.files, 'file')}, {format_bytes(result.bytes)}; {format_bytes(result.sent)} sent now"
    )
    # On a line of its own, so that it can be copied whole.
    say(result.url)


def print_download(result: command_results.DownloadResult) -> None:
    say(f"{result.prepared}: {result.examples:,} {result.kind}, {format_bytes(result.received)} received now")
