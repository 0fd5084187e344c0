-- Whether the longer answer is the chosen one, by source: how often, and how far the reference's margin goes with length.
select
    source,
    count(*) as pairs,
    avg(n_chosen) as n_chosen,
    avg(n_rejected) as n_rejected,
    -- Of the pairs whose answers differ in length.
    avg(if(length_difference <> 0, (length_difference > 0)::int, null)) as longer_wins,
    corr(length_difference, margin) as corr_margin,
    corr(length_difference, score_gap) as corr_grades
from pairs
where used
group by source
order by abs(longer_wins - 0.5) desc
