"""The library: what a record, a key, a cache and a loss are. The programs are in stages/."""
