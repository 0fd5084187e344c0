-- The latest rewards of each pair or label in each run, and whether they are right: the chosen answer ahead, or of the label's sign. Without a reference, log-probs have no sign to judge a label by, and correct is empty.
with latest as (
    select
        run,
        example_id,
        max(step) as step,
        -- One value, so that all of it is of one visit.
        max_by(
            {
                split: split, chosen_reward: chosen_reward, rejected_reward: rejected_reward, margin: margin,
                completion_reward: completion_reward, ref_completion_logp: ref_completion_logp, label: label
            },
            step
        ) as visit
    from steps
    group by run, example_id
)

select
    run,
    example_id,
    visit.split,
    step,
    visit.chosen_reward,
    visit.rejected_reward,
    visit.margin,
    case
        when visit.margin is not null then visit.margin > 0
        when visit.ref_completion_logp <> 0
            then if(visit.label, visit.completion_reward, -visit.completion_reward) > 0
    end as correct,
    visit.completion_reward,
    visit.label
from latest
