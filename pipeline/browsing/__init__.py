"""Browse an experiment's examples: which there are under a filter, in which order, and how their numbers are distributed.

browse_table.py makes a table of every example's numbers next to the views of `prefcache sql`. example_filter.py turns what a reader
asks for into a condition on it, and browse_queries.py into whole queries.
"""
