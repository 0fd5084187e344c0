-- Every visit of every pair or label in every run: log-probs of policy and reference over the tokens that count, rewards, margin and loss. If the reference moves (train.moving_reference), its log-probs are those at that visit.
with named as (
    select
        -- Earlier versions counted every token of an answer, in columns of other names.
        visits.* replace (
            coalesce(n_chosen_counted, n_chosen) as n_chosen_counted,
            coalesce(n_rejected_counted, n_rejected) as n_rejected_counted,
            coalesce(n_completion_counted, n_completion) as n_completion_counted
        ),
        runs.run,
        runs.beta,
        runs.per_token
    from stored.visits join stored.runs on parse_dirpath(parse_dirpath(visits.filename)) = runs.folder
),

-- Without a reference, its log-prob counts as 0. Some losses have rewards per token.
rewarded as (
    select
        *,
        beta * (chosen_logp - coalesce(ref_chosen_logp, 0)) / if(per_token, n_chosen_counted, 1) as chosen_reward,
        beta * (rejected_logp - coalesce(ref_rejected_logp, 0)) / if(per_token, n_rejected_counted, 1) as rejected_reward,
        beta * (completion_logp - coalesce(ref_completion_logp, 0)) / if(per_token, n_completion_counted, 1)
            as completion_reward
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
    n_chosen_counted,
    n_rejected_counted,
    chosen_reward,
    rejected_reward,
    chosen_reward - rejected_reward as margin,
    completion_logp,
    ref_completion_logp,
    n_completion_counted,
    completion_reward,
    label,
    loss
from rewarded
