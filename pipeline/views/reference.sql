-- Cached log-probs, one row per sequence, reference and numerics. Join its key with the keys in examples. `used` marks the rows that this experiment's runs read.
with named as (
    select cached.*, caches.reference, caches.model_id
    from stored.cached join stored.caches on parse_dirpath(cached.filename) = caches.folder
),

-- Two scorers that ran at the same time may both have written a sequence.
single as (
    select * from named
    qualify row_number() over (partition by model_id, key, numerics_id order by logp_sum nulls last, filename) = 1
)

select
    reference,
    model_id,
    lower(hex(key)) as key,
    n_prompt,
    n_completion,
    logp_sum,
    logp_sum / n_completion as logp_per_token,
    logps,
    status,
    numerics_id,
    numerics.engine,
    numerics.dtype,
    numerics.numerics,
    coalesce(numerics.used, false) as used
from single left join stored.numerics using (model_id, numerics_id)
