-- Training runs, finished or not: loss, settings, starting model and progress.
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
