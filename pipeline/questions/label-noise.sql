-- Pairs that are probably labelled the wrong way round: every reference that scored them clearly prefers the rejected answer.
-- nats = 0.5: how much likelier per token the rejected answer must be under each reference
-- limit = 20: most rows to list
select
    example_id,
    any_value(source) as source,
    any_value(line) as line,
    count(*) as n_references,
    max(margin_per_token) as margin_per_token,
    any_value(score_gap) as score_gap
from pairs
where margin is not null
group by example_id
having max(margin_per_token) < -$nats
order by n_references desc, margin_per_token, example_id
-- verdict
select
    (select count(*) from pairs where used) as pairs,
    (select count(label) from examples) as labels,
    (select count(margin) from pairs where used) as scored,
    (select count(distinct reference) from pairs where margin is not null) as n_references,
    count(*) as doubtful
from answer
