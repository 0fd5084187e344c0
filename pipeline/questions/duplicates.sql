-- Examples that stand in the data more than once, but for case and blanks around them, the most frequent first.
-- limit = 20: most rows
with hashed as (
    select
        source,
        line,
        -- One hash for what is compared; texts themselves would not fit into memory.
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
limit $limit
