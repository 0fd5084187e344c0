-- How far the references agree on the same pairs: sign, correlation and distance of their margins.
with others as (select * from pairs where not used)

select
    others.reference,
    others.model_id,
    count(*) as pairs,
    avg((sign(used.margin) = sign(others.margin))::int) as same_sign,
    corr(used.margin_per_token, others.margin_per_token) as correlation,
    avg(abs(used.margin - others.margin)) as apart
from pairs as used join others using (example_id)
where used.used and used.margin is not null and others.margin is not null
group by others.reference, others.model_id
order by same_sign
