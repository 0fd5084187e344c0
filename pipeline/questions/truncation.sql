-- What the length limits removed, by source: records in quarantine because they are too long (prepare.too_long: drop), prompts and answers that were cut, and whether the reference's margins differ between cut and whole pairs. For labels, chosen stands for the good answers and rejected for the bad ones.
with lengths as (
    select
        source,
        cut_prompt,
        coalesce(cut_chosen, if(label, cut_completion, 0)) as cut_chosen,
        coalesce(cut_rejected, if(label, 0, cut_completion)) as cut_rejected,
        n_prompt + coalesce(n_chosen + n_rejected, n_completion) as n_kept
    from examples
),

prepared as (
    select
        source,
        count(*) as examples,
        count_if(cut_prompt > 0) as prompts_cut,
        count_if(cut_chosen > 0) as chosen_cut,
        count_if(cut_rejected > 0) as rejected_cut,
        sum(cut_prompt + cut_chosen + cut_rejected)::bigint as tokens_cut,
        tokens_cut / (sum(n_kept) + tokens_cut) as share_cut
    from lengths
    group by source
),

dropped as (
    select
        source,
        count(distinct line) as records_dropped,
        count(distinct line) filter (where reason = 'prompt too long') as of_long_prompts
    from quarantine
    where reason in ('too long', 'prompt too long')
    group by source
),

margins as (
    select
        source,
        avg(if(cut_prompt + cut_chosen + cut_rejected > 0, margin_per_token, null)) as margin_per_token_of_cut,
        avg(if(cut_prompt + cut_chosen + cut_rejected = 0, margin_per_token, null)) as margin_per_token_of_whole
    from pairs
    where used
    group by source
)

select
    source,
    coalesce(examples, 0) as examples,
    coalesce(records_dropped, 0) as records_dropped,
    coalesce(of_long_prompts, 0) as of_long_prompts,
    coalesce(prompts_cut, 0) as prompts_cut,
    coalesce(chosen_cut, 0) as chosen_cut,
    coalesce(rejected_cut, 0) as rejected_cut,
    coalesce(tokens_cut, 0) as tokens_cut,
    share_cut,
    margin_per_token_of_cut,
    margin_per_token_of_whole
from prepared full join dropped using (source) left join margins using (source)
order by records_dropped desc, share_cut desc, source
-- verdict
with long as (
    -- A record may have several answers that are too long.
    select
        max(n_limit) as n_limit,
        max(n_tokens) as n_tokens,
        bool_or(detail like '%prepare.max_prompt_length') as is_of_prompt_limit
    from quarantine
    where reason in ('too long', 'prompt too long')
    group by source, line
)

select
    coalesce(sum(examples), 0)::bigint as examples,
    coalesce(sum(records_dropped), 0)::bigint as dropped,
    coalesce(sum(prompts_cut), 0)::bigint as prompts_cut,
    coalesce(sum(chosen_cut), 0)::bigint as chosen_cut,
    coalesce(sum(rejected_cut), 0)::bigint as rejected_cut,
    coalesce(sum(tokens_cut), 0)::bigint as tokens_cut,
    (select max(n_limit) from long where n_tokens is not null and not is_of_prompt_limit) as n_limit,
    (select count_if(n_tokens <= 2 * n_limit and not is_of_prompt_limit) from long) as kept_at_twice,
    (select max(n_tokens) from long where not is_of_prompt_limit) as longest,
    (select max(n_limit) from long where is_of_prompt_limit) as n_prompt_limit,
    (select count_if(is_of_prompt_limit) from long) as dropped_by_prompt_limit,
    list({source: source, n: examples + records_dropped, n_dropped: records_dropped}) as groups
from answer
