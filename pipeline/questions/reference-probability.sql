-- For train.only: the training pairs in which the reference itself most clearly prefers the chosen answer (after arXiv 2501.15109, which keeps 30% to 50%).
-- share = 0.4: share of the training pairs to keep
with scored as (
    select example_id, margin_per_token
    from pairs
    where used and split = 'train' and margin_per_token is not null
)

select example_id, margin_per_token
from scored
where margin_per_token >= (select quantile_disc(margin_per_token, 1 - $share) from scored)
order by margin_per_token desc, example_id
-- verdict
select
    (select count(*) from examples where split = 'train') as examples,
    (select count(label) from examples) as labels,
    (select count(margin) from pairs where used and split = 'train') as scored,
    count(*) as kept,
    min(margin_per_token) as lowest,
    max(margin_per_token) as highest
from answer
