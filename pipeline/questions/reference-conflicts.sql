-- Pairs on which two references disagree: one finds the chosen answer likelier per token, the other the rejected one; the clearest first.
-- limit = 20: most rows to list
with used as (select * from pairs where used and margin is not null),

others as (select * from pairs where not used and margin is not null)

select
    example_id,
    used.source,
    used.line,
    used.margin_per_token,
    used.margin,
    others.reference as other_reference,
    others.margin_per_token as other_margin_per_token,
    others.margin as other_margin
from used join others using (example_id)
where sign(used.margin_per_token) <> sign(others.margin_per_token)
-- Clear is what both are sure of.
order by least(abs(used.margin_per_token), abs(others.margin_per_token)) desc, example_id, other_reference
-- verdict
select
    (select count(*) from pairs where used) as pairs,
    (select count(label) from examples) as labels,
    (select count(margin) from pairs where used) as scored,
    list({reference: reference, n: n, n_conflicts: n_conflicts}) as groups
from
    (select reference, count(*) as n from pairs where not used and margin is not null group by reference)
    left join (select other_reference as reference, count(*) as n_conflicts from answer group by other_reference)
        using (reference)
