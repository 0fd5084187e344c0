-- How far each run's policy moved from the reference, per token, by answer length in tokens that count: the mean log-ratio of the data's answers. Whole answers are averaged, because a run does not store log-probs of single tokens.
with latest as (
    select
        run,
        any_value(n_chosen_counted) as n_chosen,
        any_value(n_rejected_counted) as n_rejected,
        arg_max_null(chosen_logp - ref_chosen_logp, step) as chosen,
        arg_max_null(rejected_logp - ref_rejected_logp, step) as rejected
    from steps
    group by run, example_id
),

answers as (
    select run, 'chosen' as answer, n_chosen as n_tokens, chosen as log_ratio from latest
    union all
    select run, 'rejected', n_rejected, rejected from latest
)

select
    run,
    answer,
    -- Group by powers of two: 1, 2 to 3, 4 to 7, 8 to 15, ...
    (2 ** floor(log2(n_tokens)))::int as from_tokens,
    count(*) as answers,
    sum(log_ratio) / sum(n_tokens) as log_ratio_per_token
from answers
where log_ratio is not null
group by run, answer, from_tokens
order by run, answer, from_tokens
-- verdict
select
    (select count(label) from examples) as labels,
    (select count(*) from runs) as runs,
    list({
        run: run,
        answer: answer,
        from_tokens: from_tokens,
        answers: answers,
        log_ratio_per_token: log_ratio_per_token
    } order by run, answer, from_tokens) as groups
from answer
