-- What became of the pairs of each run: right at every visit, learnt, forgotten, back and forth, or never right.
with pairs_of_runs as (
    select
        run,
        split,
        min(step) filter (where margin > 0) as first_right,
        max(step) filter (where margin > 0) as last_right,
        min(step) filter (where margin <= 0) as first_wrong,
        max(step) filter (where margin <= 0) as last_wrong
    from steps
    -- Before the first step policy and reference mostly agree, and there is nothing to be right about; nor has there been at a
    -- visit whose margin is still exactly 0.
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
