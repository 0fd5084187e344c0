-- The latest rewards of each pair or label in each run, and whether they are correct: the chosen answer has the higher reward, or the reward's sign matches the label. Without a reference, `correct` is empty for labels, because log-probs are always negative.
with latest as (
    select
        run,
        example_id,
        any_value(split) as split,
        -- One aggregate per column, so that DuckDB skips those that a query does not read. An example that occurs twice in a
        -- step has the same values both times.
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
