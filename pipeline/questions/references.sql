-- How far the references agree on the same pairs: the sign of their margins, also per token (without that, lengths decide it), their correlation and distance.
with others as (select * from pairs where not used)

select
    others.reference,
    others.model_id,
    count(*) as pairs,
    avg((sign(used.margin) = sign(others.margin))::int) as same_sign,
    avg((sign(used.margin_per_token) = sign(others.margin_per_token))::int) as same_sign_per_token,
    corr(used.margin_per_token, others.margin_per_token) as correlation,
    avg(abs(used.margin - others.margin)) as apart
from pairs as used join others using (example_id)
where used.used and used.margin is not null and others.margin is not null
group by others.reference, others.model_id
order by same_sign_per_token
-- verdict
select
    (select count(*) from pairs where used) as pairs,
    (select count(label) from examples) as labels,
    list({
        reference: reference,
        n: pairs,
        n_same_per_token: round(pairs * same_sign_per_token)::bigint
    }) as groups
from answer
