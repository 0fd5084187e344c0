-- Signs that rewards rise for the wrong reason, over each run's tenths: chosen answers that get less likely, rewards that go with length.
with training as (
    select
        *,
        1 + floor(10 * (step - 1) / max(step) over (partition by run))::int as tenth
    from steps
    where split = 'train' and margin is not null and step > 0
)

select
    run,
    tenth,
    count(*) as visits,
    avg(margin) as margin,
    -- In nats, and not times beta: how likely the chosen answers became, against the reference.
    avg(chosen_logp - ref_chosen_logp) as chosen_log_ratio,
    avg(rejected_logp - ref_rejected_logp) as rejected_log_ratio,
    -- Right, and yet the chosen answer is less likely than it was.
    avg((margin > 0 and chosen_logp < ref_chosen_logp)::int) as right_by_pushing_down,
    corr(n_chosen - n_rejected, margin) as margin_with_length
from training
group by run, tenth
order by run, tenth
