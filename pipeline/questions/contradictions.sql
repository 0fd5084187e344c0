-- Pairs that contradict each other: the same prompt and answers, with chosen and rejected swapped.
-- limit = 20: most rows to list
with keyed as (
    select example_id, source, line, hash(chosen_key) as chosen, hash(rejected_key) as rejected
    from examples
    where chosen_key is not null
),

both_ways as (
    select
        -- Join only these: answers that occur in one order only contradict nothing.
        least(chosen, rejected) as first_answer,
        greatest(chosen, rejected) as second_answer
    from keyed
    group by all
    having bool_or(chosen < rejected) and bool_or(chosen > rejected)
)

select
    one.source,
    one.line,
    one.example_id,
    other.source as other_source,
    other.line as other_line,
    other.example_id as other_example_id
from both_ways
join keyed as one on one.chosen = first_answer and one.rejected = second_answer
join keyed as other on other.chosen = second_answer and other.rejected = first_answer
order by one.source, one.line, other.source, other.line
limit $limit
