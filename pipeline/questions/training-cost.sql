-- What one epoch of training on all training examples reads, by source, in tokens: where the answers of a pair share their prompt (pairs of one prompt that meet in a step share it as well, so it may be less), where they do not, how many tokens count in the loss, and how many of the shared ones stand for images. Losses that estimate a KL divergence from mismatched answers (kto) read kl_tokens as well.
-- epochs = 1: passes over the examples
with lengths as (
    select
        source,
        n_prompt,
        coalesce(n_chosen, n_completion) as n_first,
        n_rejected as n_second,
        coalesce(n_common, 0) as n_common,
        coalesce(n_chosen_counted + n_rejected_counted, n_completion_counted) as n_counted,
        n_kl,
        n_image_tokens
    from examples
    where split = 'train'
),

-- The last token of an answer is not read: nothing follows it.
reads as (
    select
        *,
        n_prompt + n_first - 1 + coalesce(n_prompt + n_second - 1, 0) as unshared,
        if(n_second is null, 0, n_prompt + least(n_common, n_first - 1, n_second - 1)) as in_both
    from lengths
)

select
    source,
    count(*) as examples,
    ($epochs * sum(unshared - in_both))::bigint as tokens_shared,
    ($epochs * sum(unshared))::bigint as tokens_unshared,
    ($epochs * sum(n_counted))::bigint as tokens_counted,
    -- NULL if an earlier version prepared the data.
    if(bool_or(n_image_tokens is null), null, $epochs * sum(n_image_tokens))::bigint as image_tokens,
    ($epochs * sum(n_prompt + n_kl - 1))::bigint as kl_tokens
from reads
group by source
order by tokens_shared desc, source
-- verdict
select
    coalesce(sum(examples), 0)::bigint as examples,
    sum(tokens_shared)::bigint as tokens_shared,
    sum(tokens_unshared)::bigint as tokens_unshared,
    sum(tokens_counted)::bigint as tokens_counted,
    sum(image_tokens)::bigint as image_tokens,
    sum(kl_tokens)::bigint as kl_tokens
from answer
