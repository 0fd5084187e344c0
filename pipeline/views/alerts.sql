-- The alerts of every run in the order of its steps: what was seen, why it matters and what to try.
select
    runs.run,
    events.step,
    events.kind,
    events.severity,
    events.metric,
    events.value,
    events.seen,
    events.why,
    events."try"
from stored.events join stored.runs on parse_dirpath(parse_dirpath(events.filename)) = runs.folder
order by runs.run, events.step, events.kind
