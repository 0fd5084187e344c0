-- Alerts of every run, in the order of its steps: what was seen, why it matters and what to try.
select
    runs_.run,
    events.step,
    events.kind,
    events.severity,
    events.metric,
    events.value,
    events.seen,
    events.why,
    events."try"
from events join runs_ on starts_with(events.filename, runs_.folder)
order by runs_.run, events.step, events.kind
