-- Answers in which several turns count, by source: how many there are, how much of them counts, and how much of its answers a pair shares. Where prepare.train_on is last_turn or all, every answer counts as one turn.
with answers as (
    select
        source,
        coalesce(n_chosen, n_completion) + coalesce(n_rejected, 0) as n,
        coalesce(n_chosen_counted, n_completion_counted) + coalesce(n_rejected_counted, 0) as n_counted,
        greatest(coalesce(n_chosen_turns, n_completion_turns), coalesce(n_rejected_turns, 0)) as turns,
        -- The beginning that both answers share is in each of them.
        2 * n_common as n_shared
    from examples
)

select
    source,
    count(*) as examples,
    count_if(turns > 1) as of_several_turns,
    max(turns) as most_turns,
    avg(if(turns > 1, turns, null)) as turns_of_these,
    sum(n_counted) / sum(n) as share_counted,
    sum(if(turns > 1, n_counted, null)) / sum(if(turns > 1, n, null)) as share_counted_of_these,
    sum(n_shared) / sum(n) as share_in_both
from answers
group by source
order by of_several_turns desc, source
-- verdict
select
    coalesce(sum(examples), 0)::bigint as examples,
    coalesce(sum(of_several_turns), 0)::bigint as of_several_turns,
    max(most_turns) as most_turns,
    sum(examples * share_counted) / sum(examples) as share_counted,
    sum(of_several_turns * share_counted_of_these) / nullif(sum(of_several_turns), 0) as share_counted_of_these
from answer
