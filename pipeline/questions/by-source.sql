-- The hardest and easiest sources of each run, by the share of examples that are right at their last visit: the chosen answer has the higher reward, or a label's reward has the right sign.
with sourced as (
    select example_id, source, margin from pairs where used
    union all
    select example_id, source, null from examples where label is not null
)

select
    run,
    source,
    rewards.split,
    count(*) as examples,
    avg(correct::int) as correct,
    avg(rewards.margin) as reward_margin,
    avg(sourced.margin) as reference_margin
from rewards join sourced using (example_id)
group by run, source, rewards.split
order by run, rewards.split, correct, source
-- verdict
select
    (select max(epoch) from steps where split = 'train') as epochs,
    (select count(*) from runs) as runs,
    list({run: run, source: source, split: split, n: examples, n_right: round(examples * correct)::bigint})
        filter (where correct is not null) as groups
from answer
