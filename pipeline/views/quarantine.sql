-- Records that could not be used: source and line, the reason, and the raw record.
select
    source,
    line,
    reason,
    detail,
    -- Bytes that are not UTF-8 are shown escaped.
    coalesce(try(decode(raw)), raw::varchar) as raw
from stored.quarantine
