-- Checkpoints of every run, from which it can go on: their step, the tokens trained on by then, size and folder.
select
    run,
    step,
    num_tokens,
    bytes,
    folder
from stored.checkpoints
