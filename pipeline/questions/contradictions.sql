-- Pairs that contradict each other: the same prompt and answers, with chosen and rejected swapped. Each is listed with the first of those that it contradicts.
-- limit = 20: most rows to list
with keyed as (
    select
        example_id,
        source,
        line,
        hash(chosen_key) as chosen,
        hash(rejected_key) as rejected,
        chosen < rejected as is_forwards,
        -- The same for both orders.
        least(chosen, rejected) as first_answer,
        greatest(chosen, rejected) as second_answer
    from examples
    where chosen_key is not null
),

-- Go on with these only: answers that occur in one order only contradict nothing.
both_ways as (
    select first_answer, second_answer
    from keyed
    group by first_answer, second_answer
    having bool_or(is_forwards) and bool_or(not is_forwards)
),

contradictory as (select * from keyed semi join both_ways using (first_answer, second_answer)),

firsts as (
    select
        first_answer,
        second_answer,
        is_forwards,
        min({source: source, line: line, example_id: example_id}) as first_example
    from contradictory
    group by first_answer, second_answer, is_forwards
)

select
    one.example_id,
    one.source,
    one.line,
    other.first_example.example_id as other_example_id,
    other.first_example.source as other_source,
    other.first_example.line as other_line
from contradictory as one
join firsts as mine using (first_answer, second_answer, is_forwards)
join firsts as other
    on
        other.first_answer = one.first_answer
        and other.second_answer = one.second_answer
        and other.is_forwards <> one.is_forwards
-- Those that contradict each other follow each other.
order by least(mine.first_example, other.first_example), one.source, one.line, one.example_id
-- verdict
select
    (select count(*) from examples where chosen_key is not null) as pairs,
    count(*) as contradictory,
    (select count(label) from examples) as labels
from answer
