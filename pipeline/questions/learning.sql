-- What became of the pairs of each run: right at every visit, learnt, forgotten, back and forth, or never right.
with visits as (
    select
        run,
        split,
        example_id,
        margin > 0 as is_right,
        lag(margin > 0) over (partition by run, example_id order by step) as was_right,
        step
    from steps
    -- Before the first step policy and reference mostly agree, and there is nothing to be right about.
    where margin is not null and step > 0
),

pairs_of_runs as (
    select
        run,
        split,
        example_id,
        max_by(is_right, step) as ends_right,
        bool_and(is_right) as always_right,
        bool_or(is_right) as ever_right,
        count_if(is_right <> was_right) as n_changes
    from visits
    group by run, split, example_id
)

select
    run,
    split,
    case
        when always_right then 'always right'
        when not ever_right then 'never right'
        when n_changes > 1 then 'back and forth'
        when ends_right then 'learnt'
        else 'forgotten'
    end as became,
    count(*) as pairs,
    count(*) / sum(count(*)) over (partition by run, split) as share
from pairs_of_runs
group by run, split, became
order by run, split, pairs desc
