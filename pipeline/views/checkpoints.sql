-- The checkpoints that each run can resume from: step, tokens trained on so far, size and folder.
select
    run,
    step,
    num_tokens,
    bytes,
    folder
from stored.checkpoints
