-- Pairs that a run never gets right, forgets, or gets wrong at its last visit, the worst first.
-- run = null: a run; null means all runs
-- limit = 20: most rows to list
with visited as (
    select
        run,
        example_id,
        count(*) as visits,
        bool_or(margin > 0) as ever_right,
        max_by(margin, step) as margin
    from steps
    -- A margin of exactly 0 means that the policy is still its reference: nothing could have been learnt yet.
    where margin <> 0 and step > 0 and ($run is null or run = $run)
    group by run, example_id
)

select
    run,
    example_id,
    source,
    line,
    visits,
    if(ever_right, 'forgotten', 'never right') as became,
    margin,
    left(prompt, 60) as prompt
from visited join examples using (example_id)
where margin <= 0
order by margin, run, example_id
