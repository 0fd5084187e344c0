-- The hardest and easiest sources of each run, by the share of pairs with the correct sign at their last visit.
select
    run,
    source,
    rewards.split,
    count(*) as pairs,
    avg(correct::int) as correct,
    avg(rewards.margin) as reward_margin,
    avg(pairs.margin) as reference_margin
from rewards join pairs using (example_id)
where used
group by run, source, rewards.split
order by run, rewards.split, correct, source
