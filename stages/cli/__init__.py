"""The command `prefcache`: parse, load the config, call one stage, turn errors into exit codes.

Nothing heavy is imported before a command is known, so that --help is fast. A command is a function in one of the
files here.
"""

from prefcache.cli import cache, info, pipeline, query, runs, setup, transfer
from prefcache.cli.app import main

__all__ = ["cache", "info", "main", "pipeline", "query", "runs", "setup", "transfer"]
