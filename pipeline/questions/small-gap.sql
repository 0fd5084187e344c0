-- For train.only: the training pairs that a run finds hardest, by the smallest gap between their implicit rewards (arXiv 2508.04149, which keeps a tenth). Rewards are those of a pair's last visit; after a first epoch, pairs visited early have rewards of a less trained policy.
-- run = null: the run whose rewards are used; null means the first by name
-- share = 0.1: share of the training pairs to keep
with gaps as (
    select example_id, margin as gap
    from rewards
    where
        -- A gap of exactly 0 means that the policy is still its reference, which tells nothing about the pair.
        split = 'train' and margin <> 0
        and run = coalesce($run, (select min(run) from steps))
)

select example_id, gap
from gaps
where gap <= (select quantile_disc(gap, $share) from gaps)
order by gap, example_id
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
        where split = 'train' and margin <> 0 and run = coalesce($run, (select min(run) from steps))
    ) as rewarded,
    count(*) as kept,
    min(gap) as lowest,
    max(gap) as highest
from answer
