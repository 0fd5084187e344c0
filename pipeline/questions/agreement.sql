-- How often each reference already prefers the chosen answer, by source.
select
    reference,
    model_id,
    bool_or(used) as used,
    source,
    count(margin) as pairs,
    avg((margin > 0)::int) as agrees,
    avg((margin_per_token > 0)::int) as agrees_per_token,
    avg(margin) as margin,
    avg(margin_per_token) as margin_per_token
from pairs
group by reference, model_id, source
order by agrees
-- verdict
select
    (select count(*) from pairs where used) as pairs,
    (select count(label) from examples) as labels,
    list({
        reference: reference,
        used: used,
        source: source,
        n: pairs,
        -- A share times its count is the whole number that it was made of.
        n_agrees: round(pairs * agrees)::bigint,
        n_agrees_per_token: round(pairs * agrees_per_token)::bigint
    }) filter (where pairs > 0) as groups
from answer
