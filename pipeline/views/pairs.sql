-- Pairs with the reference's log-probs and margin, one row for each reference that scored them. With several references, `where used` selects the one that this experiment's runs read. train.where can use the computed columns.
select
    reference,
    model_id,
    used,
    example_id,
    split,
    source,
    line,
    prompt,
    chosen,
    rejected,
    /* data columns of pairs */
    n_prompt,
    n_chosen,
    n_rejected,
    boundary,
    cut_prompt,
    cut_chosen,
    cut_rejected,
    lower(hex(chosen_key)) as chosen_key,
    lower(hex(rejected_key)) as rejected_key,
    ref_chosen_logp,
    ref_rejected_logp,
    ref_chosen_logp - ref_rejected_logp as margin,
    ref_chosen_logp / n_chosen - ref_rejected_logp / n_rejected as margin_per_token,
    n_chosen - n_rejected as length_difference,
    chosen_score - rejected_score as score_gap
from stored.scored
