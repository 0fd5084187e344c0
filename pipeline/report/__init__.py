"""The report: an experiment as one self-contained HTML page.

In: the views, the manifests and the run folders that stages/commands/report.py opened. Out: the page as text. The *_section files read
what each part of the page shows, plots.py and svg.py draw it, prose.py puts it into sentences, and page.py renders the
template. Start with page.py.
"""
