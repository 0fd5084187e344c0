-- The latest rewards of each pair or label in each run, and whether they are right: the chosen answer ahead, or of the label's sign.
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
    coalesce(margin > 0, if(label, completion_reward, -completion_reward) > 0) as correct,
    completion_reward,
    label
from latest
