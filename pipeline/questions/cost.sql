-- The cost of scoring, by source: sequences, tokens, and the tokens that remain once shared prompts and repeated sequences count once, with how many of these stand for images.
with numbered as (
    select
        source,
        example_id,
        n_prompt,
        n_image_tokens,
        n_completion,
        -- A prompt is computed once for the answers of an example.
        answer in ('chosen', 'completion') as brings_prompt,
        row_number() over (partition by hash(key) order by source, line, answer) as occurrence
    from sequences
)

select
    source,
    count(distinct example_id) as examples,
    count_if(occurrence = 1) as sequences,
    sum(n_prompt + n_completion) as tokens,
    sum(if(occurrence = 1, n_completion + if(brings_prompt, n_prompt, 0), 0)) as tokens_to_read,
    -- NULL if an earlier version prepared the data.
    if(bool_or(n_image_tokens is null), null, sum(if(occurrence = 1 and brings_prompt, n_image_tokens, 0)))::bigint as image_tokens,
    sum(if(occurrence = 1, n_completion, 0)) as answer_tokens
from numbered
group by source
order by tokens_to_read desc
-- verdict
select
    sum(examples)::bigint as examples,
    sum(sequences)::bigint as sequences,
    sum(tokens)::bigint as tokens,
    sum(tokens_to_read)::bigint as tokens_to_read,
    sum(image_tokens)::bigint as image_tokens
from answer
