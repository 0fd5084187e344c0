-- Every pair at every visit of every run: log-probs of policy and reference, rewards, margin and loss.
with named as (
    select visits.*, runs_.run, runs_.beta
    from visits join runs_ on starts_with(visits.filename, runs_.folder)
),

rewarded as (
    select
        *,
        beta * (chosen_logp - ref_chosen_logp) as chosen_reward,
        beta * (rejected_logp - ref_rejected_logp) as rejected_reward
    from named
)

select
    run,
    step,
    epoch,
    split,
    example_id,
    chosen_logp,
    rejected_logp,
    ref_chosen_logp,
    ref_rejected_logp,
    chosen_reward,
    rejected_reward,
    chosen_reward - rejected_reward as margin,
    loss
from rewarded
