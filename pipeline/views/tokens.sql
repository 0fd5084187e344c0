-- Single tokens of the answers of the few held-out examples that each run moved most, four the right way and four the wrong way: the log-probs of policy (after the last step) and reference, and their difference. A token that does not count has none. `place` is where it is in the answer, from 0.
with listed as (
    select
        runs.run,
        tokens.example_id,
        tokens.answer,
        unnest(range(len(tokens.tokens))) as place,
        unnest(tokens.tokens) as token,
        unnest(tokens.logps) as logp,
        unnest(tokens.ref_logps) as ref_logp
    from stored.tokens join stored.runs on parse_dirpath(tokens.filename) = runs.folder
)

select
    run,
    example_id,
    answer,
    place,
    token,
    logp,
    ref_logp,
    logp - ref_logp as log_ratio
from listed
