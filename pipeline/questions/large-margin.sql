-- For train.only: the training pairs that are clearest to the data's own grades and to a run's implicit rewards together (after arXiv 2502.14560, which keeps a tenth). Of data without grades, to the rewards alone. A pair's are those of its last visit: in a first epoch the early ones are of a policy that has learnt less.
-- run = null: the run whose rewards are taken; where it is null, the one that comes first by name
-- share = 0.1: of the training pairs
with margins as (
    select example_id, rewards.margin as implicit, score_gap as external
    from rewards join pairs using (example_id)
    where
        used and rewards.split = 'train' and rewards.margin is not null
        and run = coalesce($run, (select min(run) from steps))
),

-- As in the paper, a range of margins is stretched to probabilities: from the lowest hundredth to the highest.
ranges as (
    select
        quantile_cont(implicit, [0.01, 0.99]) as of_rewards,
        quantile_cont(external, [0.01, 0.99]) as of_grades
    from margins
),

believed as (
    select
        example_id,
        implicit,
        external,
        (implicit - of_rewards[1]) / nullif(of_rewards[2] - of_rewards[1], 0) as by_rewards,
        (external - of_grades[1]) / nullif(of_grades[2] - of_grades[1], 0) as by_grades
    from margins cross join ranges
),

-- Of independent witnesses the odds multiply. One that says nothing has even odds.
together as (
    select
        example_id,
        implicit,
        external,
        greatest(0.01, least(0.99, coalesce(by_rewards, 0.5))) as p_rewards,
        greatest(0.01, least(0.99, coalesce(by_grades, 0.5))) as p_grades,
        p_rewards / (1 - p_rewards) as odds_of_rewards,
        p_grades / (1 - p_grades) as odds_of_grades,
        odds_of_rewards * odds_of_grades / (1 + odds_of_rewards * odds_of_grades) as preference
    from believed
)

select example_id, preference, implicit, external
from together
where preference >= (select quantile_disc(preference, 1 - $share) from together)
order by preference desc, example_id
