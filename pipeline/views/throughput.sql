-- How fast each step of every run was, and the most memory that its process had taken by then (of the GPU where there is one).
-- flops: the arithmetic of its forwards and backwards, in its first process. mfu: which share that is of what its GPU could do.
select
    runs.run,
    timed.step,
    timed.seconds,
    timed.examples_per_second,
    timed.tokens_per_second,
    timed.peak_memory_bytes,
    timed.flops,
    timed.mfu
from stored.timed join stored.runs on parse_dirpath(parse_dirpath(timed.filename)) = runs.folder
