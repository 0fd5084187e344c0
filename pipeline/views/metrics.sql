-- Metrics of every step of every run under their usual names ("rewards/margins"), the held-out ones with eval_ before them. What a run's loss measures beside these ("loss/sft") is a column where any run has it, empty for the others.
select
    runs.run,
    metrics.* exclude (filename)
from stored.metrics join stored.runs on parse_dirpath(parse_dirpath(metrics.filename)) = runs.folder
