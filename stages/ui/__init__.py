"""`prefcache ui`: pages to browse an experiment's examples with a browser on this machine.

access.py says who may ask, app.py which page an address is, reader.py answers from the experiment, pages.py renders. The pages are
HTML from the server; static/ui.js only makes them faster to use.
"""
