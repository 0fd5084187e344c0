-- Pairs whose rejected answer is likelier per token under the reference, the clearest first.
-- limit = 20: most rows to list
-- Only the texts of the pairs to list are shortened.
with clearest as (
    select *
    from pairs
    where used and margin_per_token < 0
    order by margin_per_token, example_id
    limit $limit
)

select
    example_id,
    source,
    line,
    margin_per_token,
    margin,
    n_chosen_counted,
    n_rejected_counted,
    shorten(prompt) as prompt,
    shorten(chosen) as chosen,
    shorten(rejected) as rejected
from clearest
order by margin_per_token, example_id
-- verdict
with by_source as (
    select
        source,
        count(*) as pairs,
        count(margin_per_token) as n,
        count_if(margin_per_token < 0) as n_disagrees,
        any_value(reference) as reference
    from pairs
    where used
    group by source
)

select
    sum(pairs)::bigint as pairs,
    (select count(label) from examples) as labels,
    any_value(reference) as reference,
    list(by_source) as groups
from by_source
