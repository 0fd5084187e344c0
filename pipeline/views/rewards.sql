-- The latest rewards of each pair in each run, and whether the chosen answer is ahead.
with latest as (
    select * from steps
    qualify row_number() over (partition by run, example_id order by step desc) = 1
)

select
    run,
    example_id,
    split,
    step,
    chosen_reward,
    rejected_reward,
    margin,
    margin > 0 as correct
from latest
