-- The metrics of every step of every run under their usual names ("rewards/margins"); held-out ones start with eval_. A metric that only some losses have ("loss/sft") is a column if any run has it, and empty for the others.
select
    runs.run,
    metrics.* exclude (filename)
from stored.metrics join stored.runs on parse_dirpath(parse_dirpath(metrics.filename)) = runs.folder
