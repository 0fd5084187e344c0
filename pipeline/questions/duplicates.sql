-- Examples that occur more than once, ignoring case and surrounding blanks, the most frequent first.
-- limit = 20: most rows to list
with hashed as (
    select
        source,
        line,
        -- Compare hashes, because the texts would not fit into memory.
        hash(lower(trim(prompt)), lower(trim(coalesce(chosen, completion))), lower(trim(coalesce(rejected, label::varchar))))
            as content
    from examples
),

repeated as (
    select content from hashed group by content having count(*) > 1
)

select
    count(*) as times,
    count(distinct source) as sources,
    min(source) as first_source,
    min(line) as first_line,
    list_sort(list(line))[:10] as lines
from hashed semi join repeated using (content)
group by content
order by times desc, first_source, first_line
-- verdict
select
    (select count(*) from examples) as examples,
    count(*) as repeated,
    coalesce(sum(times - 1), 0)::bigint as copies
from answer
