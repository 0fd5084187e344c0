-- Examples that a run never gets right, forgets, or gets wrong at its last visit, the worst first. A pair is right if the chosen answer has the higher reward, a label if its reward has the right sign.
-- run = null: a run; null means all runs
-- limit = 20: most rows to list
with scored as (
    select run, split, example_id, step, coalesce(margin, if(label, completion_reward, -completion_reward)) as margin
    from steps
    where step > 0 and ($run is null or run = $run)
),

visited as (
    select
        run,
        any_value(split) as split,
        example_id,
        count(*) as visits,
        bool_or(margin > 0) as ever_right,
        max_by(margin, step) as margin
    from scored
    -- A margin of exactly 0 means that the policy is still its reference: nothing could have been learnt yet.
    where margin <> 0
    group by run, example_id
),

-- Only the texts of the examples to list are read.
worst as (
    select *
    from visited
    where margin <= 0
    order by margin, run, example_id
    limit $limit
)

select
    example_id,
    run,
    worst.split,
    source,
    line,
    visits,
    if(ever_right, 'forgotten', 'never right') as became,
    margin,
    shorten(prompt) as prompt
from worst join examples using (example_id)
order by margin, run, example_id
-- verdict
with scored as (
    select run, split, example_id, step, coalesce(margin, if(label, completion_reward, -completion_reward)) as margin
    from steps
    where step > 0 and ($run is null or run = $run)
),

visited as (
    select
        run,
        any_value(split) as split,
        count(*) as visits,
        max_by(margin, step) as margin
    from scored
    where margin <> 0
    group by run, example_id
),

by_split as (
    select run, split, count(*) as n, count_if(margin <= 0) as n_wrong, max(visits) as most_visits
    from visited
    group by run, split
)

select
    (select count(*) from runs where $run is null or run = $run) as runs,
    sum(n)::bigint as n,
    sum(n_wrong)::bigint as n_wrong,
    list(by_split) as groups
from by_split
