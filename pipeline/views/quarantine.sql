-- Records that could not be used: source and line, the reason, what was counted and its limit, and the raw record. n_tokens is of the prompt and the longest answer, of records that are too long.
select
    source,
    line,
    reason,
    detail,
    n_found,
    n_limit,
    n_tokens,
    -- Bytes that are not UTF-8 are shown escaped.
    coalesce(try(decode(raw)), raw::varchar) as raw
from stored.quarantine
