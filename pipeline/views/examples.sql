-- Prepared pairs: text, where it came from, lengths in tokens, and the keys of both sequences.
select
    example_id,
    split,
    source,
    line,
    prompt,
    chosen,
    rejected,
    n_prompt,
    n_chosen,
    n_rejected,
    boundary,
    lower(hex(chosen_key)) as chosen_key,
    lower(hex(rejected_key)) as rejected_key
from prepared
