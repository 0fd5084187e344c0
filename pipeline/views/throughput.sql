-- The speed of each step of every run, and the peak memory of its process so far (on a GPU, the GPU's).
-- flops: the arithmetic of the forward and backward passes in the first process. mfu: its share of what the GPU could do.
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
