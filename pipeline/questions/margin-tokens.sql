-- Which tokens carry the margin: for each token, how far the policy moved from the reference on it in the direction that training wants, summed over its places. Only of the few held-out examples whose log-probs each run moved most, the right way and the wrong way (the view tokens).
-- run = null: a run; null means all runs
-- limit = 20: most rows to list
with signed as (
    select
        run,
        example_id,
        token,
        -- Training wants chosen and good answers likelier, rejected and bad ones less likely.
        log_ratio * if(answer = 'chosen' or (answer = 'completion' and label), 1, -1) as gain
    from tokens left join (select example_id, label from examples) using (example_id)
    where log_ratio is not null and ($run is null or run = $run)
)

select
    run,
    token,
    count(*) as places,
    count(distinct example_id) as examples,
    sum(gain) as gain,
    sum(gain) / sum(sum(gain)) over (partition by run) as share_of_margin
from signed
group by run, token
order by abs(sum(gain)) desc, run, token
-- verdict
with by_run as (
    select
        run,
        max_by(token, abs(gain), 5) as top,
        list_sum(max(abs(gain), 5)) / nullif(sum(abs(gain)), 0) as share_of_top
    from answer
    group by run
)

select
    (select count(*) from runs where $run is null or run = $run) as runs,
    (select count(distinct example_id) from tokens where $run is null or run = $run) as examples,
    (select count(log_ratio) from tokens where $run is null or run = $run) as places,
    list(by_run) as groups
from by_run
