-- The sequences that the reference scores: one row for each answer of each example. Equal sequences have one key and are scored once.
with answers as (
    select *, 'chosen' as answer, chosen_key as key, n_chosen as n_answer, cut_chosen as n_cut, chosen as text
    from stored.prepared
    union all
    select *, 'rejected', rejected_key, n_rejected, cut_rejected, rejected from stored.prepared
    union all
    select *, 'completion', completion_key, n_completion, cut_completion, completion from stored.prepared
    union all
    -- A mismatched answer has the text of the example named in kl_of.
    select *, 'kl', kl_key, n_kl, null, null from stored.prepared
)

select
    lower(hex(key)) as key,
    example_id,
    split,
    source,
    line,
    answer,
    n_prompt,
    n_image_tokens,
    n_answer as n_completion,
    n_prompt + n_answer as n_tokens,
    cut_prompt,
    n_cut as cut_completion,
    text
from answers
where n_answer is not null
