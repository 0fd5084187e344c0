-- For train.only: the training pairs that a run finds hardest, by the smallest gap between their implicit rewards (arXiv 2508.04149, which keeps a tenth). A pair's are those of its last visit: in a first epoch the early ones are of a policy that has learnt less.
-- run = null: the run whose rewards are taken; where it is null, the one that comes first by name
-- share = 0.1: of the training pairs
with gaps as (
    select example_id, margin as gap
    from rewards
    where
        -- A gap of exactly 0 is of a policy that is still its reference, and says nothing of the pair.
        split = 'train' and margin <> 0
        and run = coalesce($run, (select min(run) from steps))
)

select example_id, gap
from gaps
where gap <= (select quantile_disc(gap, $share) from gaps)
order by gap, example_id
