-- Pairs whose answers are nearly identical, so that there is little to prefer.
-- similarity = 0.9: lowest share of common words among all words of both answers
-- limit = 20: most rows to list
with lowered as (
    select example_id, source, line, chosen, rejected, lower(chosen) as a, lower(rejected) as b
    from examples
    where
        chosen is not null
        -- Skip pairs whose lengths rule it out.
        and least(length(chosen), length(rejected)) >= ($similarity - 0.1) * greatest(length(chosen), length(rejected))
),

-- Comparing words is slow, so look first for one of five pieces of the chosen answer in the rejected one. Pairs with a
-- difference in all five are missed.
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
        list_distinct(regexp_extract_all(a, pattern)) as chosen_words,
        list_distinct(regexp_extract_all(b, pattern)) as rejected_words
    from
        alike
        cross join (
            -- A word is a run of what is no blank, mark or symbol; a character where words are written without blanks.
            select '[{scripts}]|[^{scripts}\s\pZ\pC\pP\pS]+'.replace('{scripts}', '\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}') as pattern
        )
),

compared as (
    select *, len(list_intersect(chosen_words, rejected_words)) as n_shared from words
)

select
    example_id,
    source,
    line,
    n_shared / greatest(len(chosen_words) + len(rejected_words) - n_shared, 1) as similarity,
    shorten(chosen) as chosen,
    shorten(rejected) as rejected
from compared
where n_shared > 0 and n_shared >= $similarity * (len(chosen_words) + len(rejected_words) - n_shared)
order by similarity desc, example_id
-- verdict
select
    (select count(*) from examples where chosen is not null) as pairs,
    (select count(label) from examples) as labels,
    count(*) as alike
from answer
