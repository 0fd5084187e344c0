-- Pairs whose rejected answer is likelier per token under the reference, the clearest first.
-- limit = 20: most rows to list
select
    example_id,
    source,
    line,
    margin_per_token,
    margin,
    n_chosen_counted,
    n_rejected_counted,
    left(prompt, 60) as prompt
from pairs
where used and margin_per_token < 0
order by margin_per_token, example_id
