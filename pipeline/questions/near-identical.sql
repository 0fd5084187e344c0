-- Pairs whose two answers hardly differ, so that there is little to prefer.
-- similarity = 0.9: share of the words of both that both have, at least
-- limit = 20: most rows
with lowered as (
    select example_id, source, line, chosen, rejected, lower(chosen) as a, lower(rejected) as b
    from examples
    where
        chosen is not null
        -- Where the lengths rule it out, no word is looked at.
        and least(length(chosen), length(rejected)) >= ($similarity - 0.1) * greatest(length(chosen), length(rejected))
),

-- Comparing words is slow. Answers that hardly differ have some of these pieces in common; they may be missed where every
-- one of five has a difference in it.
alike as (
    select * from lowered
    where
        contains(b, left(a, 12))
        or contains(b, substr(a, 1 + length(a) // 5, 12))
        or contains(b, substr(a, 1 + length(a) * 2 // 5, 12))
        or contains(b, substr(a, 1 + length(a) * 3 // 5, 12))
        or contains(b, right(a, 12))
),

words as (
    select
        *,
        list_distinct(regexp_extract_all(a, '\w+')) as of_chosen,
        list_distinct(regexp_extract_all(b, '\w+')) as of_rejected
    from alike
),

compared as (
    select *, len(list_intersect(of_chosen, of_rejected)) as n_shared from words
)

select
    example_id,
    source,
    line,
    n_shared / greatest(len(of_chosen) + len(of_rejected) - n_shared, 1) as similarity,
    left(chosen, 50) as chosen,
    left(rejected, 50) as rejected
from compared
where n_shared >= $similarity * (len(of_chosen) + len(of_rejected) - n_shared)
order by similarity desc, example_id
limit $limit
