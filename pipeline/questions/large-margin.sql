-- For train.only: the training pairs with the clearest preference by the data's grades and a run's implicit rewards together (after arXiv 2502.14560, which keeps a tenth). Without grades, by the rewards alone. Rewards are those of a pair's last visit; after a first epoch, pairs visited early have rewards of a less trained policy.
-- run = null: the run whose rewards are used; null means the first by name
-- share = 0.1: share of the training pairs to keep
with margins as (
    select example_id, rewards.margin as implicit, score_gap as external
    from rewards join pairs using (example_id)
    where
        used and rewards.split = 'train' and rewards.margin is not null
        and run = coalesce($run, (select min(run) from steps))
),

-- As in the paper, margins are scaled to probabilities: the 1st percentile becomes 0, the 99th becomes 1.
ranges as (
    select
        quantile_cont(implicit, [0.01, 0.99]) as of_rewards,
        quantile_cont(external, [0.01, 0.99]) as of_grades
    from margins
),

scaled as (
    select
        example_id,
        implicit,
        external,
        (implicit - of_rewards[1]) / nullif(of_rewards[2] - of_rewards[1], 0) as by_rewards,
        (external - of_grades[1]) / nullif(of_grades[2] - of_grades[1], 0) as by_grades
    from margins cross join ranges
),

-- The odds of independent sources multiply. A source without a value has even odds.
combined as (
    select
        example_id,
        implicit,
        external,
        greatest(0.01, least(0.99, coalesce(by_rewards, 0.5))) as p_rewards,
        greatest(0.01, least(0.99, coalesce(by_grades, 0.5))) as p_grades,
        p_rewards / (1 - p_rewards) as odds_of_rewards,
        p_grades / (1 - p_grades) as odds_of_grades,
        odds_of_rewards * odds_of_grades / (1 + odds_of_rewards * odds_of_grades) as preference
    from scaled
)

select example_id, preference, implicit, external
from combined
where preference >= (select quantile_disc(preference, 1 - $share) from combined)
order by preference desc, example_id
-- verdict
select
    (select count(*) from examples where split = 'train') as examples,
    (select count(label) from examples) as labels,
    (select count(*) from runs) as runs,
    coalesce($run, (select min(run) from steps)) as run,
    -- Of the run's visits: at most 1 if each example was visited once.
    (
        select max(epoch)
        from steps
        where split = 'train' and run = coalesce($run, (select min(run) from steps))
    ) as epochs,
    (
        select count(*)
        from rewards
        where split = 'train' and margin is not null and run = coalesce($run, (select min(run) from steps))
    ) as rewarded,
    count(*) as kept,
    min(preference) as lowest,
    max(preference) as highest
from answer
