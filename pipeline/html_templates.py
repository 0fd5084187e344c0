"""Jinja templates of HTML: everything printed is escaped, and characters that cannot be seen are shown by name."""

from pathlib import Path
from typing import Any

import jinja2

from prefcache.pipeline.visible_text import visible


def make_environment(folder: Path, **options: Any) -> jinja2.Environment:
    """Return the environment of a folder of templates; `options` are Jinja's, such as trim_blocks."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        # Runs before escaping. Markup, a subclass of str, is the template's own.
        finalize=lambda value: visible(value) if type(value) is str else value,
        **options,
    )
