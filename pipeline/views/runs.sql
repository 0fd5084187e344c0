-- Training runs, finished or not: loss, settings, what they started from and how far they came.
select
    run,
    finished,
    loss,
    beta,
    per_token,
    learning_rate,
    batch_size,
    epochs,
    seed,
    policy,
    model_id,
    precision,
    device,
    processes,
    examples,
    held_out,
    steps,
    seconds,
    settings
from stored.runs
