-- Cached log-probs of the reference: one row per scored sequence and numerics; join its key with the keys of examples.
with named as (
    select cached.*, references_.reference
    from cached join references_ on starts_with(cached.filename, references_.folder)
    qualify row_number() over (partition by key, numerics_id order by logp_sum nulls last, cached.filename) = 1
)

select
    reference,
    lower(hex(key)) as key,
    n_prompt,
    n_completion,
    logp_sum,
    logp_sum / n_completion as logp_per_token,
    logps,
    numerics_id,
    status
from named
