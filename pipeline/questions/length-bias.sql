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
