-- What each run learns first: the margins of its training pairs by tenths of the run, by source and by the length of their answers in tokens that count (powers of two).
with training as (
    select
        run,
        source,
        -- 1, 2 to 3, 4 to 7, 8 to 15, ...
        (2 ** floor(log2((n_chosen_counted + n_rejected_counted) / 2)))::int as from_tokens,
        1 + floor(10 * (step - 1) / max(step) over (partition by run))::int as tenth,
        margin
    from (
        select *
        from steps
        -- A margin of exactly 0 means that the policy is still its reference: neither right nor wrong.
        where split = 'train' and margin <> 0 and step > 0
    )
    join (select example_id, source from examples) using (example_id)
)

select
    run,
    if(grouping(source) = 0, 'source', 'length') as kind,
    coalesce(source, from_tokens::varchar) as part,
    tenth,
    count(*) as visits,
    avg((margin > 0)::int) as correct,
    avg(margin) as margin
from training
group by grouping sets ((run, tenth, source), (run, tenth, from_tokens))
order by run, kind desc, try_cast(part as int), part, tenth
-- verdict
select
    (select count(label) from examples) as labels,
    (select count(*) from runs) as runs,
    list({
        run: run,
        kind: kind,
        part: part,
        tenth: tenth,
        n: visits,
        n_right: round(visits * correct)::bigint
    }) as groups
from answer
