-- The latest rewards of each pair or label in each run, and whether they are right: the chosen answer ahead, or of the label's sign. Without a reference, log-probs have no sign to judge a label by, and correct is empty.
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
    case
        when margin is not null then margin > 0
        when ref_completion_logp <> 0 then if(label, completion_reward, -completion_reward) > 0
    end as correct,
    completion_reward,
    label
from latest
