-- Records that could not become examples: where they stand, why, and what was read there.
select
    source,
    line,
    reason,
    detail,
    -- What is no UTF-8 is shown escaped.
    coalesce(try(decode(raw)), raw::varchar) as raw
from stored.quarantine
