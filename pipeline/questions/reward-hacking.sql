-- Signs that rewards rise for the wrong reason, by tenths of each run: chosen answers become less likely, or rewards follow length.
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
    avg((margin > 0)::int) as correct,
    -- In nats, without beta: how much likelier the chosen answers are under the policy than under the reference.
    avg(chosen_logp - ref_chosen_logp) as chosen_log_ratio,
    avg(rejected_logp - ref_rejected_logp) as rejected_log_ratio,
    -- The margin is positive although the chosen answer became less likely.
    avg((margin > 0 and chosen_logp < ref_chosen_logp)::int) as right_by_pushing_down,
    corr(n_chosen_counted - n_rejected_counted, margin) as margin_with_length
from training
group by run, tenth
order by run, tenth
-- verdict
select
    (select count(label) from examples) as labels,
    (select count(*) from runs) as runs,
    list({
        run: run,
        tenth: tenth,
        n: visits,
        n_right: round(visits * correct)::bigint,
        n_pushed: round(visits * right_by_pushing_down)::bigint,
        chosen_log_ratio: chosen_log_ratio,
        margin_with_length: if(isfinite(margin_with_length), margin_with_length, null)
    }) as groups
from answer
