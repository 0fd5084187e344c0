-- What became of each run's examples: always right, learnt, forgotten, back and forth, or never right. A pair is right if the chosen answer has the higher reward, a label if its reward has the right sign.
with visited as (
    select run, split, example_id, step, coalesce(margin, if(label, completion_reward, -completion_reward)) as margin
    from steps
    -- Before the first step policy and reference agree.
    where step > 0
),

examples_of_runs as (
    select
        run,
        split,
        count(*) as visits,
        min(step) filter (where margin > 0) as first_right,
        max(step) filter (where margin > 0) as last_right,
        min(step) filter (where margin <= 0) as first_wrong,
        max(step) filter (where margin <= 0) as last_wrong
    from visited
    -- While a margin is exactly 0, policy and reference still agree, so nothing is right or wrong yet.
    where margin <> 0
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
    count(*) as examples,
    count(*) / sum(count(*)) over (partition by run, split) as share,
    avg(visits) as visits
from examples_of_runs
group by run, split, became
order by run, split, examples desc, became
-- verdict
select
    (select count(*) from runs) as runs,
    list({run: run, split: split, became: became, n: examples, n_visits: round(examples * visits)::bigint}) as groups
from answer
