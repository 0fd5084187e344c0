-- What truncation removed, by source: examples and tokens, and whether the reference's margins differ between cut and whole pairs.
select
    source,
    count(*) as pairs,
    count_if(cut_prompt > 0) as prompts_cut,
    count_if(cut_chosen > 0) as chosen_cut,
    count_if(cut_rejected > 0) as rejected_cut,
    sum(cut_prompt + cut_chosen + cut_rejected) as tokens_cut,
    sum(cut_prompt + cut_chosen + cut_rejected)
    / sum(n_prompt + n_chosen + n_rejected + cut_prompt + cut_chosen + cut_rejected) as share_cut,
    avg(if(cut_prompt + cut_chosen + cut_rejected > 0, margin_per_token, null)) as margin_per_token_of_cut,
    avg(if(cut_prompt + cut_chosen + cut_rejected = 0, margin_per_token, null)) as margin_per_token_of_whole
from pairs
where used
group by source
order by share_cut desc, source
