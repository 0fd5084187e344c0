-- Whether the chosen answer tends to be the longer one, by source, and how the reference's margin correlates with length, in tokens that count.
select
    source,
    count(*) as pairs,
    avg(n_chosen_counted) as n_chosen,
    avg(n_rejected_counted) as n_rejected,
    -- Among pairs whose answers differ in length.
    avg(if(length_difference <> 0, (length_difference > 0)::int, null)) as longer_wins,
    corr(length_difference, margin) as corr_margin,
    corr(length_difference, score_gap) as corr_grades
from pairs
where used
group by source
order by abs(longer_wins - 0.5) desc
-- verdict
with by_source as (
    select
        source,
        count(*) as pairs,
        count_if(length_difference <> 0) as differ,
        count_if(length_difference > 0) as longer
    from pairs
    where used
    group by source
)

select
    sum(pairs)::bigint as pairs,
    sum(differ)::bigint as differ,
    sum(longer)::bigint as longer,
    list(by_source) as sources,
    (select count(label) from examples) as labels
from by_source
