"""Browse an experiment's examples: which there are under a filter, in which order, and how their numbers are distributed.

browse_table.py makes a table of every example's numbers next to the views of `prefcache sql`. filters.py turns what a reader asks for
into a condition on it, and queries.py into whole queries. neighbours.py finds the examples that resemble another one.
"""
