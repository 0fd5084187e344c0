-- The latest rewards of each pair or label in each run, and whether they are right: the chosen answer ahead, or of the label's sign. Without a reference, log-probs have no sign to judge a label by, and correct is empty.
with latest as (
    select
        run,
        example_id,
        any_value(split) as split,
        -- Each for itself, for what a query does not ask for is then not computed. An example that stands in one step twice has
        -- the same values twice.
        arg_max_null(chosen_reward, step) as chosen_reward,
        arg_max_null(rejected_reward, step) as rejected_reward,
        arg_max_null(margin, step) as margin,
        arg_max_null(completion_reward, step) as completion_reward,
        arg_max_null(ref_completion_logp, step) as ref_completion_logp,
        any_value(label) as label,
        max(step) as step
    from steps
    group by run, example_id
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
