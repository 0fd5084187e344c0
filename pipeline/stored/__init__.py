"""Everything that the stages exchange: files on disk, and the records that vouch for them.

In: tables, records and paths. Out: verified tables, values and typed records. Start with artifact.py (how a
file gets to disk) and records.py (what is written next to it), then prepared.py and cache.py, which read them.
"""
