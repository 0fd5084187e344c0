-- What became of each run's pairs: always right, learnt, forgotten, back and forth, or never right.
with pairs_of_runs as (
    select
        run,
        split,
        min(step) filter (where margin > 0) as first_right,
        max(step) filter (where margin > 0) as last_right,
        min(step) filter (where margin <= 0) as first_wrong,
        max(step) filter (where margin <= 0) as last_wrong
    from steps
    -- Before the first step, and while a margin is exactly 0, policy and reference agree, so no pair is right or wrong yet.
    where margin <> 0 and step > 0
    group by run, split, example_id
)

select
    run,
    split,
    case
        when last_wrong is null then 'always right'
        when first_right is null then 'never right'
        when last_wrong < first_right then 'learnt'
        when last_right < first_wrong then 'forgotten'
        else 'back and forth'
    end as became,
    count(*) as pairs,
    count(*) / sum(count(*)) over (partition by run, split) as share
from pairs_of_runs
group by run, split, became
order by run, split, pairs desc, became
