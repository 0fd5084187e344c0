-- The checkpoints on disk, from which a run resumes: step, tokens trained on so far, size and folder. A finished run keeps none by default.
select
    run,
    step,
    num_tokens,
    bytes,
    folder
from stored.checkpoints
