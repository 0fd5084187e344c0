-- Prepared pairs and labels: texts, source and line, lengths in tokens and how many of them count (prepare.train_on), what truncation removed, and the keys of their sequences.
select
    example_id,
    split,
    source,
    line,
    prompt,
    chosen,
    rejected,
    /* data columns of pairs */
    completion,
    label,
    /* data columns of labels */
    n_prompt,
    n_chosen,
    n_rejected,
    n_completion,
    n_kl,
    n_chosen_counted,
    n_rejected_counted,
    n_completion_counted,
    n_kl_counted,
    n_common,
    boundary,
    cut_prompt,
    cut_chosen,
    cut_rejected,
    cut_completion,
    lower(hex(chosen_key)) as chosen_key,
    lower(hex(rejected_key)) as rejected_key,
    lower(hex(completion_key)) as completion_key,
    kl_of,
    lower(hex(kl_key)) as kl_key
from stored.prepared
