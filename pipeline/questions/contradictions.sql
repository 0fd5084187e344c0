-- Pairs that contradict each other: the same prompt and answers, with chosen and rejected swapped.
-- limit = 20: most rows to list
with keyed as (
    select
        example_id,
        source,
        line,
        hash(chosen_key) as chosen,
        hash(rejected_key) as rejected,
        -- The same for both orders.
        least(chosen, rejected) as first_answer,
        greatest(chosen, rejected) as second_answer
    from examples
    where chosen_key is not null
),

-- Join only these: answers that occur in one order only contradict nothing.
both_ways as (
    select
        first_answer,
        second_answer,
        min({source: source, line: line, example_id: example_id}) filter (where chosen < rejected) as forwards,
        min({source: source, line: line, example_id: example_id}) filter (where chosen > rejected) as backwards
    from keyed
    group by first_answer, second_answer
    having forwards is not null and backwards is not null
)

select
    example_id,
    source,
    line,
    -- The first of those that it contradicts.
    if(chosen < rejected, backwards, forwards).example_id as other_example_id,
    if(chosen < rejected, backwards, forwards).source as other_source,
    if(chosen < rejected, backwards, forwards).line as other_line
from both_ways join keyed using (first_answer, second_answer)
-- Those that contradict each other follow each other.
order by least(forwards, backwards), source, line, example_id
-- verdict
select
    (select count(*) from examples where chosen_key is not null) as pairs,
    count(*) as contradictory,
    (select count(label) from examples) as labels
from answer
