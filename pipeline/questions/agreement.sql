-- How often each reference already prefers the chosen answer, by source.
select
    reference,
    model_id,
    source,
    count(margin) as pairs,
    avg((margin > 0)::int) as agrees,
    avg((margin_per_token > 0)::int) as agrees_per_token,
    avg(margin) as margin,
    avg(margin_per_token) as margin_per_token
from pairs
group by reference, model_id, source
order by agrees
